"""Data sets, models and losses. All weights are in matrices, without biases, so that all of them are on the grid."""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import pydoc_data.topics
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from config import StudyConfig
from flax import linen as nn
from sklearn import datasets

WINDOW = 8  # Characters that the language model sees.
VALIDATION_WINDOWS = 2048
PIXEL_NOISE = 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model, its data and its loss."""

    data: tuple[np.ndarray, ...]  # Inputs and labels to train, inputs and labels to validate.
    model: nn.Module
    batch: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]  # (data, rows [batch]) -> inputs, labels
    examples: int  # How many rows there are.
    cost: float  # Seconds of an arm, for the estimate of the time left.

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def start(self, seed: int) -> optax.Params:
        """Initial weights."""
        return self._init(jax.random.key(int(seed)))

    @functools.cached_property
    def _init(self) -> Callable[[jax.Array], optax.Params]:
        return jax.jit(lambda key: self.model.init(key, jnp.asarray(self.data[2][:1]))["params"])

    def rows(self, seed: int, config: StudyConfig) -> jax.Array:
        """Which examples each step sees, int32 `[steps, batch]`."""
        random = np.random.default_rng(int(seed))
        return jnp.asarray(random.integers(self.examples, size=(config.steps, config.batch_size)), jnp.int32)

    def loss(self, params: optax.Params, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Mean cross-entropy, nats."""
        logits = self.model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def accuracy(self, params: optax.Params, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(self.model.apply({"params": params}, inputs).argmax(-1) == labels)

    def fingerprint(self) -> str:
        """Of the data."""
        digest = hashlib.sha256()
        for part in self.data:
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:16]


class CharMlp(nn.Module):
    """Logits of the next character, `[batch, vocabulary]`, from the last ones, `[batch, WINDOW]`."""

    vocabulary: int

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        dense, norm = functools.partial(nn.Dense, use_bias=False), functools.partial(nn.RMSNorm, use_scale=False)
        x = nn.Embed(self.vocabulary, 16)(characters)
        x = dense(64)(x.reshape(len(x), -1))
        for _ in range(2):
            x = x + dense(64)(nn.gelu(dense(128)(norm()(x))))
        return dense(self.vocabulary)(norm()(x))


class Mlp(nn.Module):
    """Logits `[batch, classes]` of vectors; a constant input stands for the biases."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=-1)
        for _ in range(2):
            x = nn.relu(nn.Dense(64, use_bias=False)(x))
        return nn.Dense(self.classes, use_bias=False)(x)


@functools.cache
def load(name: str) -> Task:
    """The task of a name: "char_lm", "digits", or a file of text or .npz, whose inputs are standardized."""
    if name == "char_lm":
        topics = pydoc_data.topics.topics
        return _text("\n".join(topics[topic] for topic in sorted(topics)))
    if name == "digits":
        digits = datasets.load_digits()
        return _classification(digits.images / 8 - 1, digits.target, _augmented)
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"tasks must be char_lm, digits or a file of text or .npz, got {name!r}, which is no file.")
    if path.suffix != ".npz":
        return _text(path.read_text("utf-8"))
    try:
        with np.load(path) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz file with inputs x and labels y: {error}.") from error
    if not (y.ndim == 1 and x.shape[:1] == y.shape and len(y) >= 10):
        raise ValueError(f"{path} must hold x [n, ...] and y [n], n >= 10, got {x.shape} and {y.shape}.")
    if not (np.issubdtype(y.dtype, np.integer) and y.min() >= 0):
        raise ValueError(f"labels y must be non-negative integers, got {y.dtype} from {y.min()} in {path}.")
    x = x.reshape(len(x), -1).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"inputs x must be finite, got {np.sum(~np.isfinite(x))} that are not in {path}.")
    return _classification((x - x.mean(0)) / np.maximum(x.std(0), 1e-6), y, lambda *rows: rows)


def _text(text: str) -> Task:
    """90 % of the text to train, 10 % to validate."""
    if len(text) < 100 * WINDOW:
        raise ValueError(f"a text must have at least {100 * WINDOW} characters, got {len(text)}.")
    alphabet, characters = np.unique(list(text), return_inverse=True)
    training, validation = np.split(characters.astype(np.int32), [len(text) - len(text) // 10])
    starts = np.linspace(0, len(validation) - WINDOW - 1, VALIDATION_WINDOWS).astype(int)
    windows = validation[starts[:, None] + np.arange(WINDOW + 1)]
    # The training text is both inputs and labels.
    data = training, np.zeros(0, np.int32), windows[:, :-1], windows[:, -1]
    return Task(data, CharMlp(len(alphabet)), _windows, len(training) - WINDOW, 14.0)


def _windows(data, starts):
    windows = data[0][starts[:, None] + jnp.arange(WINDOW + 1)]
    return windows[:, :-1], windows[:, -1]


def _classification(x: np.ndarray, y: np.ndarray, more: Callable) -> Task:
    """Three quarters of the rows to train, one to validate, in an order of their own."""
    order = np.random.default_rng(0).permutation(len(y))
    x, y, held_out = np.float32(x[order]), np.int32(y[order]), len(y) // 4
    training = more(x[held_out:], y[held_out:])
    return Task((*training, x[:held_out], y[:held_out]), Mlp(int(y.max()) + 1), _examples, len(training[1]), 9.0)


def _examples(data, rows):
    return data[0][rows], data[1][rows]


def _augmented(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shifted and noisy images, as plain ones are learnt by heart: the loss would measure early stopping."""
    random, copies = np.random.default_rng(1), []
    for shift in itertools.product((-1, 0, 1), repeat=2):
        copies += [np.roll(images, shift, (1, 2)) + np.float32(PIXEL_NOISE * random.standard_normal(images.shape))]
    return np.concatenate(copies), np.tile(labels, len(copies))
