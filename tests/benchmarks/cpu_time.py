"""Time and memory of one optimizer step on a CPU, beside those of `optax.adamw` in the same run.

    python tests/benchmarks/cpu_time.py

    optax.adamw                         1.0 x   0.99 ns   0.00 temporary bytes per weight
    manifold_adamw                      3.0 x   2.95 ns   4.00 temporary bytes per weight
    compress_state(optax.adamw)         2.4 x   2.33 ns   3.00 temporary bytes per weight
    on_grid(optax.adamw)                1.4 x   1.42 ns   1.00 temporary bytes per weight
    grid_adamw, float32 second moment   3.2 x   3.12 ns   4.13 temporary bytes per weight
    grid_adamw, 8-bit second moment     4.3 x   4.24 ns   5.00 temporary bytes per weight
    grid_adamw                          3.5 x   3.47 ns   4.13 temporary bytes per weight
    grid_adamw, 2-byte weight           2.6 x   2.57 ns   6.01 temporary bytes per weight

(jax 0.10, two CPU cores; grid_adamw at 3.3 and 3.5 x in two runs.) A part is page
faults, because the allocator returns temporaries of more than 32 MB after each call. The tracker of `manifold_adamw`
needs the old weights, and XLA copies them, because the new ones are written over them. With an allocator that keeps
its pages, as under `GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592`, it
takes 2.1 x.

The step is `tx.update` and `optax.apply_updates` on a 3200 x 3200 matrix on all cores, jitted, with parameters and
state donated; the time is that of the fastest of 15 calls, between which all others are called once. The temporaries
are what XLA allocates for the step beside its arguments and results.
"""

import itertools
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax

import altgrad_jax as ag

SHAPE, CALLS = (3200, 3200), 15
# The transformation, and the fraction bits of the parameters; None for float32.
OPTIMIZERS = {
    "optax.adamw": (optax.adamw(1e-3), None),
    "manifold_adamw": (ag.manifold_adamw(1e-3), None),
    "compress_state(optax.adamw)": (ag.compress_state(optax.adamw(1e-3)), None),
    "on_grid(optax.adamw)": (ag.on_grid(optax.adamw(1e-3)), 0),
    "grid_adamw, float32 second moment": (ag.grid_adamw(1e-3, second_moment="float32"), 0),
    "grid_adamw, 8-bit second moment": (ag.grid_adamw(1e-3, second_moment="8bit"), 0),
    "grid_adamw": (ag.grid_adamw(1e-3), 0),
    "grid_adamw, 2-byte weight": (ag.grid_adamw(1e-3, b1=0), 8),
}


def prepared(tx: optax.GradientTransformation, fraction_bits: int | None) -> tuple:
    """The compiled step, its parameters and state after a first call, which finds its memory, and its gradients."""
    params = 0.05 * jax.random.normal(jax.random.key(0), SHAPE)
    gradients = 0.01 * jax.random.normal(jax.random.key(1), SHAPE)
    if fraction_bits is not None:
        params = ag.to_grid(params, fraction_bits=fraction_bits)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    carry = (params, tx.init(params))
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, gradients).compile()
    return program, jax.block_until_ready(program(*carry, gradients)), gradients


def main():
    programs, carries, gradients = zip(*(prepared(*arguments) for arguments in OPTIMIZERS.values()), strict=True)
    carries, times = list(carries), np.empty((CALLS, len(programs)))
    for call, (i, program) in itertools.product(range(CALLS), enumerate(programs)):
        start = time.perf_counter()
        carries[i] = jax.block_until_ready(program(*carries[i], gradients[i]))
        times[call, i] = time.perf_counter() - start
    fastest = times.min(axis=0) * 1e9 / gradients[0].size
    for name, program, nanoseconds in zip(OPTIMIZERS, programs, fastest, strict=True):
        temporaries = program.memory_analysis().temp_size_in_bytes / gradients[0].size
        ratio = f"{nanoseconds / fastest[0]:5.1f} x{nanoseconds:7.2f} ns"
        print(f"{name:34}{ratio}{temporaries:7.2f} temporary bytes per weight")


if __name__ == "__main__":
    main()
