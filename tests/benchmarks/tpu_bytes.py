"""Bytes per weight that one optimizer step moves on a TPU, read from the program that XLA compiles for it.

Needs no TPU: `pip install -e ".[tpu]"`, then

    python tests/benchmarks/tpu_bytes.py

    one matrix  optax.adamw              28.00 bytes per weight,  1 kernels
    one matrix  manifold_adamw           36.00 bytes per weight,  1 kernels
    one matrix  manifold_adamw(format)   36.00 bytes per weight,  1 kernels
    one matrix  without the tracker      28.00 bytes per weight,  1 kernels
    one matrix  on_grid(optax.adamw)     22.05 bytes per weight,  1 kernels
    40 leaves   optax.adamw              39.86 bytes per weight, 40 kernels
    40 leaves   manifold_adamw           47.86 bytes per weight, 40 kernels
    40 leaves   manifold_adamw(format)   47.86 bytes per weight, 40 kernels
    40 leaves   without the tracker      39.86 bytes per weight, 40 kernels
    40 leaves   on_grid(optax.adamw)     54.77 bytes per weight, 16 kernels

The step is `tx.update` and `optax.apply_updates`, jitted, with parameters and state donated. The floor is one read of
gradients, parameters and state and one write of the latter two; on many leaves XLA also prefetches, which counts, and
merges leaves of one shape that draw random bits.
"""

import argparse
import json
import os
import re

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
STORED = {"on_grid(optax.adamw)": ag.on_grid(optax.adamw(1e-3))}  # Parameters in float8_e4m3fn, one byte each.
RESCALE_PERIOD = 64  # on_grid looks at the headroom of its scales once in so many steps.


def cost(tx: optax.GradientTransformation, shapes: dict[str, tuple[int, ...]], device: jax.Device) -> dict[str, float]:
    """Bytes per weight, averaged over the steps, and the matrix-sized kernels of one step."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    if tx in STORED.values():
        stored = jax.eval_shape(ag.to_grid, params)
        often, seldom = (compiled(tx, stored, params, device, grid_step) for grid_step in (65, 64))
        mean = ((RESCALE_PERIOD - 1) * often["bytes"] + seldom["bytes"]) / RESCALE_PERIOD
        return {"bytes": mean, "kernels": often["kernels"]}
    return compiled(tx, params, params, device)


def compiled(tx, params, gradients, device, grid_step=None) -> dict[str, float]:
    """Bytes per weight and matrix-sized kernels of one program; with a constant `grid_step`, of that step alone."""

    def described(tree):
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def step(params, state, gradients):
        if grid_step is not None:
            state = state._replace(grid_step=jnp.uint32(grid_step))
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    arguments = map(described, (params, state, gradients))
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
        model: {name: cost(tx, shapes, device) for name, tx in (OPTIMIZERS | STORED).items()}
        for model, shapes in MODELS.items()
    }
    if arguments.json:
        print(json.dumps(costs))
        return
    for model, rows in costs.items():
        for name, row in rows.items():
            print(f"{model:12}{name:24}{row['bytes']:6.2f} bytes per weight,{row['kernels']:3} kernels")


if __name__ == "__main__":
    main()
