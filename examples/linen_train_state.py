"""ManifoldAdamW composed by hand, in a Flax linen `TrainState`.

The parts of `ag.manifold_adamw` are transformations like any other: here with the stiffness of an unbounded grid of
three mantissa bits, and ULPs counted in the parameters' own dtype, float32.

    $ python examples/linen_train_state.py
    loss 0.6868 -> 0.0077, median |ULP position| 9e+06
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import altgrad_jax as ag


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_fn(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (256, 4))
    y = jnp.sin(x.sum(axis=1, keepdims=True))
    model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(1)])
    tx = optax.chain(
        ag.stiffness_precondition(mantissa_bits=3),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(0.01),
        ag.track_ulp_position(),  # Last, as it must see the final update.
    )
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(1), x)["params"], tx=tx)

    losses = []
    for _ in range(500):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
    positions = jax.tree.leaves(optax.tree.get(state.opt_state, "ulp_position"))
    median = np.median(np.abs(np.concatenate([np.ravel(leaf) for leaf in positions])))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, median |ULP position| {median:.0e}")


if __name__ == "__main__":
    main()
