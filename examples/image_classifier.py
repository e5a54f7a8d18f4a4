"""Trains a convolutional classifier with BatchNorm in two bytes per weight, beside float32 AdamW.

Kernels are stored on the grid. Biases, the scales of BatchNorm, and its running means and variances stay in float32:
`ag.to_grid` takes `params` alone, and `batch_stats` goes through `ag.value_and_grad` as the auxiliary output. The
images are scikit-learn's digits, shifted and noisy.

    $ pip install -e ".[study]" && python examples/image_classifier.py
                    validation loss   accuracy   weights, statistics, state   time per step
    float32 AdamW       0.0716 nats    97.82%                      1.18 MB         14.2 ms
    two bytes           0.0740 nats    98.15%                      0.22 MB         14.7 ms
    picture: out/image_classifier.png

(CPython 3.11, jax 0.10, two CPU cores, two minutes.) The learning rate is AdamW's best of the powers of two. With six
seeds the losses are 0.0796 and 0.0804 nats.
"""

import argparse
import functools
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from sklearn import datasets
from tqdm import tqdm

import altgrad_jax as ag

BATCH, VALIDATION, NOISE = 64, 397, 0.3
EVALUATIONS = 20  # In a run.


class Classifier(nn.Module):
    """Logits, `[batch, 10]`, of images `[batch, 8, 8, 1]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width in (32, 64, 128):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if width > 32 else x
        return nn.Dense(10)(x.reshape(len(x), -1))


class State(TrainState):
    """Parameters, optimizer state, and what BatchNorm has seen."""

    batch_stats: optax.Params


MODEL = Classifier()
# How each arm stores the parameters, and its optimizer.
ARMS = {
    "float32 AdamW": (lambda params: params, lambda rate: optax.adamw(rate, weight_decay=0.01)),
    "two bytes": (ag.to_grid, ag.grid_adamw),
}


@jax.jit
def altered(key: jax.Array, images: jax.Array) -> jax.Array:
    """Images that were shifted by up to a pixel, with noise: plain ones would be learnt by heart."""
    shift, noise = jax.random.split(key)
    shifts = jax.random.randint(shift, (len(images), 2), -1, 2)
    shifted = jax.vmap(lambda image, by: jnp.roll(image, by, axis=(0, 1)))(images, shifts)
    return shifted + NOISE * jax.random.normal(noise, images.shape)


@jax.jit
def train_step(state: State, key: jax.Array, images: jax.Array, labels: jax.Array) -> State:
    chosen, change = jax.random.split(key)
    rows = jax.random.randint(chosen, (BATCH,), 0, len(images))

    def loss_fn(params):
        variables, x = {"params": params, "batch_stats": state.batch_stats}, altered(change, images[rows])
        logits, after = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean(), after["batch_stats"]

    (_, batch_stats), grads = ag.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


@jax.jit
def evaluate(state: State, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, nats, and accuracy."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), jnp.mean(logits.argmax(-1) == labels)


def fit(label: str, store, tx: optax.GradientTransformation, train: tuple, validation: tuple, steps: int, seed: int):
    """Validation loss and accuracy `[EVALUATIONS, 2]`, milliseconds per step, and bytes."""
    variables = jax.jit(MODEL.init, static_argnames="train")(jax.random.key(seed), train[0][:1], train=False)
    params, batch_stats = store(variables["params"]), variables["batch_stats"]
    state = State.create(apply_fn=MODEL.apply, params=params, tx=tx, batch_stats=batch_stats)
    keys, measured = jax.random.split(jax.random.key(seed + 1000), steps), []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state)))
    with tqdm(total=steps, desc=f"{label}: compiling", unit="step", leave=False) as bar:
        jax.block_until_ready((train_step(state, keys[0], *train), evaluate(state, *validation)))
        start = time.perf_counter()
        for part in np.array_split(np.arange(steps), EVALUATIONS):
            for i in part:
                state = train_step(state, keys[i], *train)
            measured.append(jax.device_get(evaluate(state, *validation)))
            bar.set_description(f"{label}: validation loss {measured[-1][0]:.3f}")
            bar.update(len(part))
    return np.array(measured), 1e3 * (time.perf_counter() - start) / steps, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of each run; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=8e-3, help="at the first step; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, to average over; default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default="out", help="folder of the picture; default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images[order].reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
    labels = jnp.asarray(labels[order])
    validation = altered(jax.random.key(0), images[:VALIDATION]), labels[:VALIDATION]
    train = images[VALIDATION:], labels[VALIDATION:]
    runs = {}
    for name, (store, optimizer) in ARMS.items():
        tx = optimizer(optax.cosine_decay_schedule(args.learning_rate, args.steps))  # One for all seeds: one program.
        fitted = functools.partial(fit, store=store, tx=tx, train=train, validation=validation, steps=args.steps)
        runs[name] = [fitted(f"{name}, seed {seed}", seed=seed) for seed in range(args.seeds)]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    print(f"{'':16}validation loss   accuracy   weights, statistics, state   time per step")
    for name, of_seeds in runs.items():
        loss, accuracy = np.mean([measured[-1] for measured, _, _ in of_seeds], axis=0)
        milliseconds, size = min(run[1:] for run in of_seeds)
        print(f"{name:16}{loss:10.4f} nats{accuracy:10.2%}{size / 1e6:26.2f} MB{milliseconds:13.1f} ms")
        losses = np.mean([measured[:, 0] for measured, _, _ in of_seeds], axis=0)
        axes.plot(np.linspace(args.steps / EVALUATIONS, args.steps, EVALUATIONS), losses, label=name)
    axes.set(xlabel="step", ylabel="nats", title="Validation loss", yscale="log")
    axes.legend()
    path = args.out / "image_classifier.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
