"""The three lines that change, in a whole training: two bytes per weight where AdamW has twelve.

A small network learns the next character of CPython's help from the eight before it.

    $ python examples/minimal.py
"""

import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import altgrad_jax as ag

characters, text = np.unique(list("".join(sorted(pydoc_data.topics.topics.values()))), return_inverse=True)
windows = np.random.default_rng(0).permutation(np.lib.stride_tricks.sliding_window_view(text, 9))
shapes = {"embedding": (len(characters), 16), "kernel_in": (128, 256), "kernel_out": (256, len(characters))}
params = {k: jax.random.normal(jax.random.key(len(k)), (n, m)) / m**0.5 for k, (n, m) in shapes.items()}

params = ag.to_grid(params)  # New.
tx = ag.grid_adamw(optax.cosine_decay_schedule(1e-2, 1000))  # Instead of optax.adamw(..., weight_decay=0.01).
value_and_grad = ag.value_and_grad  # Instead of jax.value_and_grad.

logits = lambda p, x: jnp.tanh(p["embedding"][x].reshape(-1, 128) @ p["kernel_in"]) @ p["kernel_out"]  # noqa: E731
nats = lambda p, w: optax.losses.softmax_cross_entropy_with_integer_labels(logits(p, w[:, :8]), w[:, 8]).mean()  # noqa: E731
gradient, update, state = jax.jit(value_and_grad(nats)), jax.jit(tx.update), tx.init(params)
for step, batch in enumerate(windows[:256_000].reshape(1000, 256, 9)):
    loss, grads = gradient(params, batch)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    if step % 250 == 249:
        print(f"step {step + 1}: validation loss {nats(params, windows[-4096:]):.3f}")
print(ag.diagnostics.storage(params))
