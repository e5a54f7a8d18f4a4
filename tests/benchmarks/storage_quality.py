"""How far training with weights stored on an 8-bit grid is from float32 AdamW, and from float32 master weights.

    python tests/benchmarks/storage_quality.py            # everything; two hours on two cores
    python tests/benchmarks/storage_quality.py --quick    # three arms of two tiny tasks, in a temporary file
    python tests/benchmarks/storage_quality.py --report   # the tables of what is there
    python tests/benchmarks/storage_quality.py --seeds 12 --tasks gpt_tuned mlp_lm_tuned gpt_small_batch mlp_small_batch

The last one, 40 minutes, compares the recipes of two bytes with their rivals, on language models whose schedule, b1 and
b2 are tuned for AdamW.

An arm is a way to store the weights (float32, float32 master weights that the forward pass rounds to the grid, int8
without a master copy, int16 with 8 fraction bits), their format, and the moments of AdamW. The momentum of the arms
with feedback has one byte, whatever the second moment has; a factored one has means over rows and columns. On every
task each arm takes its own best learning rate of a grid shared by all arms, chosen with two seeds, on tuned tasks with
four; then fresh seeds, which give initial weights, data and random bits, compare arms in pairs. The matrices are
stored, embeddings included; biases and norms are float32. Every run is a line of the output, and a restart skips those
that are there. Needs `pip install -e ".[benchmarks]"`.
"""

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import functools
import json
import lzma
import multiprocessing
import os
import pathlib
import pydoc_data.topics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special
from sklearn import datasets
from tqdm import tqdm

import altgrad_jax as ag
from altgrad_jax.factored import scale_by_factored_rms

RESULTS = pathlib.Path(__file__).parent / "results" / "storage_quality.jsonl"
FORMATS = ("e4m3fn", "e3m4", "e5m2")
WEIGHT_DECAY, B1, B2, EPS = 0.01, 0.9, 0.999, 1e-8
MIN_SIZE = 256  # All matrices have their moments compressed, and no bias.
WARM_UP = 0.1
SELECTION_SEEDS = (1000, 1001, 1002, 1003)
HEADLINE_SEEDS, ORDINARY_SEEDS, ROBUSTNESS_SEEDS = 24, 8, 12
# Role of a run: multiple of the arm's best learning rate, and what differs from the task.
VARIANTS = {
    "half the rate": (1 / 2, {}),
    "a sixth of the rate": (1 / 6, {}),
    "cosine to 0.1": (1.0, {"end": 0.1}),
    "b2 = 0.95": (1.0, {"b2": 0.95}),
}
TUNED_VARIANTS = VARIANTS | {"b1 = 0.9": (1.0, {"b1": 0.9})}


