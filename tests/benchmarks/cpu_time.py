"""Time of one optimizer step on one CPU thread, as a multiple of that of `optax.adamw` in the same run.

    python tests/benchmarks/cpu_time.py

    optax.adamw                     1.0 x   0.55 ns per weight
    manifold_adamw                  2.8 x   1.51 ns per weight
    compress_state(optax.adamw)     5.4 x   2.94 ns per weight
    on_grid(optax.adamw)            4.1 x   2.24 ns per weight
    grid_adamw, float32 moments     5.6 x   3.05 ns per weight
    grid_adamw                      9.5 x   5.17 ns per weight
    grid_adamw, 2-byte weight       7.5 x   4.12 ns per weight

The step is `tx.update` and `optax.apply_updates` on a 512 x 1024 matrix, in a jitted `lax.scan` with parameters and
state donated; the fastest of some calls. What counts on CPUs is the arithmetic, not the bytes.
"""

import os
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import optax

import altgrad_jax as ag

SHAPE, STEPS, CALLS = (512, 1024), 20, 6
# The transformation, and the fraction bits of the parameters; None for float32.
OPTIMIZERS = {
    "optax.adamw": (optax.adamw(1e-3), None),
    "manifold_adamw": (ag.manifold_adamw(1e-3), None),
    "compress_state(optax.adamw)": (ag.compress_state(optax.adamw(1e-3)), None),
    "on_grid(optax.adamw)": (ag.on_grid(optax.adamw(1e-3)), 0),
    "grid_adamw, float32 moments": (ag.grid_adamw(1e-3, moments="float32"), 0),
    "grid_adamw": (ag.grid_adamw(1e-3), 0),
    "grid_adamw, 2-byte weight": (ag.grid_adamw(1e-3, feedback=None), 8),
}


def nanoseconds(tx: optax.GradientTransformation, fraction_bits: int | None) -> float:
    """Per weight and step."""
    params = 0.05 * jax.random.normal(jax.random.key(0), SHAPE)
    gradients = 0.01 * jax.random.normal(jax.random.key(1), SHAPE)
    if fraction_bits is not None:
        params = ag.to_grid(params, fraction_bits=fraction_bits)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    steps = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS)[0], donate_argnums=0)
    carry, times = jax.block_until_ready(steps((params, tx.init(params)))), []
    for _ in range(CALLS):
        start = time.process_time()
        carry = jax.block_until_ready(steps(carry))
        times.append(time.process_time() - start)
    return 1e9 * min(times) / STEPS / gradients.size


def main():
    times = {name: nanoseconds(*arguments) for name, arguments in OPTIMIZERS.items()}
    for name, time_ in times.items():
        print(f"{name:30}{time_ / times['optax.adamw']:5.1f} x{time_:7.2f} ns per weight")


if __name__ == "__main__":
    main()
