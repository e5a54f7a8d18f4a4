"""Trains a character-level GPT with weights on an 8-bit grid: AdamW against ManifoldAdamW.

The matmul weights are rounded to a scaled grid in every forward pass (float32 master weights, straight-through
gradients); embeddings, biases and norms stay in float32. Both optimizers start from the same weights and see the same
batches. The text is the help of CPython, so another version of Python has slightly other numbers.

    $ python examples/train_char_gpt.py
"""

import argparse
import functools
import pathlib
import pydoc_data.topics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import altgrad_jax as ag

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 128, 4, 64, 32
WEIGHT_DECAY = 0.01
STEPS_PER_CALL = 25  # One call of `train`; the validation loss is taken between calls.
VALIDATION_BATCHES = 16


class Block(nnx.Module):
    """Causal self-attention and a two-layer perceptron, each normalized and residual."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Logits of the next character, `[batch, length, vocabulary]`, of tokens `[batch, length]`."""

    def __init__(self, vocabulary: int, *, rngs: nnx.Rngs):
        self.token = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.place = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(rngs=rngs) for _ in range(LAYERS)))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token(tokens) + self.place(jnp.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def on_grid(path: tuple) -> bool:
    """Whether a parameter is the weight of a matmul."""
    return jax.tree_util.DictKey("kernel") in path


@functools.partial(jax.jit, static_argnames="format")
def quantize(params: Any, format: ag.FloatFormat) -> Any:
    """The parameters as the forward pass sees them."""
    return jax.tree.map_with_path(lambda path, w: ag.fake_quantize(w, format) if on_grid(path) else w, params)


def grid_scale(params: Any, format: ag.FloatFormat) -> Any:
    """The scale of every grid in `quantize`, so that the optimizer knows its ULPs; 1 for the other parameters."""
    return jax.tree.map_with_path(lambda path, w: ag.power_of_two_scale(w, format) if on_grid(path) else 1.0, params)


def grid_leaves(tree: Any) -> np.ndarray:
    """What a tree like the parameters holds for the matmul weights, `[weights]`."""
    return np.concatenate([np.ravel(leaf) for path, leaf in jax.tree.leaves_with_path(tree) if on_grid(path)])


def batch_loss(params: Any, graphdef: nnx.GraphDef, format: ag.FloatFormat, text: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of a random batch of windows of the text, in nats per character."""
    start = jax.random.randint(key, (BATCH, 1), 0, text.size - CONTEXT)
    window = text[start + jnp.arange(CONTEXT + 1)]
    logits = nnx.merge(graphdef, quantize(params, format))(window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("tx", "graphdef", "format"), donate_argnames=("params", "state"))
def train(params, state, tx, graphdef, format, text, keys):
    """One optimizer step per key; returns parameters, state and the training losses."""

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(batch_loss)(params, graphdef, format, text, key)
        updates, state = tx.update(grads, state, params, grid_scale=grid_scale(params, format))
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), keys)
    return params, state, losses


@functools.partial(jax.jit, static_argnames=("graphdef", "format"))
def evaluate(params, graphdef, format, text):
    """Mean loss of the same random batches at every call."""
    keys = jax.random.split(jax.random.key(0), VALIDATION_BATCHES)
    return jax.lax.map(lambda key: batch_loss(params, graphdef, format, text, key), keys).mean()


class Run(NamedTuple):
    """What one training leaves behind."""

    train_loss: np.ndarray  # [steps], nats per character
    validation_loss: np.ndarray  # [steps / STEPS_PER_CALL], nats per character
    moved: np.ndarray  # [matmul weights], whether the quantized weight is another one than at the start
    ulp_position: np.ndarray  # [matmul weights], signed ULPs moved since the start
    seconds_per_step: float


def run(name, tx, format, texts, vocabulary, steps, seed) -> Run:
    """Trains from the weights and with the batches of a seed."""
    graphdef, params = nnx.split(GPT(vocabulary, rngs=nnx.Rngs(seed)), nnx.Param)
    initial, state = grid_leaves(quantize(params, format)), tx.init(params)
    train_loss, validation_loss, seconds = [], [], []
    with tqdm(total=steps, desc=f"{name}, seed {seed}", unit="step") as bar:
        for keys in jax.random.split(jax.random.key(seed), (steps // STEPS_PER_CALL, STEPS_PER_CALL)):
            start = time.perf_counter()
            params, state, losses = train(params, state, tx, graphdef, format, texts["train"], keys)
            train_loss.extend(np.asarray(losses))
            seconds.append(time.perf_counter() - start)
            validation_loss.append(float(evaluate(params, graphdef, format, texts["validation"])))
            bar.set_postfix(validation_loss=f"{validation_loss[-1]:.3f}", refresh=False)
            bar.update(STEPS_PER_CALL)
    return Run(
        np.asarray(train_loss),
        np.asarray(validation_loss),
        grid_leaves(quantize(params, format)) != initial,
        grid_leaves(optax.tree.get(state, "ulp_position")),
        float(np.median(seconds) / STEPS_PER_CALL),
    )