# Arms


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to store the weights and the moments."""

    # adamw, laprop, laprop_plain, rmsprop, master, nearest, stochastic, feedback, feedback_hidden or fraction8; with a
    # factored second moment also feedback8, and stored and stored8 without a momentum.
    storage: str
    moments: str  # float32, 8bit or factored
    format: str | None = None  # Without the "float8_"; None for float32 weights.
    scale: str | None = "row"  # One scale per row, column or tensor.

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.storage, self.format, self.moments, self.scale)))

    @property
    def headline(self) -> bool:
        """Whether the arm is one of those that conclusions rest on, with more seeds."""
        if self.moments == "factored":
            return True
        if not self.on_grid:
            return self.moments == "float32"
        return (self.feedback or self.storage == "fraction8") and self.moments == "8bit" and self.scale == "row"

    @property
    def robustness(self) -> bool:
        """Whether the arm is trained with other hyperparameters too."""
        if self.moments == "factored":
            return self in (TWIN, DEFAULT)
        one_of_many = (self.storage == "laprop" and self.format) or self.storage == "feedback_hidden"
        return self.headline and self.format != "e5m2" and not one_of_many

    @property
    def feedback(self) -> bool:
        return self.storage.startswith("feedback")

    @property
    def on_grid(self) -> bool:
        """Whether there is no float32 copy of the weights."""
        return self.feedback or self.storage in ("nearest", "stochastic", "fraction8", "stored", "stored8")

    @property
    def twin(self) -> "Arm | None":
        """The float32 arm of the same second moment and order."""
        if not (self.on_grid and self.moments == "factored"):
            return None
        return TWIN if self.feedback else TWIN_PLAIN

    def store(self, params: optax.Params) -> optax.Params:
        """The parameters as this arm keeps them."""
        if not self.on_grid:
            return params
        bits = 8 if self.storage.endswith("8") else 0
        stored = to_grid(params, self.format, self.scale, bits)
        if self.storage != "feedback_hidden":
            return stored
        outer = ("character", "place", "head")  # Embeddings and head in float32.
        return {name: params[name] if name in outer else leaf for name, leaf in stored.items()}

    def values(self, stored: optax.Params) -> optax.Params:
        """The weights of the forward pass. Their gradient is that of the stored ones: it passes straight through."""
        return ag.from_grid(stored if self.on_grid or self.format is None else to_grid(stored, self.format))

    def optimizer(
        self, learning_rate: Callable, b1: float, b2: jax.Array, seed: jax.Array
    ) -> optax.GradientTransformation:
        if self.moments == "factored" and self.on_grid:
            return ag.grid_adamw(learning_rate, b1 * self.feedback, b2, EPS, WEIGHT_DECAY, seed=seed)
        if self.feedback or self.storage in ("laprop", "laprop_plain", "rmsprop"):
            # AdamW in LaProp order, because the momentum that carries the rounding error follows the normalisation.
            whole = optax.scale_by_rms(b2, EPS, eps_in_sqrt=False, bias_correction=True)
            inner = optax.chain(
                scale_by_factored_rms(b2, EPS) if self.moments == "factored" else whole,
                optax.add_decayed_weights(WEIGHT_DECAY),
                optax.scale_by_learning_rate(learning_rate),
            )
            if self.storage == "rmsprop":
                return inner
            if not self.feedback:
                return optax.chain(inner, optax.ema(b1, debias=self.storage == "laprop"))
            tx = ag.on_grid(inner, momentum=b1, seed=seed)
        else:
            tx = optax.adamw(learning_rate, b1, b2, EPS, weight_decay=WEIGHT_DECAY)
            if self.on_grid:
                tx = ag.on_grid(tx, rounding="nearest" if self.storage == "nearest" else "stochastic", seed=seed)
        return ag.compress_state(tx, seed=seed, min_size=MIN_SIZE) if self.moments == "8bit" else tx


def to_grid(params: optax.Params, format: str, scale: str = "row", fraction_bits: int = 0) -> optax.Params:
    """`ag.to_grid` with scales that leave a factor of two of headroom per row, column or tensor."""
    format = f"float8_{format}" if format.startswith("e") else format
    shared = {"row": -1, "column": -2, "tensor": None}[scale]
    if scale == "row":
        return ag.to_grid(params, format, fraction_bits=fraction_bits)
    scales = jax.tree.map(lambda w: 2 * ag.power_of_two_scale(w, format, shared) if w.ndim > 1 else 1.0, params)
    stored = ag.to_grid(params, format, fraction_bits=fraction_bits, scale=scales)
    if scale == "tensor":
        # to_grid repeats a scale for every row, and on_grid would grow each of them by itself.
        def one(q):
            return dataclasses.replace(q, exponent=q.exponent[(slice(1),) * q.ndim]) if stored_on_grid(q) else q

        stored = jax.tree.map(one, stored, is_leaf=stored_on_grid)
    return stored


def stored_on_grid(leaf: Any) -> bool:
    return isinstance(leaf, ag.GridArray)


ADAMW, LAPROP, LAPROP_PLAIN, RMSPROP = (
    Arm(storage, "float32", scale=None) for storage in ("adamw", "laprop", "laprop_plain", "rmsprop")
)
# The default of the library, and its float32 twins with and without a momentum.
DEFAULT, TWIN, TWIN_PLAIN = (
    Arm("feedback", "factored", "e3m4"),
    Arm("laprop", "factored", scale=None),
    Arm("rmsprop", "factored", scale=None),
)
ARMS = sorted(
    # laprop_plain is feedback with float32 weights, laprop the same with a bias correction, rmsprop without a momentum.
    [ADAMW, Arm("adamw", "8bit", scale=None), LAPROP, LAPROP_PLAIN, RMSPROP]
    + [
        Arm(storage, moments, format)
        for format in FORMATS
        for storage in ("feedback", "fraction8", "master", "stochastic", "nearest")
        for moments in ("8bit", "float32")
    ],
    key=lambda arm: (not arm.robustness, not arm.headline),  # What an interrupted run should have.
)
# Only for language models: other ways of feedback, and master weights whose optimizer has the order that feedback has.
LANGUAGE_ARMS = (
    [Arm("feedback", "float32", "e4m3fn", scale) for scale in ("tensor", "column")]
    + [Arm("feedback_hidden", "8bit", "e4m3fn")]
    + [Arm("laprop", "float32", format) for format in FORMATS]
)
# Of the tuned tasks: bytes per weight fall from 12 to 1.
TUNED_ARMS = [
    *(ADAMW, LAPROP, TWIN, TWIN_PLAIN, DEFAULT),
    *(Arm("feedback", "factored", format) for format in ("E2M5", "E0M7", "e4m3fn")),
    *(Arm("feedback8", "factored", format) for format in ("e3m4", "e4m3fn")),
    *(Arm("stored8", "factored", format) for format in ("e3m4", "e4m3fn")),
    Arm("stored", "factored", "bfloat16"),
    *(Arm("stored", "factored", format) for format in ("e3m4", "E0M7")),
]


# Tasks


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data and its loss."""

    name: str
    data: Callable[[], Any]  # What all seeds share.
    start: Callable[[jax.Array, Any], tuple[optax.Params, Any]]  # (key, data) -> parameters, problem
    loss: Callable[[optax.Params, Any, jax.Array], jax.Array]  # (parameters, problem, key of the batch)
    validation: Callable[[optax.Params, Any], jax.Array]  # (parameters, problem)
    steps: int
    learning_rate: float  # The middle of the grid of learning rates.
    seconds: float  # Of a run, and of compiling an arm: measured on one core, for the estimate of the time left.
    compile_seconds: float
    language_model: bool = False  # Has also the arms of other scales and the robustness runs.
    tuned: bool = False  # Has other arms instead.
    b1: float = B1
    b2: float = B2

    @property
    def arms(self) -> list[Arm]:
        if self.tuned:
            return TUNED_ARMS if self.language_model else [ADAMW, TWIN, DEFAULT]
        return ARMS + LANGUAGE_ARMS * self.language_model

    @property
    def selection_seeds(self) -> tuple[int, ...]:
        return SELECTION_SEEDS if self.tuned else SELECTION_SEEDS[:2]

    @property
    def variants(self) -> dict[str, tuple[float, dict[str, float]]]:
        """Other hyperparameters for the arms of interest."""
        return (TUNED_VARIANTS if self.tuned else VARIANTS) if self.language_model else {}


