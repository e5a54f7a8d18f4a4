"""Bytes per weight that one optimizer step moves on a TPU, read from the program that XLA compiles for it.

Needs no TPU: `pip install -e ".[tpu]"`, then

    python tests/benchmarks/tpu_bytes.py

    one matrix  optax.adamw                28.00 bytes per weight,  1 kernels
    one matrix  manifold_adamw             36.00 bytes per weight,  1 kernels
    one matrix  manifold_adamw(format)     36.00 bytes per weight,  1 kernels
    one matrix  without the tracker        28.00 bytes per weight,  1 kernels
    one matrix  on_grid(optax.adamw)       22.05 bytes per weight,  1 kernels
    one matrix  grid_adamw, f32 moments    51.04 bytes per weight,  2 kernels
    one matrix  grid_adamw                  8.64 bytes per weight,  1 kernels
    one matrix  grid_adamw, 2-byte weight  10.73 bytes per weight,  1 kernels
    40 leaves   optax.adamw                39.86 bytes per weight, 40 kernels
    40 leaves   manifold_adamw             47.86 bytes per weight, 40 kernels
    40 leaves   manifold_adamw(format)     47.86 bytes per weight, 40 kernels
    40 leaves   without the tracker        39.86 bytes per weight, 40 kernels
    40 leaves   on_grid(optax.adamw)       54.79 bytes per weight, 16 kernels
    40 leaves   grid_adamw, f32 moments    98.10 bytes per weight, 36 kernels
    40 leaves   grid_adamw                 38.43 bytes per weight, 20 kernels
    40 leaves   grid_adamw, 2-byte weight  47.83 bytes per weight, 20 kernels

The step is `tx.update` and `optax.apply_updates`, jitted, with parameters and state donated; the gradients are float32,
bfloat16 where the moments have 8 bits. The floor is one read of gradients, parameters and state and one write of the
latter two; on many leaves XLA also prefetches, which counts, and merges leaves of one shape that draw random bits. With
momentum feedback and float32 moments the int8 and the float32 results, which a TPU tiles differently, take two kernels.
"""

import argparse
import functools
import json
import os
import re
from typing import Any

# Set before jax is imported: libtpu must not look for a machine that is not there.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import altgrad_jax as ag

MODELS = {
    "one matrix": {"w": (4096, 4096)},
    "40 leaves": {f"w{i}": (512, 512 + 128 * (i % 4)) for i in range(40)},
}
OPTIMIZERS = {
    "optax.adamw": optax.adamw(1e-3),
    "manifold_adamw": ag.manifold_adamw(1e-3),
    "manifold_adamw(format)": ag.manifold_adamw(1e-3, format="float8_e4m3fn"),
    "without the tracker": optax.chain(
        ag.stiffness_precondition(),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(1e-3),
    ),
}
# Parameters in float8_e4m3fn with so many fraction bits, and the dtype of the gradients.
STORED = {
    "on_grid(optax.adamw)": (ag.on_grid(optax.adamw(1e-3)), 0, jnp.float32),
    "grid_adamw, f32 moments": (ag.grid_adamw(1e-3, moments="float32"), 0, jnp.float32),
    "grid_adamw": (ag.grid_adamw(1e-3), 0, jnp.bfloat16),
    "grid_adamw, 2-byte weight": (ag.grid_adamw(1e-3, feedback=None), 8, jnp.bfloat16),
}
RESCALE_PERIOD = 64  # on_grid and compress_state look at their scales once in so many steps.


def described(shapes: dict[str, tuple[int, ...]], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def cost(shapes: dict[str, tuple[int, ...]], tx: optax.GradientTransformation, device: jax.Device) -> dict[str, float]:
    """Bytes per weight and the matrix-sized kernels of one step."""
    params = described(shapes, jnp.float32)
    return compiled(tx, params, params, device)


def stored_cost(shapes, tx, fraction_bits, dtype, device) -> dict[str, float]:
    """The same for parameters on a grid, with the bytes averaged over the steps: some look at the scales."""
    params = jax.eval_shape(functools.partial(ag.to_grid, fraction_bits=fraction_bits), described(shapes, jnp.float32))
    often, seldom = (compiled(tx, params, described(shapes, dtype), device, step) for step in (65, 64))
    mean = ((RESCALE_PERIOD - 1) * often["bytes"] + seldom["bytes"]) / RESCALE_PERIOD
    return {"bytes": mean, "kernels": often["kernels"]}


def at_step(state: optax.OptState, step: int) -> optax.OptState:
    """A state whose own counters are a constant, so that the program is that of one step alone."""
    if isinstance(state, ag.CompressedState):
        return state._replace(moment_step=jnp.uint32(step), inner_state=at_step(state.inner_state, step))
    return state._replace(grid_step=jnp.uint32(step))


def compiled(tx, params, gradients, device, grid_step=None) -> dict[str, float]:
    """Bytes per weight and matrix-sized kernels of one program; with a `grid_step`, of that step alone."""

    def placed(tree):
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def step(params, state, gradients):
        if grid_step is not None:
            state = at_step(state, grid_step)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    arguments = map(placed, (params, state, gradients))
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    text = program.as_text()
    kernels = re.findall(r"= (.*) fusion\(", text[text.index("ENTRY") :])
    matrices = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(gradients)}
    return {
        "bytes": program.cost_analysis()["bytes accessed"] / sum(leaf.size for leaf in jax.tree.leaves(gradients)),
        "kernels": sum(any(f"[{shape}]" in outputs for shape in matrices) for outputs in kernels),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--topology", default="v5e:2x2", help="v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2, ...")
    arguments = parser.parse_args()
    device = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices[0]
    costs = {
        model: {name: cost(shapes, tx, device) for name, tx in OPTIMIZERS.items()}
        | {
            name: stored_cost(shapes, *stored, device)
            for name, stored in STORED.items()
            if len(shapes) == 1 or not arguments.json  # Minutes of compilation, and tested on one matrix.
        }
        for model, shapes in MODELS.items()
    }
    if arguments.json:
        print(json.dumps(costs))
        return
    for model, rows in costs.items():
        for name, row in rows.items():
            print(f"{model:12}{name:26}{row['bytes']:6.2f} bytes per weight,{row['kernels']:3} kernels")


if __name__ == "__main__":
    main()
