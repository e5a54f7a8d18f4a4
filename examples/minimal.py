"""The three lines that change, in a whole training: two bytes per weight where AdamW has twelve.

A small network learns the next character of CPython's help from the eight before it.

    $ python examples/minimal.py
    step 250: validation loss 2.291
    step 500: validation loss 2.185
    step 750: validation loss 2.045
    step 1000: validation loss 2.010
    ['embedding']   (103, 16)   float8_e3m4  1.06
    ['kernel_in']   (128, 256)  float8_e3m4  1.00
    ['kernel_out']  (256, 103)  float8_e3m4  1.01
    all                                      1.01

AdamW in float32 ends at 2.017. The last table has the bytes per weight of the parameters.
"""

import argparse
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import altgrad_jax as ag

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
characters, text = np.unique(list("".join(sorted(pydoc_data.topics.topics.values()))), return_inverse=True)
windows = np.random.default_rng(0).permutation(np.lib.stride_tricks.sliding_window_view(text, 9))
shapes = {"embedding": (len(characters), 16), "kernel_in": (128, 256), "kernel_out": (256, len(characters))}
keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 3), strict=True))
params = {name: jax.random.normal(keys[name], (n, m)) / n**0.5 for name, (n, m) in shapes.items()}

params = ag.to_grid(params)  # New.
tx = ag.grid_adamw(optax.cosine_decay_schedule(1e-2, 1000))  # Instead of optax.adamw(..., weight_decay=0.01).
value_and_grad = ag.value_and_grad  # Instead of jax.value_and_grad.


def loss_fn(params, windows):
    hidden = jnp.tanh(params["embedding"][windows[:, :8]].reshape(-1, 128) @ params["kernel_in"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["kernel_out"], windows[:, 8]).mean()


print("compiling; 1000 steps")
gradient, update, state = jax.jit(value_and_grad(loss_fn)), jax.jit(tx.update), tx.init(params)
for step, batch in enumerate(windows[:256_000].reshape(1000, 256, 9), start=1):
    loss, grads = gradient(params, batch)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    if step % 250 == 0:
        print(f"step {step}: validation loss {loss_fn(params, windows[-4096:]):.3f}")
print(ag.diagnostics.storage(params))
