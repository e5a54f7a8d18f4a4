"""All tasks of the studies: language models, and what is no language model."""

import functools

import jax
import jax.numpy as jnp
import language
import numpy as np
import optax
from language import rms_norm
from sklearn import datasets
from training import Task


def normal(key: jax.Array, *shape: int) -> jax.Array:
    """Initial weights: the variance of the output is that of the input."""
    return jax.random.normal(key, shape) * np.prod(shape[:-1]) ** -0.5


# The next character from the last twelve, without attention.

WINDOW, EMBEDDING, WIDTH, HIDDEN, BATCH = 12, 16, 96, 192, 64


def mlp_start(key, data):
    keys = jax.random.split(key, 7)
    return {
        "character": 0.3 * jax.random.normal(keys[0], (language.VOCABULARY, EMBEDDING)),
        "in": normal(keys[1], WINDOW * EMBEDDING, WIDTH),
        "up": (normal(keys[2], WIDTH, HIDDEN), normal(keys[3], WIDTH, HIDDEN)),
        "down": (normal(keys[4], HIDDEN, WIDTH), normal(keys[5], HIDDEN, WIDTH)),
        "head": normal(keys[6], WIDTH, language.VOCABULARY),
        "biases": (jnp.zeros(HIDDEN), jnp.zeros(HIDDEN)),
        "gains": (jnp.ones(WIDTH), jnp.ones(WIDTH), jnp.ones(WIDTH)),
    }, data


def mlp_loss_of(params, windows):
    one_hot = jax.nn.one_hot(windows, language.VOCABULARY)
    x = (one_hot[:, :-1] @ params["character"]).reshape(len(windows), -1) @ params["in"]
    for up, down, bias, gain in zip(params["up"], params["down"], params["biases"], params["gains"][:2], strict=True):
        x = x + jax.nn.gelu(rms_norm(x, gain) @ up + bias) @ down
    return optax.softmax_cross_entropy(rms_norm(x, params["gains"][2]) @ params["head"], one_hot[:, -1]).mean()


def mlp_loss(params, data, key):
    places = jax.random.randint(key, (BATCH, 1), 0, data[0].size - WINDOW)
    return mlp_loss_of(params, data[0][places + jnp.arange(WINDOW + 1)])


def mlp_validation(params, data):
    starts = np.linspace(0, data[1].size - WINDOW - 1, 8192).astype(int)
    return mlp_loss_of(params, data[1][starts[:, None] + np.arange(WINDOW + 1)])


# Digits, shifted and noisy, because plain ones are learnt by heart: the loss would measure early stopping.


@functools.cache
def digits() -> tuple[jax.Array, ...]:
    """Images and labels of 1347 digits to train, and of 450 to validate."""
    bunch = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images, labels = np.float32(bunch.images[order] / 8 - 1), np.int32(bunch.target[order])
    return jnp.asarray(images[450:]), jnp.asarray(labels[450:]), jnp.asarray(images[:450]), jnp.asarray(labels[:450])


def digits_start(key, data):
    keys = jax.random.split(key, 3)
    return {
        "kernels": (normal(keys[0], 64, 64), normal(keys[1], 64, 64), normal(keys[2], 64, 10)),
        "biases": (jnp.zeros(64), jnp.zeros(64), jnp.zeros(10)),
    }, data


def digits_loss_of(params, images, labels):
    (k0, k1, k2), (b0, b1, b2) = params["kernels"], params["biases"]
    x = jax.nn.relu(jax.nn.relu(images.reshape(len(images), 64) @ k0 + b0) @ k1 + b1)
    return optax.softmax_cross_entropy_with_integer_labels(x @ k2 + b2, labels).mean()


def digits_loss(params, data, key):
    pick, shift, noise = jax.random.split(key, 3)
    chosen = jax.random.randint(pick, (64,), 0, len(data[1]))
    images = jnp.roll(data[0][chosen], jax.random.randint(shift, (2,), -1, 2), (1, 2))
    return digits_loss_of(params, images + 0.3 * jax.random.normal(noise, images.shape), data[1][chosen])


def digits_validation(params, data):
    return digits_loss_of(params, data[2], data[3])


# A network learns another one from noisy labels.

INPUTS, TEACHER, STUDENT, OUTPUTS = 64, 64, 128, 16


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
    x, teacher = jax.random.normal(inputs, (1024, INPUTS)), tanh_network(teacher, TEACHER)
    return tanh_network(student, STUDENT), (teacher, x, tanh_forward(teacher, x))


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


# A GPT adds numbers of four digits: "1234+5678=6912;", the last digit first.

ADDITION = language.GPT(32, 2, batch=64, context=15)


def addition_start(key, data):
    return language.start(ADDITION, key, data)


def addition_loss_of(params, key, number):
    a, b = jax.random.randint(key, (2, number, 1), 0, 10_000)
    places = 10 ** jnp.arange(5)
    digit = lambda n: ord("0") - 31 + n // places % 10  # noqa: E731
    sign = lambda character: jnp.full((number, 1), ord(character) - 31)  # noqa: E731
    text = [digit(a)[:, :4], sign("+"), digit(b)[:, :4], sign("="), digit(a + b), sign(";")]
    windows = jnp.concatenate(text, axis=1)
    return language.loss_of(ADDITION, params, windows, first=9)


def addition_loss(params, data, key):
    return addition_loss_of(params, key, ADDITION.batch)


def addition_validation(params, data):
    return addition_loss_of(params, jax.random.key(10**6), 1024)


TASKS = {task.name: task for task in (*language.SIZES.values(), *language.OTHERS)} | {
    task.name: task
    for task in (
        Task("character MLP", language.text, mlp_start, mlp_loss, mlp_validation, -14, select=2),
        Task("digits", digits, digits_start, digits_loss, digits_validation, -13),
        Task("teacher and student", tuple, teacher_start, teacher_loss, teacher_validation, -12),
        Task("addition", tuple, addition_start, addition_loss, addition_validation, -13, steps=4000),
    )
}
