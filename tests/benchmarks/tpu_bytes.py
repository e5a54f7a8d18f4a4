"""Bytes and operations per weight of one optimizer step on a TPU, read from the program that XLA compiles for it.

Needs no TPU: `pip install -e ".[tpu]"`, then

    python tests/benchmarks/tpu_bytes.py
    python tests/benchmarks/tpu_bytes.py --roofline
    python tests/benchmarks/tpu_bytes.py --leaves 100    # seconds of compilation, and what is copied

    one matrix  optax.adamw                      28.00 bytes,  15.0 operations per weight,  1 kernels
    one matrix  manifold_adamw                   36.00 bytes,  57.0 operations per weight,  1 kernels
    one matrix  manifold_adamw(format)           36.00 bytes,  43.0 operations per weight,  1 kernels
    one matrix  without the tracker              28.00 bytes,  32.0 operations per weight,  1 kernels
    one matrix  on_grid(optax.adamw)             22.01 bytes,  64.0 operations per weight,  1 kernels
    one matrix  on_grid(momentum)                 6.01 bytes, 105.0 operations per weight,  1 kernels
    one matrix  grid_adamw, f32 second moment    25.01 bytes, 162.0 operations per weight,  2 kernels
    one matrix  grid_adamw, 8bit                  8.02 bytes, 164.0 operations per weight,  1 kernels
    one matrix  grid_adamw, 8bit, a schedule      8.02 bytes, 164.0 operations per weight,  1 kernels
    one matrix  grid_adamw, 8bit, f32 gradients  19.02 bytes, 210.0 operations per weight,  2 kernels
    one matrix  grid_adamw, 8bit, 2-byte weight   8.01 bytes, 113.0 operations per weight,  1 kernels
    one matrix  grid_adamw                        8.02 bytes, 119.0 operations per weight,  1 kernels
    one matrix  grid_adamw, a schedule            8.02 bytes, 119.0 operations per weight,  1 kernels
    one matrix  grid_adamw, float32 gradients    12.03 bytes, 117.0 operations per weight,  1 kernels
    one matrix  grid_adamw, 2-byte weight         8.02 bytes,  68.0 operations per weight,  1 kernels
    one matrix  grid_adamw, 8bit, vmap of 4      10.02 bytes, 180.0 operations per weight,  1 kernels
    one matrix  grid_adamw, vmap of 4            12.04 bytes, 137.0 operations per weight,  1 kernels

and the same for 40 leaves, which takes minutes. The rows of `vmap` are over four layers of 8192 x 8192; a conditional
becomes a choice of two results there.

The step is `tx.update` and `optax.apply_updates`, jitted, with parameters and state donated; the gradients are float32,
in the rows of `grid_adamw` and of the momentum alone bfloat16 unless they say otherwise. The floor is one read of
gradients, parameters and state and one write of the latter two, and for a factored second moment, the default of
`grid_adamw`, a second read of the gradients. The step is an ordinary one: the conditional that gives moments their
first exponents and means, which the compiler would count as if it were always taken, is left out. An operation that
reads the same bits as another type counts as none. On many leaves XLA also prefetches, which counts: it copies small
arrays into on-chip memory and out of it, and nothing else. It merges leaves of one shape that draw random words. A
momentum beside a float32 second moment takes two kernels, and so does one beside 8-bit second moments and float32
gradients. The number of operands of a kernel decides: one more array, scale per row or scalar that the compiler does
not know can turn a step into three kernels.

The roofline has picoseconds per weight by bytes and by operations, for the chips of `CHIPS`, and what XLA's cost model
estimates for the program of the v5e. GPUs are given the same bytes and operations: they have another compiler.
"""

import argparse
import functools
import importlib
import json
import math
import re
import time
from typing import Any
from unittest import mock

import targets  # Before jax.

# isort: split
import jax
import jax.numpy as jnp
import optax

import altgrad_jax as ag
from altgrad_jax import factored