def normal(key: jax.Array, *shape: int, std: float | None = None) -> jax.Array:
    """Initial weights; by default the variance of the output is that of the input."""
    return jax.random.normal(key, shape) * (np.prod(shape[:-1]) ** -0.5 if std is None else std)


def text() -> tuple[jax.Array, jax.Array]:
    """CPython's help as indices of characters: 90 % to train, 10 % to validate."""
    topics = pydoc_data.topics.topics
    joined = "\n".join(topics[name] for name in sorted(topics))
    indices = np.unique(list(joined), return_inverse=True)[1].astype(np.int32)
    return tuple(jnp.asarray(part) for part in np.split(indices, [len(joined) - len(joined) // 10]))


VOCABULARY = len(set("".join(pydoc_data.topics.topics.values())) | {"\n"})
WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 48, 2, 3, 32, 16
VALIDATION_WINDOWS = 512


def gpt_start(key, data):
    keys = iter(jax.random.split(key, 3 + 4 * LAYERS))
    params = {
        "character": normal(next(keys), VOCABULARY, WIDTH, std=0.1),
        "place": normal(next(keys), CONTEXT, WIDTH, std=0.1),
        "head": normal(next(keys), WIDTH, VOCABULARY),
        "gain": jnp.ones(WIDTH),
    }
    for i in range(LAYERS):
        params[f"block{i}"] = {
            "attention": normal(next(keys), WIDTH, 3 * WIDTH),
            "mix": normal(next(keys), WIDTH, WIDTH),
            "up": normal(next(keys), WIDTH, 4 * WIDTH),
            "down": normal(next(keys), 4 * WIDTH, WIDTH),
            "gains": (jnp.ones(WIDTH), jnp.ones(WIDTH)),
            "bias": jnp.zeros(4 * WIDTH),
        }
    return params, data


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    return gain * x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def gpt_loss_of(params, windows):
    characters = windows[:, :-1]
    x = params["character"][characters] + params["place"]
    for i in range(LAYERS):
        block = params[f"block{i}"]
        qkv = (rms_norm(x, block["gains"][0]) @ block["attention"]).reshape(*x.shape[:2], 3, HEADS, -1)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        x = x + attended.reshape(x.shape) @ block["mix"]
        x = x + jax.nn.gelu(rms_norm(x, block["gains"][1]) @ block["up"] + block["bias"]) @ block["down"]
    logits = rms_norm(x, params["gain"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def random_windows(key, characters, batch, length):
    return characters[jax.random.randint(key, (batch, 1), 0, characters.size - length) + jnp.arange(length)]


def spread_windows(characters, windows, length):
    return characters[np.linspace(0, characters.size - length - 1, windows).astype(int)[:, None] + np.arange(length)]


def gpt_loss(params, data, key, batch=BATCH):
    return gpt_loss_of(params, random_windows(key, data[0], batch, CONTEXT + 1))


small_batch_loss = functools.partial(gpt_loss, batch=BATCH // 4)


def gpt_validation(params, data):
    windows = spread_windows(data[1], VALIDATION_WINDOWS, CONTEXT + 1)
    return jax.lax.map(lambda batch: gpt_loss_of(params, batch), windows.reshape(-1, 32, CONTEXT + 1)).mean()


MLP_WINDOW, MLP_EMBEDDING, MLP_WIDTH, MLP_HIDDEN, MLP_BATCH = 12, 16, 96, 192, 64


def mlp_lm_start(key, data):
    keys = jax.random.split(key, 7)
    return {
        "character": normal(keys[0], VOCABULARY, MLP_EMBEDDING, std=0.3),
        "in": normal(keys[1], MLP_WINDOW * MLP_EMBEDDING, MLP_WIDTH),
        "up0": normal(keys[2], MLP_WIDTH, MLP_HIDDEN),
        "up1": normal(keys[3], MLP_WIDTH, MLP_HIDDEN),
        "down0": normal(keys[4], MLP_HIDDEN, MLP_WIDTH),
        "down1": normal(keys[5], MLP_HIDDEN, MLP_WIDTH),
        "head": normal(keys[6], MLP_WIDTH, VOCABULARY),
        "biases": (jnp.zeros(MLP_HIDDEN), jnp.zeros(MLP_HIDDEN)),
        "gains": (jnp.ones(MLP_WIDTH), jnp.ones(MLP_WIDTH), jnp.ones(MLP_WIDTH)),
    }, data


def mlp_lm_loss_of(params, windows):
    x = params["character"][windows[:, :-1]].reshape(len(windows), -1) @ params["in"]
    for i in range(2):
        hidden = jax.nn.gelu(rms_norm(x, params["gains"][i]) @ params[f"up{i}"] + params["biases"][i])
        x = x + hidden @ params[f"down{i}"]
    logits = rms_norm(x, params["gains"][2]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]).mean()


def mlp_lm_loss(params, data, key, batch=MLP_BATCH):
    return mlp_lm_loss_of(params, random_windows(key, data[0], batch, MLP_WINDOW + 1))


mlp_small_batch_loss = functools.partial(mlp_lm_loss, batch=MLP_BATCH // 4)


def mlp_lm_validation(params, data):
    return mlp_lm_loss_of(params, spread_windows(data[1], 8 * VALIDATION_WINDOWS, MLP_WINDOW + 1))


DIGITS_BATCH, PIXEL_NOISE = 64, 0.3


def digits() -> tuple[jax.Array, ...]:
    """Images and labels of 1347 digits to train, and of 450 to validate."""
    bunch = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images, labels = np.float32(bunch.images[order] / 8 - 1), np.int32(bunch.target[order])
    return jnp.asarray(images[450:]), jnp.asarray(labels[450:]), jnp.asarray(images[:450]), jnp.asarray(labels[:450])


def digits_loss(logits_of, params, data, key):
    """Of shifted and noisy images, because plain ones are memorized: the best loss would measure early stopping."""
    pick, shift, noise = jax.random.split(key, 3)
    chosen = jax.random.randint(pick, (DIGITS_BATCH,), 0, len(data[1]))
    images = jnp.roll(data[0][chosen], jax.random.randint(shift, (2,), -1, 2), (1, 2))
    images += PIXEL_NOISE * jax.random.normal(noise, images.shape)
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, images), data[1][chosen]).mean()


def digits_validation(logits_of, params, data):
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, data[2]), data[3]).mean()


def digits_mlp_start(key, data):
    keys = jax.random.split(key, 3)
    return {
        "kernels": (normal(keys[0], 64, 64), normal(keys[1], 64, 64), normal(keys[2], 64, 10)),
        "biases": (jnp.zeros(64), jnp.zeros(64), jnp.zeros(10)),
    }, data


def digits_mlp_logits(params, images):
    (k0, k1, k2), (b0, b1, b2) = params["kernels"], params["biases"]
    x = jax.nn.relu(images.reshape(len(images), 64) @ k0 + b0)
    return jax.nn.relu(x @ k1 + b1) @ k2 + b2


def digits_conv_start(key, data):
    keys = jax.random.split(key, 3)
    return {
        "kernels": (normal(keys[0], 3, 3, 1, 16), normal(keys[1], 3, 3, 16, 32), normal(keys[2], 128, 10)),
        "biases": (jnp.zeros(16), jnp.zeros(32), jnp.zeros(10)),
    }, data


def digits_conv_logits(params, images):
    x = images[..., None]
    for kernel, bias in zip(params["kernels"][:2], params["biases"][:2], strict=True):
        x = jax.nn.relu(strided_convolution(x, kernel) + bias)
    return x.reshape(len(x), -1) @ params["kernels"][2] + params["biases"][2]


def strided_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3 x 3, stride 2, as a matmul: XLA's own convolutions, backward above all, are several times slower on CPUs."""
    size, padded = x.shape[1], jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + size : 2, j : j + size : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


INPUTS, TEACHER_HIDDEN, STUDENT_HIDDEN, OUTPUTS = 64, 64, 128, 16


def tanh_network(key, hidden):
    keys = jax.random.split(key, 3)
    return {
        "in": 1.5 * normal(keys[0], INPUTS, hidden),
        "out": normal(keys[1], hidden, OUTPUTS),
        "biases": (0.3 * jax.random.normal(keys[2], (hidden,)), jnp.zeros(OUTPUTS)),
    }


def tanh_forward(params, x):
    return jnp.tanh(x @ params["in"] + params["biases"][0]) @ params["out"] + params["biases"][1]


def teacher_start(key, data):
    student, teacher, inputs = jax.random.split(key, 3)
    x = jax.random.normal(inputs, (1024, INPUTS))
    teacher = tanh_network(teacher, TEACHER_HIDDEN)
    return tanh_network(student, STUDENT_HIDDEN), (teacher, x, tanh_forward(teacher, x))


def teacher_loss(params, problem, key):
    """With labels whose noise has half of the standard deviation of the targets."""
    teacher, _, targets = problem
    inputs, noise = jax.random.split(key)
    x = jax.random.normal(inputs, (64, INPUTS))
    y = tanh_forward(teacher, x) + 0.5 * jnp.std(targets) * jax.random.normal(noise, (64, OUTPUTS))
    return jnp.mean((tanh_forward(params, x) - y) ** 2) / jnp.var(targets)


def teacher_validation(params, problem):
    """In thousandths of the variance of the targets, without noise."""
    _, x, targets = problem
    return 1000 * jnp.mean((tanh_forward(params, x) - targets) ** 2) / jnp.var(targets)


def quadratic_start(key, data):
    """Curvatures over three decades and a minimum that is not on the grid."""
    initial, minimum, curvature = jax.random.split(key, 3)
    h = 10.0 ** jax.random.uniform(curvature, (64, 64), minval=-3.0, maxval=0.0)
    return {"w": normal(initial, 64, 64)}, (h, normal(minimum, 64, 64))


def quadratic_loss(params, problem, key):
    h, minimum = problem
    noise = 0.01 * jnp.sqrt(h) * jax.random.normal(key, h.shape)  # Of the gradient.
    return jnp.sum(h * (params["w"] - minimum) ** 2 / 2 + noise * params["w"])


def quadratic_validation(params, problem):
    """In thousandths of the loss of w = 0."""
    h, minimum = problem
    return 1000 * jnp.sum(h * (params["w"] - minimum) ** 2) / jnp.sum(h * minimum**2)


def quadratic_floor(format: str, seed: int) -> float:
    """Loss of the numbers of the format that are nearest to the minimum."""
    _, (h, minimum) = quadratic_start(jax.random.key(seed), None)
    return float(quadratic_validation(ag.from_grid(to_grid({"w": minimum}, format)), (h, minimum)))


def digits_task(name, start, logits_of, *rest):
    loss, validation = (functools.partial(f, logits_of) for f in (digits_loss, digits_validation))
    return Task(name, digits, start, loss, validation, *rest)


TASKS = {
    task.name: task
    for task in (
        Task("gpt", text, gpt_start, gpt_loss, gpt_validation, 500, 8e-3, 2.5, 11.0, True),
        Task("mlp_lm", text, mlp_lm_start, mlp_lm_loss, mlp_lm_validation, 1000, 8e-3, 1.0, 7.0, True),
        digits_task("digits_conv", digits_conv_start, digits_conv_logits, 1000, 1.6e-2, 0.3, 8.0),
        digits_task("digits_mlp", digits_mlp_start, digits_mlp_logits, 2000, 8e-3, 0.4, 7.0),
        Task("teacher_student", tuple, teacher_start, teacher_loss, teacher_validation, 2000, 1.6e-2, 0.3, 5.0),
        Task("quadratic", tuple, quadratic_start, quadratic_loss, quadratic_validation, 2000, 2e-3, 0.1, 2.0),
        # A b1 of 0.9 costs AdamW 0.02 and 0.01 nats: the last variant.
        Task("gpt_tuned", text, gpt_start, gpt_loss, gpt_validation, 1500, 8e-3, 6.0, 11.0, True, True, 0.8, 0.98),
        Task("mlp_lm_tuned", text, mlp_lm_start, mlp_lm_loss, mlp_lm_validation, 2000, 8e-3, 2.0, 7.0, True, True, 0.8),
        # A quarter of the batch, at the usual b1 and b2, three arms.
        Task("gpt_small_batch", text, gpt_start, small_batch_loss, gpt_validation, 1500, 4e-3, 2.5, 9.0, tuned=True),
        Task(
            "mlp_small_batch",
            text,
            mlp_lm_start,
            mlp_small_batch_loss,
            mlp_lm_validation,
            2000,
            4e-3,
            1.0,
            7.0,
            tuned=True,
        ),
    )
}


# Runs


def trainer(task: Task, arm: Arm) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function of (data, learning rate, b1, b2, end, seed), compiled per b1, to validation loss and stall rate."""
    warm_up = max(1, round(WARM_UP * task.steps))

    def run(data, learning_rate, b1, b2, end, seed):
        def schedule(step):
            falling = end + (1 - end) * (1 + jnp.cos(jnp.pi * (step - warm_up) / (task.steps - warm_up))) / 2
            return learning_rate * jnp.where(step < warm_up, step / warm_up, falling)

        key, batches = jax.random.split(jax.random.key(seed))
        params, problem = task.start(key, data)
        tx = arm.optimizer(schedule, b1, b2, seed)
        params = arm.store(params)

        def step(carry, i):
            params, state, stalls = carry
            gradient = jax.grad(task.loss)(arm.values(params), problem, jax.random.fold_in(batches, i))
            updates, state = tx.update(gradient, state, params)
            look = (i >= 0.9 * task.steps) & (i % 8 == 0)  # At few steps: it costs a pass over the weights.
            counted = jax.lax.cond(look, stalled, lambda *_: jnp.zeros(2), updates, params, gradient)
            return (optax.apply_updates(params, updates), state, stalls + counted), None

        carry = params, tx.init(params), jnp.zeros(2)
        (params, _, stalls), _ = jax.lax.scan(step, carry, jnp.arange(task.steps))
        return task.validation(arm.values(params), problem), stalls[0] / stalls[1]

    return jax.jit(run, static_argnums=2)


def stalled(updates: optax.Updates, params: optax.Params, gradient: optax.Updates) -> jax.Array:
    """How many stored weights stay where they are, of those that are meant to move, and how many these are."""
    counts, flat = jnp.zeros(2), functools.partial(jax.tree.leaves, is_leaf=stored_on_grid)
    for q, moved, g in zip(flat(params), flat(ag.signed_steps(updates, params)), flat(gradient), strict=True):
        if stored_on_grid(q):
            meant = (q.index != 0) | (g != 0)  # Weight decay moves all others.
            counts += jnp.stack([jnp.sum(meant & (moved == 0)), jnp.sum(meant)])
    return counts


def bytes_per_weight(task: Task, arm: Arm) -> float:
    """Bytes of parameters and optimizer state over the number of weights that can be stored on a grid."""

    def resident(seed):
        params, _ = task.start(jax.random.key(seed), task.data())
        weights = sum(w.size for w in jax.tree.leaves(params) if w.ndim > 1)
        params = arm.store(params)
        return (params, arm.optimizer(lambda step: 1e-3, task.b1, B2, seed).init(params)), jnp.zeros(weights)

    kept, weights = jax.eval_shape(resident, jnp.uint32(0))
    return round(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) / weights.size, 4)


def study(task: Task, arm: Arm, most_seeds: int, known: dict[str, dict], emit: Callable[[dict], None]) -> None:
    """Selects the learning rate of an arm and trains it with all seeds and variants, except known runs."""

    @functools.cache
    def compiled():
        return trainer(task, arm), task.data(), bytes_per_weight(task, arm)

    def loss(role, learning_rate, seed, **changed):
        hyperparameters = {"b1": task.b1, "b2": task.b2, "end": 0.0} | changed
        run = specification(task, arm, role, learning_rate, hyperparameters, seed)
        if identity(run) not in known:
            train, data, size = compiled()
            start = time.perf_counter()
            b1, b2, end = hyperparameters.values()
            numbers = jnp.float32(learning_rate), b1, jnp.float32(b2), jnp.float32(end), jnp.uint32(seed)
            reached, stall = (finite(float(x)) for x in train(data, *numbers))
            seconds = round(time.perf_counter() - start, 3)
            run |= {"loss": reached, "stall": stall, "bytes_per_weight": size, "seconds": seconds}
            known[identity(run)] = run
            emit(run)
        reached = known[identity(run)]["loss"]
        return np.inf if reached is None else reached

    def mean_loss(exponent):
        return np.mean([loss("select", task.learning_rate * 2.0**exponent, seed) for seed in task.selection_seeds])

    best = task.learning_rate * 2.0 ** lowest(mean_loss)
    for seed in range(most_seeds if arm.headline else min(most_seeds, ORDINARY_SEEDS)):
        loss("evaluate", best, seed)
    if arm.robustness:
        for role, (factor, changed) in task.variants.items():
            for seed in range(min(most_seeds, ROBUSTNESS_SEEDS)):
                loss(role, factor * best, seed, **changed)


def specification(task, arm, role, learning_rate, hyperparameters, seed) -> dict:
    """The description of a run, without its measurements."""
    names = {"task": task.name, "steps": task.steps, **dataclasses.asdict(arm), "role": role}
    # Lines from before b1 was tuned do not name it.
    named = {name: value for name, value in hyperparameters.items() if (name, value) != ("b1", B1)}
    return names | {"learning_rate": learning_rate, **named, "seed": seed, "jax": jax.__version__}


def identity(run: dict) -> str:
    measured = ("loss", "stall", "bytes_per_weight", "seconds")
    return json.dumps({name: value for name, value in run.items() if name not in measured})


def arm_of(run: dict) -> Arm:
    return Arm(**{field.name: run[field.name] for field in dataclasses.fields(Arm)})


def finite(x: float) -> float | None:
    """JSON has no NaN: None for a run that diverged, or for a share of nothing."""
    return x if np.isfinite(x) else None


def lowest(f: Callable[[int], float], limit: int = 8) -> int:
    """The integer with the lowest value, between two higher ones, searched downhill from -1, 0 and 1."""
    values = {k: f(k) for k in (-1, 0, 1)}
    while True:
        best = min(values, key=values.get)
        further = [k for k in (best - 1, best + 1) if k not in values]
        if not further or abs(best) == limit:
            return best
        values[further[0]] = f(further[0])


def expected_runs(task: Task, arm: Arm, most_seeds: int) -> int:
    """With one extension of the first three learning rates."""
    runs = 4 * len(task.selection_seeds) + (most_seeds if arm.headline else min(most_seeds, ORDINARY_SEEDS))
    return runs + arm.robustness * len(task.variants) * min(most_seeds, ROBUSTNESS_SEEDS)


# Processes


def start_worker(runs: Any, cores: Any) -> None:
    """Gives a worker the queue of the finished runs and one core of its own."""
    global emit
    emit, core = runs.put, cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def work(name: str, steps: int, arm: Arm, most_seeds: int, known: dict[str, dict]) -> None:
    study(dataclasses.replace(TASKS[name], steps=steps), arm, most_seeds, known, emit)


def load(path: pathlib.Path) -> list[dict]:
    """The runs in a file, without a line that a kill cut off."""
    runs, packed = [], path.with_name(path.name + ".xz")  # As the repository keeps the earlier ones.
    text = lzma.decompress(packed.read_bytes()).decode() if packed.exists() else ""
    for line in (text + (path.read_text() if path.exists() else "")).splitlines():
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"left out a broken line of {path}: {line[:40]}...", file=sys.stderr)
    return runs


def run_all(jobs: list[tuple[Task, Arm]], path: pathlib.Path, workers: int, most_seeds: int) -> None:
    """Studies every pair of task and arm, in their order, and appends the runs to the file."""
    known = {(task.name, arm): {} for task, arm in jobs}
    for run in load(path):
        known.get((run["task"], arm_of(run)), {})[identity(run)] = run
    ahead = [max(0, expected_runs(task, arm, most_seeds) - len(known[task.name, arm])) for task, arm in jobs]
    costs = [n * task.seconds + (n > 0) * task.compile_seconds for n, (task, _) in zip(ahead, jobs, strict=True)]
    print(f"about {sum(ahead)} runs, {sum(costs) / workers / 60:.0f} minutes with {workers} workers")

    # In the environment of the workers, before their XLA reads it: one thread each.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_PLATFORMS"] = "cpu"
    context = multiprocessing.get_context("spawn")
    runs, cores = context.SimpleQueue(), context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    for i in range(workers):
        cores.put(available[i % len(available)])
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (runs, cores))
    futures = [pool.submit(work, t.name, t.steps, arm, most_seeds, known[t.name, arm]) for t, arm in jobs]
    with path.open("a") as file, tqdm(total=round(sum(costs)), unit="core s", unit_scale=True, smoothing=0.02) as bar:
        file.write("\n" * cut_off)
        started, finished = set(), False
        try:
            while not finished:
                time.sleep(0.2)
                finished = all(future.done() for future in futures)  # Before the last read: it misses none.
                while not runs.empty():
                    run = runs.get()
                    file.write(json.dumps(run) + "\n")
                    file.flush()
                    task, arm = TASKS[run["task"]], arm_of(run)
                    bar.set_postfix_str(f"{task.name} {arm.name}", refresh=False)
                    seconds = task.seconds + ((task, arm) not in started) * task.compile_seconds
                    bar.total = max(bar.total, bar.n + seconds)
                    bar.update(seconds)
                    started.add((task, arm))
                for future in futures:
                    if future.done():
                        future.result()  # Raises what the worker raised.
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# Report

DESCRIPTION = ["storage", "format", "moments", "scale"]


def report(runs: list[dict]) -> str:
    """Markdown tables: per task the arms at their best learning rate, then the robustness runs."""
    studies = {}  # By task, role and arm, the runs by seed.
    for run in runs:
        studies.setdefault((run["task"], run["role"], arm_of(run)), {})[run["seed"]] = run
    parts = []
    for task in dict.fromkeys(name for name, role, _ in studies if role == "evaluate"):
        arms = sorted((arm for name, role, arm in studies if (name, role) == (task, "evaluate")), key=reading_order)
        own = lambda role, arm, task=task: studies.get((task, role, arm), {})  # noqa: E731
        rows = [[*described(arm), *evaluation(arm, functools.partial(own, "evaluate"))] for arm in arms]
        parts.append(f"## {task}\n\n" + table([*DESCRIPTION, *EVALUATION], rows))
        if task == "quadratic":
            floors = [
                f"{f} {np.mean([quadratic_floor(f, seed) for seed in range(HEADLINE_SEEDS)]):.4f}" for f in FORMATS
            ]
            parts.append(f"Loss of the numbers nearest to the minimum: {', '.join(floors)}.")
        rows = [
            [
                *described(arm),
                *(variant(arm, functools.partial(own, role)) for role in TASKS[task].variants),
            ]
            for arm in arms
            if any(own(role, arm) for role in TASKS[task].variants)
        ]
        if rows:
            parts.append(
                f"### {task}: loss of adamw, and gaps to it, under the same variant\n\nFractions of the rate are those "
                "of each arm's own best one.\n\n" + table([*DESCRIPTION, *TASKS[task].variants], rows)
            )
    return "\n\n".join(parts) + "\n"


GAPS = ["gap to adamw", "gap to laprop", "gap to laprop_plain", "gap to master", "gap to twin"]
EVALUATION = ["learning rate", "loss", *GAPS, "seeds", "stalled", "bytes per weight"]


def evaluation(arm: Arm, own: Callable[[Arm], dict[int, dict]]) -> list[str]:
    """The cells of an arm. The gaps are to float32 AdamW, for feedback also in LaProp order, with and without a bias
    correction, to float32 master weights of its format with float32 moments (for feedback in that order, on language
    models), and to the float32 arm of the same second moment, if that is factored.
    """
    runs = own(arm)
    one, stalls = next(iter(runs.values())), [run["stall"] for run in runs.values() if run["stall"] is not None]
    master, laprop = (Arm(storage, "float32", arm.format) for storage in ("master", "laprop"))
    master = laprop if arm.feedback and own(laprop) else master
    in_order = arm.feedback or arm.storage.startswith("laprop")
    return [
        f"{one['learning_rate']:.4g}",
        loss(runs),
        gap(runs, own(ADAMW)) if arm != ADAMW else "",
        gap(runs, own(LAPROP)) if in_order and arm != LAPROP else "",
        gap(runs, own(LAPROP_PLAIN)) if arm.feedback else "",
        gap(runs, own(master)) if arm != master else "",
        gap(runs, own(arm.twin)) if arm.twin else "",
        str(len(runs)),
        f"{np.mean(stalls):.1%}" if stalls else "",
        f"{one['bytes_per_weight']:.2f}",
    ]


def variant(arm: Arm, own: Callable[[Arm], dict[int, dict]]) -> str:
    """The cell of an arm under a variant."""
    if arm == ADAMW:
        return loss(own(arm))
    return gap(own(arm), own(ADAMW)) + (f" (to its twin {gap(own(arm), own(arm.twin))})" if arm.twin else "")


def loss(runs: dict[int, dict]) -> str:
    losses = [run["loss"] for run in runs.values()]
    diverged = losses.count(None)
    return f"{diverged} of {len(losses)} diverged" if diverged else f"{np.mean(losses):.4f}" if losses else ""


def gap(runs: dict[int, dict], reference: dict[int, dict]) -> str:
    """Mean difference over common seeds, and the half width of its 95 % interval."""
    pairs = [(runs[seed]["loss"], reference[seed]["loss"]) for seed in runs if seed in reference]
    if len(pairs) < 2 or None in sum(pairs, ()):
        return "diverged" if len(pairs) > 1 else ""
    gaps = -np.diff(pairs)
    half = special.stdtrit(len(gaps) - 1, 0.975) * gaps.std(ddof=1) / len(gaps) ** 0.5
    return f"{gaps.mean():+.4f} ± {half:.4f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def described(arm: Arm) -> list[str]:
    return [getattr(arm, name) or "" for name in DESCRIPTION]


def reading_order(arm: Arm) -> tuple:
    storages = "adamw laprop rmsprop master fraction8 feedback8 feedback stored8 stored stochastic nearest"
    return (
        storages.split().index(arm.storage.partition("_")[0]),
        arm.storage,
        (*FORMATS, "E2M5", "E0M7", "bfloat16").index(arm.format or FORMATS[0]),
        arm.moments,
        arm.scale or "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help=f"default: {RESULTS.parent.name}/{RESULTS.name} next to this")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=["*"], help='patterns of names, such as "feedback-e4m3fn-*"')
    parser.add_argument("--seeds", type=int, default=HEADLINE_SEEDS, help="of headline arms; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes of one core each; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="three arms of two tiny tasks, two seeds")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be positive, got {args.seeds}")
    jax.config.update("jax_platforms", "cpu")
    tasks, patterns, most_seeds, out = [TASKS[name] for name in args.tasks], args.arms, args.seeds, RESULTS
    if args.quick:
        tasks = [dataclasses.replace(TASKS[name], steps=100) for name in ("digits_mlp", "quadratic")]
        patterns = ["adamw-float32", "master-e4m3fn-float32-row", "feedback-e4m3fn-8bit-row"]
        most_seeds = min(most_seeds, 2)
        out = pathlib.Path(tempfile.mkdtemp()) / RESULTS.name
    out = args.out or out
    if not args.report:
        jobs = [(t, arm) for t in tasks for arm in t.arms if any(fnmatch.fnmatch(arm.name, p) for p in patterns)]
        if not jobs:
            parser.error(f"no arm has a name like {patterns}")
        # What an interrupted run should have first: the headline arms of the language models.
        jobs.sort(key=lambda job: not (job[0].language_model and job[1].headline))
        run_all(jobs, out, args.workers, most_seeds)
    tables = report(load(out))
    out.with_suffix(".md").write_text(tables)
    print(f"{tables}\n{out}")


if __name__ == "__main__":
    main()
