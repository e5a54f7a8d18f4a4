"""Trains weights that are stored on an fp8 grid, in a linen `TrainState` and in Flax nnx, with any Optax optimizer.

A small network learns the next character of CPython's help. There are no float32 kernels: the models multiply by stored
ones as they are, and `ag.value_and_grad` differentiates that. Next to it is the loss of the same optimizer with float32
weights that are never rounded.

    $ python examples/grid_training.py
    optimizer          trained      loss, float32   loss, grid   bytes per weight   seconds
    adamw, 1 byte      with_linen           2.128        2.122               2.09       6.0
    adamw, 1 byte      with_nnx             2.110        2.114               2.09       2.6
    lion, 2 bytes      with_nnx             2.099        2.109               3.03       2.3
    sgd, 2 bytes       with_nnx             2.185        2.186               3.03       1.7
    muon, 2 bytes      with_linen           1.949        1.981               3.03       2.4
    combined, 2 bytes  with_linen           2.129        2.131               4.05       2.2
    halved, 2 bytes    with_linen           2.209        2.208               8.05       1.5

(CPython 3.11, jax 0.10, two CPU cores, 40 s in all; the seconds are of the grid, mostly compilation.) Embeddings stay
in float32. The momentum of `grid_adamw` is in LaProp's order, behind a second moment of means over rows and columns.
`combined` skips what is not finite, clips, and decays the kernels alone, all inside of `on_grid`, and `halved` is adamw
of every two batches, whose float32 sums take 4 bytes.
"""

import argparse
import functools
import pydoc_data.topics
import time

import jax
import numpy as np
import optax
from flax import linen, nnx
from flax.training.train_state import TrainState
from tqdm import tqdm

import altgrad_jax as ag
import altgrad_jax.flax_support

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
CONTEXT, EMBEDDING, HIDDEN, BATCH, STEPS = 8, 16, 128, 256, 300
characters, text = np.unique(list("\n".join(sorted(pydoc_data.topics.topics.values()))), return_inverse=True)
windows = np.lib.stride_tricks.sliding_window_view(text.astype(np.int32), CONTEXT + 1)
windows = np.random.default_rng(0).permutation(windows)[: STEPS * BATCH + 8192]
KERNEL_WEIGHTS = HIDDEN * (CONTEXT * EMBEDDING + len(characters))
batches, validation = windows[: STEPS * BATCH].reshape(STEPS, BATCH, CONTEXT + 1), windows[STEPS * BATCH :]


class Linen(linen.Module):
    """Logits of the next character, `[batch, vocabulary]`, from characters `[batch, CONTEXT]`."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Embed(len(characters), EMBEDDING)(x).reshape(len(x), -1)
        init = linen.initializers.lecun_normal()
        x = linen.tanh(x @ self.param("kernel_in", init, (CONTEXT * EMBEDDING, HIDDEN)))
        return x @ self.param("kernel_out", init, (HIDDEN, len(characters)))


class NNX(nnx.Module):
    """The same network."""

    def __init__(self, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.embed = nnx.Embed(len(characters), EMBEDDING, rngs=rngs)
        self.kernel_in = nnx.Param(init(rngs.params(), (CONTEXT * EMBEDDING, HIDDEN)))
        self.kernel_out = nnx.Param(init(rngs.params(), (HIDDEN, len(characters))))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.tanh(self.embed(x).reshape(len(x), -1) @ self.kernel_in.get_value())
        return x @ self.kernel_out.get_value()


def is_kernel(path: tuple, _: jax.Array | None = None) -> bool:
    """Whether a leaf belongs to the weight of a matmul, by its path alone."""
    return "kernel" in jax.tree_util.keystr(path)


def nats(network, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy of the last character of every window."""
    return optax.softmax_cross_entropy_with_integer_labels(network(batch[:, :-1]), batch[:, -1]).mean()


def with_linen(tx: optax.GradientTransformation, store) -> tuple[jax.Array, TrainState]:
    """Trains what `store` makes of the parameters; returns the validation loss, and parameters and state."""
    params = store(Linen().init(jax.random.key(0), batches[0, :, :-1])["params"])

    def loss(params, batch):
        return nats(Linen().bind({"params": params}), batch)

    def step(state, batch):
        _, grads = ag.value_and_grad(loss)(state.params, batch)
        return state.apply_gradients(grads=grads), None

    state = TrainState.create(apply_fn=Linen().apply, params=params, tx=tx)
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, batches))(state)
    return loss(state.params, validation), state


def with_nnx(tx: optax.GradientTransformation, store) -> tuple[jax.Array, tuple]:
    """The same."""
    model = NNX(rngs=nnx.Rngs(0))
    nnx.update(model, store(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        _, grads = ag.value_and_grad(nats)(model, batch)
        optimizer.update(model, grads)

    for batch in batches:
        step(model, optimizer, batch)
    return nats(model, validation), (nnx.state(model, nnx.Param), optimizer.opt_state)


def main() -> None:
    adamw, lion, sgd, muon = (
        optax.adamw(0.01),
        optax.lion(0.003),
        optax.sgd(0.3, momentum=0.9),
        optax.contrib.muon(0.03),
    )
    masked = optax.adamw(0.01, weight_decay=0.01, mask=lambda params: jax.tree.map_with_path(is_kernel, params))
    combined = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), masked), max_consecutive_errors=5)
    halved = optax.MultiSteps(adamw, every_k_schedule=2).gradient_transformation()
    print(f"compiling; seven trainings in float32 and seven on the grid, {STEPS} steps each")
    print("optimizer          trained      loss, float32   loss, grid   bytes per weight   seconds")
    trainings = (
        ("adamw, 1 byte", with_linen, adamw, ag.grid_adamw(0.01), 0),
        ("adamw, 1 byte", with_nnx, adamw, ag.grid_adamw(0.01), 0),
        ("lion, 2 bytes", with_nnx, lion, ag.compress_state(ag.on_grid(lion)), 8),
        ("sgd, 2 bytes", with_nnx, sgd, ag.compress_state(ag.on_grid(sgd)), 8),
        ("muon, 2 bytes", with_linen, muon, ag.compress_state(ag.on_grid(muon)), 8),
        ("combined, 2 bytes", with_linen, combined, ag.compress_state(ag.on_grid(combined)), 8),
        ("halved, 2 bytes", with_linen, halved, ag.compress_state(ag.on_grid(halved)), 8),
    )
    for name, train, inner, tx, fraction_bits in tqdm(trainings, desc="compiling, training", unit="row", leave=False):
        float32_loss, _ = train(inner, lambda params: params)
        store = functools.partial(ag.to_grid, fraction_bits=fraction_bits, where=is_kernel)
        start = time.perf_counter()
        loss, kept = jax.block_until_ready(train(tx, store))
        seconds = time.perf_counter() - start
        size = sum(leaf.nbytes for path, leaf in jax.tree.leaves_with_path(kept) if is_kernel(path)) / KERNEL_WEIGHTS
        tqdm.write(f"{name:19}{train.__name__:13}{float32_loss:13.3f}{loss:13.3f}{size:19.2f}{seconds:10.1f}")


if __name__ == "__main__":
    main()
