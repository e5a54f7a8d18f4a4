"""Time, memory and compilation of one optimizer step on a CPU, beside those of `optax.adamw` in the same run.

    python tests/benchmarks/cpu_time.py                # a minute; --json FILE for the numbers
    python tests/benchmarks/cpu_time.py --leaves 100   # compilation of a tree of 100 leaves, beside
    python tests/benchmarks/cpu_time.py --torch        # also PyTorch's optimizers: pip install torch torchao

The step is `tx.update` and `optax.apply_updates` on a 3200 x 3200 matrix on all cores, jitted, with parameters and
state donated; the time is that of the fastest of 15 calls, between which all others are called once. The temporaries
are what XLA allocates for the step beside its arguments and results. A part of the time is page faults, because the
allocator returns temporaries of more than 32 MB after each call: `manifold_adamw`, whose tracker needs weights that are
written over, takes 2.1 times instead of 3.0 with an allocator that keeps its pages, as under
`GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592`.
The bandwidth is that of a copy by numpy, read and written, on one core. Compilation is tracing, lowering and compiling,
in seconds of all cores together, of the matrix or of the tree, whose leaves have four shapes; outside of jit it is the
first call.
"""

import argparse
import itertools
import json
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax

import altgrad_jax as ag

SHAPE, CALLS, RATE = (3200, 3200), 15, 1e-3
LEAVES = [(256, 256), (256, 1024), (1024, 256), (256, 768)]
# The transformation, and the format and fraction bits of the parameters, or their dtype.
STORED, FINE = ("float8_e3m4", 0), ("float8_e3m4", 8)
OPTIMIZERS = {
    "optax.adamw": (optax.adamw(RATE), jnp.float32),
    "optax.adamw, bfloat16": (optax.adamw(RATE), jnp.bfloat16),
    "optax.lion": (optax.lion(RATE), jnp.float32),
    "optax.adafactor": (optax.adafactor(RATE), jnp.float32),
    "manifold_adamw": (ag.manifold_adamw(RATE), jnp.float32),
    "compress_state(optax.adamw)": (ag.compress_state(optax.adamw(RATE)), jnp.float32),
    "on_grid(optax.adamw)": (ag.on_grid(optax.adamw(RATE)), STORED),
    "grid_adamw": (ag.grid_adamw(RATE), STORED),
    "grid_adamw, 8-bit second moment": (ag.grid_adamw(RATE, second_moment="8bit"), STORED),
    "grid_adamw, float32 second moment": (ag.grid_adamw(RATE, second_moment="float32"), STORED),
    "grid_adamw, 2-byte weight": (ag.grid_adamw(RATE), FINE),
    "grid_adamw, b1 = 0, 2-byte weight": (ag.grid_adamw(RATE, b1=0), FINE),
    "compress_state(on_grid(optax.adamw)), 2-byte weight": (ag.compress_state(ag.on_grid(optax.adamw(RATE))), FINE),
    "compress_state(on_grid(optax.lion)), 2-byte weight": (ag.compress_state(ag.on_grid(optax.lion(RATE))), FINE),
    "grid_adamw, b1 = 0, bfloat16": (ag.grid_adamw(RATE, b1=0), ("bfloat16", 0)),
}


def compiled(tx: optax.GradientTransformation, kind, shapes: list[tuple[int, ...]]) -> tuple:
    """The step, its parameters, state and gradients, and the seconds of its compilation."""
    keys = enumerate(jax.random.split(jax.random.key(0), len(shapes)))
    params = {f"layer{i}": {"kernel": 0.05 * jax.random.normal(key, shapes[i])} for i, key in keys}
    stored = isinstance(kind, tuple)
    gradients = jax.tree.map(lambda x: (0.2 * x).astype(jnp.float32 if stored else kind), params)
    params = (
        ag.to_grid(params, kind[0], fraction_bits=kind[1]) if stored else jax.tree.map(lambda x: x.astype(kind), params)
    )

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    carry = (params, tx.init(params))
    begun = time.process_time()
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, gradients).compile()
    return program, carry, gradients, time.process_time() - begun


def of_jax(name: str, leaves: int | None):
    """A call that takes one step, and what is known before it is timed."""
    program, carry, gradients, seconds = compiled(*OPTIMIZERS[name], [SHAPE])
    temporaries = program.memory_analysis().temp_size_in_bytes / np.prod(SHAPE)
    known = {"temporary_bytes": round(float(temporaries), 2), "compile_seconds": round(seconds, 2)}
    if leaves:
        shapes = [LEAVES[i % len(LEAVES)] for i in range(leaves)]
        _, (params, state), of_leaves, seconds = compiled(*OPTIMIZERS[name], shapes)
        begun = time.process_time()
        updates, _ = OPTIMIZERS[name][0].update(of_leaves, state, params)
        jax.block_until_ready(optax.apply_updates(params, updates))
        known |= {f"compile_seconds_{leaves}": round(seconds, 2)}
        known |= {f"compile_seconds_{leaves}_outside_of_jit": round(time.process_time() - begun, 2)}
    box = [carry]

    def call():
        box[0] = jax.block_until_ready(program(*box[0], gradients))

    return call, known


def of_torch():
    """PyTorch's fused AdamW and torchao's 8-bit one, in their own environment of threads."""
    import torch
    import torchao.optim

    for name, make in {
        "PyTorch AdamW, fused": lambda p: torch.optim.AdamW(p, RATE, fused=True),
        "torchao AdamW8bit": lambda p: torchao.optim.AdamW8bit(p, RATE),
    }.items():
        weights = torch.nn.Parameter(0.05 * torch.randn(SHAPE))
        weights.grad = 0.01 * torch.randn(SHAPE)
        yield name, (make([weights]).step, {})


def copy_bandwidth() -> float:
    """Gigabytes per second of a copy of 400 MB, read and written."""
    x, times = np.ones(10**8, np.float32), []
    y = np.empty_like(x)
    for _ in range(5):
        begun = time.perf_counter()
        np.copyto(y, x)
        times.append(time.perf_counter() - begun)
    return 8 * x.size / min(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, help="also compiles for a tree of so many leaves")
    parser.add_argument("--torch", action="store_true", help="also PyTorch's optimizers")
    parser.add_argument("--json", help="file to which the numbers go")
    args = parser.parse_args()
    steps = {name: of_jax(name, args.leaves) for name in OPTIMIZERS} | dict(of_torch() if args.torch else ())
    for call, _ in steps.values():
        call()  # Finds its memory.
    times = np.empty((CALLS, len(steps)))
    for k, (i, (call, _)) in itertools.product(range(CALLS), enumerate(steps.values())):
        begun = time.perf_counter()
        call()
        times[k, i] = time.perf_counter() - begun
    fastest, rows = times.min(axis=0) * 1e9 / np.prod(SHAPE), []
    for (name, (_, known)), nanoseconds in zip(steps.items(), fastest.tolist(), strict=True):
        ratio = {"times_adamw": round(nanoseconds / fastest[0], 2), "ns_per_weight": round(nanoseconds, 2)}
        compilation = {
            f"{key}_times_adamw": round(known[key] / steps["optax.adamw"][1][key], 1)
            for key in known
            if "compile" in key
        }
        rows.append({"step": name} | ratio | known | compilation)
    header = list(rows[0])
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, copy {copy_bandwidth():.1f} GB/s\n")
    print("| " + " | ".join(key.replace("_", " ") for key in header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in header) + " |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"jax": jax.__version__, "cores": os.cpu_count(), "rows": rows}, file)


if __name__ == "__main__":
    main()
