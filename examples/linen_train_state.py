"""ManifoldAdamW, composed by hand, in a Flax linen `TrainState`.

$ python examples/linen_train_state.py
loss 0.6868 -> 0.0077, median |ULP position| 9e+06
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from tqdm import tqdm

import altgrad_jax as ag

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
x = jax.random.normal(jax.random.key(0), (256, 4))
y = jnp.sin(x.sum(axis=1, keepdims=True))
model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(1)])
tx = optax.chain(
    ag.stiffness_precondition(mantissa_bits=3),
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.01),
    optax.scale_by_learning_rate(0.01),
    ag.track_ulp_position(),  # Last, because it must see the final update.
)
state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(1), x)["params"], tx=tx)


def loss_fn(params):
    return jnp.mean((model.apply({"params": params}, x) - y) ** 2)


@jax.jit
def train_step(state):
    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


losses = []
with tqdm(total=500, desc="compiling", unit="step", leave=False) as bar:
    for _ in range(500):
        state, loss = train_step(state)
        losses.append(float(loss))
        bar.set_description(f"loss {loss:.4f}", refresh=False)
        bar.update()
ulps = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(optax.tree.get(state.opt_state, "ulp_position"))])
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, median |ULP position| {np.median(np.abs(ulps)):.0e}")
