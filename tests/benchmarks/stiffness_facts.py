"""What a stiffness does before Adam and after it: the numbers of docs/manifold-adamw.md.

    python tests/benchmarks/stiffness_facts.py

A linear student with 64 x 64 normally distributed weights learns a noisy linear teacher, 300 steps. The ULPs are
those of an unbounded grid with 3 mantissa bits. Takes a few seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import altgrad_jax as ag

MANTISSA_BITS = 3
STEPS = 300


def adam(learning_rate, **kwargs):
    return optax.chain(optax.scale_by_adam(**kwargs), optax.scale_by_learning_rate(learning_rate))


def problem():
    """A student, and the gradient of the loss of a noisy batch."""
    student, teacher = 0.1 * jax.random.normal(jax.random.key(0), (2, 64, 64))

    def gradient(w, key):
        x = jax.random.normal(key, (32, 64))
        noise = 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (32, 64))
        return jax.grad(lambda w: jnp.mean((x @ w - x @ teacher - noise) ** 2))(w)

    return student, gradient


def train(tx):
    """Final weights, and the path of each in ULPs: the sum of |movement| / ULP over the steps."""
    student, gradient = problem()

    @jax.jit
    def scan(w):
        def step(carry, key):
            w, state, path = carry
            updates, state = tx.update(gradient(w, key), state, w)
            path += jnp.abs(updates) / (ag.spacing(w, "float32") * 2.0 ** (23 - MANTISSA_BITS))
            return (optax.apply_updates(w, updates), state, path), None

        return jax.lax.scan(step, (w, tx.init(w), jnp.zeros_like(w)), jax.random.split(jax.random.key(1), STEPS))[0]

    w, _, path = scan(student)
    return np.asarray(w), np.asarray(path)


def main():
    stiffness = ag.stiffness_precondition(MANTISSA_BITS)
    same = [
        train(optax.chain(ag.stiffness_precondition(m, max_stiffness=float("inf")), adam(1e-2, eps=0.0)))[0]
        for m in range(7)
    ]
    identical = all(np.array_equal(w.view(np.int32), same[0].view(np.int32)) for w in same)
    print(f"eps = 0, mantissa_bits 0 to 6: weights after {STEPS} steps bit-identical: {identical}")

    print("path of the weights in ULPs, 99th over 1st percentile:")
    for name, tx in {
        "Adam": adam(1e-3),
        "stiffness before Adam": optax.chain(stiffness, adam(1e-3)),
        "stiffness after Adam": optax.chain(optax.scale_by_adam(), stiffness, optax.scale_by_learning_rate(1e-2)),
    }.items():
        path = train(tx)[1]
        print(f"  {name:24}{np.percentile(path, 99) / np.percentile(path, 1):8.1f}")

    print("a weight at 0 after 100 steps of gradient 1 at learning rate 1e-3:")
    for name, tx in {
        "AdamW": optax.adamw(1e-3, weight_decay=0.0),
        "ManifoldAdamW": ag.manifold_adamw(1e-3, weight_decay=0.0),
        "ManifoldAdamW(format=...)": ag.manifold_adamw(1e-3, weight_decay=0.0, format="float8_e5m2"),
    }.items():
        w = jnp.zeros(1)
        state, update = tx.init(w), jax.jit(tx.update)
        for _ in range(100):
            updates, state = update(jnp.ones(1), state, w)
            w = optax.apply_updates(w, updates)
        print(f"  {name:26}{float(w[0]):9.4f}")


if __name__ == "__main__":
    main()