MODELS = {
    "one matrix": {"w": (16384, 16384)},
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
SCHEDULE = optax.cosine_decay_schedule(1e-3, 1000)
# The transformation, the fraction bits of the parameters and the dtype of the gradients.
STORED = {
    "on_grid(optax.adamw)": (ag.on_grid(optax.adamw(1e-3)), 0, jnp.float32),
    "on_grid(momentum)": (ag.on_grid(optax.scale(-1e-3), momentum=0.9), 0, jnp.bfloat16),
    "grid_adamw, f32 second moment": (ag.grid_adamw(1e-3, second_moment="float32"), 0, jnp.float32),
    "grid_adamw, 8bit": (ag.grid_adamw(1e-3, second_moment="8bit"), 0, jnp.bfloat16),
    "grid_adamw, 8bit, a schedule": (ag.grid_adamw(SCHEDULE, second_moment="8bit"), 0, jnp.bfloat16),
    "grid_adamw, 8bit, f32 gradients": (ag.grid_adamw(SCHEDULE, second_moment="8bit"), 0, jnp.float32),
    "grid_adamw, 8bit, 2-byte weight": (ag.grid_adamw(1e-3, b1=0, second_moment="8bit"), 8, jnp.bfloat16),
    "grid_adamw": (ag.grid_adamw(1e-3), 0, jnp.bfloat16),
    "grid_adamw, a schedule": (ag.grid_adamw(SCHEDULE), 0, jnp.bfloat16),
    "grid_adamw, float32 gradients": (ag.grid_adamw(SCHEDULE), 0, jnp.float32),
    "grid_adamw, 2-byte weight": (ag.grid_adamw(1e-3, b1=0), 8, jnp.bfloat16),
}


# Bytes and 32-bit vector operations per second, of integers: most are. TPUs: the bandwidths and clocks of Google
# Cloud and of "How to Scale Your Model" (Austin et al. 2025), 8 x 128 lanes of 4 units each; the clock of v6e from
# its 918 TFLOP/s in two units of 256 x 256. GPUs: NVIDIA's data sheets, 64 integer lanes in each multiprocessor (CUDA
# programming guide, arithmetic throughput).
V5E_CLOCK = 1.5e9
CHIPS = {
    "v5e": (0.82e12, 4096 * V5E_CLOCK),
    "v6e": (1.64e12, 4096 * 1.75e9),
    "H100": (3.35e12, 132 * 64 * 1.98e9),
    "B200": (8.0e12, 148 * 64 * 1.97e9),
}
# What an ordinary step does not do. The module, because the package has a function of this name.
compress_state = importlib.import_module("altgrad_jax.compress_state")
first_exponents, first_means = compress_state._first_exponents, factored._before
compress_state._first_exponents = lambda exponents, *_: exponents
factored._before = lambda g, means: means


def described(shapes: dict[str, tuple[int, ...]], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def cost(shapes: dict[str, tuple[int, ...]], tx: optax.GradientTransformation, device: jax.Device) -> dict[str, float]:
    """Bytes and operations per weight, and the matrix-sized kernels, of one step."""
    params = described(shapes, jnp.float32)
    return compiled(tx, params, params, device)


def stored_cost(shapes, tx, fraction_bits, dtype, device) -> dict[str, float]:
    """The same for parameters on a grid, with gradients of the dtype."""
    params = jax.eval_shape(functools.partial(ag.to_grid, fraction_bits=fraction_bits), described(shapes, jnp.float32))
    return compiled(tx, params, described(shapes, dtype), device)


def mapped_cost(second_moment: str, device: jax.Device) -> dict[str, float]:
    """The same for grid_adamw mapped over the layers of a stack, under which a conditional is always taken."""
    tx = ag.grid_adamw(1e-3, second_moment=second_moment)
    tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    with (
        mock.patch.object(compress_state, "_first_exponents", first_exponents),
        mock.patch.object(factored, "_before", first_means),
    ):
        return stored_cost({"w": (4, 8192, 8192)}, tx, 0, jnp.bfloat16, device)


def compiled(tx, params, gradients, device) -> dict[str, float]:
    """The same of the program that is compiled for a device."""

    def placed(tree):
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    arguments = map(placed, (params, jax.eval_shape(tx.init, params), gradients))
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    text, analysis = program.as_text(), program.cost_analysis()
    kernels = re.findall(r"= (.*) fusion\(", text[text.index("ENTRY") :])
    copies = re.findall(r"= (\(.*\)) copy-start\(", text)  # From where to where.
    matrices = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(gradients)}
    weights = sum(leaf.size for leaf in jax.tree.leaves(gradients))
    # The analysis counts them, but a register has no type.
    reread = re.findall(r"= \w+\[([\d,]+)\]\S* bitcast-convert\(", text)
    free = sum(math.prod(map(int, shape.split(","))) for shape in reread)
    return {
        "bytes": analysis["bytes accessed"] / weights,
        "operations": (analysis["flops"] - free) / weights,
        "kernels": sum(any(f"[{shape}]" in outputs for shape in matrices) for outputs in kernels),
        "copies": len(copies),
        "on_chip": sum("S(1)" in copy for copy in copies),
        "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("ENTRY") :]))) / weights,
    }


def roofline(device: jax.Device) -> None:
    """Picoseconds per weight of a step on one matrix: by bytes, and by operations."""
    shapes, steps = MODELS["one matrix"], {"optax.adamw": None} | STORED
    print("| step | bytes | operations | v5e, XLA's estimate | " + " | ".join(CHIPS) + " |")
    print("|---" * (4 + len(CHIPS)) + "|")
    for name, stored in steps.items():
        row = stored_cost(shapes, *stored, device) if stored else cost(shapes, OPTIMIZERS[name], device)
        times = ((row["bytes"] / bandwidth, row["operations"] / rate) for bandwidth, rate in CHIPS.values())
        roofs = [f"{1e12 * memory:.1f}, {1e12 * arithmetic:.1f}" for memory, arithmetic in times]
        estimate = 1e12 * row["cycles"] / V5E_CLOCK
        print(
            f"| {name} | {row['bytes']:.1f} | {row['operations']:.0f} | {estimate:.1f} | {' | '.join(roofs)} |",
            flush=True,
        )


def many_leaves(number: int, device: jax.Device) -> None:
    """Seconds of compilation for leaves of four shapes, of all cores together, and the copies of the program."""
    shapes = {f"w{i}": (512, 512 + 128 * (i % 4)) for i in range(number)}
    for name, stored in {"optax.adamw": None, "grid_adamw": STORED["grid_adamw"]}.items():
        begun = time.process_time()
        row = stored_cost(shapes, *stored, device) if stored else cost(shapes, OPTIMIZERS[name], device)
        seconds = time.process_time() - begun
        copies = f"{row['on_chip']} of {row['copies']} copies are into or out of on-chip memory"
        print(f"{name:12}{seconds:6.1f} s,{row['bytes']:6.2f} bytes, {copies}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--topology", default="v5e:2x2", help="v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2, ...")
    parser.add_argument("--leaves", type=int, help="compilation of so many leaves of four shapes")
    parser.add_argument("--roofline", action="store_true", help="times by bytes and by operations")
    arguments = parser.parse_args()
    device = targets.devices(arguments.topology)[0]
    if arguments.roofline or arguments.leaves:
        roofline(device) if arguments.roofline else many_leaves(arguments.leaves, device)
        return
    costs = {
        model: {name: cost(shapes, tx, device) for name, tx in OPTIMIZERS.items()}
        | {
            name: stored_cost(shapes, *stored, device)
            for name, stored in STORED.items()
            if len(shapes) == 1 or not arguments.json  # Minutes of compilation, and tested on one matrix.
        }
        for model, shapes in MODELS.items()
    }
    costs["one matrix"]["grid_adamw, 8bit, vmap of 4"] = mapped_cost("8bit", device)
    costs["one matrix"]["grid_adamw, vmap of 4"] = mapped_cost("factored", device)
    if arguments.json:
        print(json.dumps(costs))
        return
    for model, rows in costs.items():
        for name, row in rows.items():
            traffic = f"{row['bytes']:6.2f} bytes,{row['operations']:6.1f} operations per weight"
            print(f"{model:12}{name:32}{traffic},{row['kernels']:3} kernels")


if __name__ == "__main__":
    main()
