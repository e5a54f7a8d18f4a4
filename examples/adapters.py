"""Trains low-rank adapters on a frozen base of one byte per weight, beside a frozen float32 base and full fine-tuning.

A network learns the next character of CPython's help, and then that of the sources of CPython's standard library. An
adapter adds (x @ a) @ b to x @ kernel (LoRA, arXiv 2106.09685): a and b are trained, the kernel is not. Gradients are
taken of the adapters alone, so that the base needs neither gradients nor optimizer state.

    $ pip install -e ".[examples]" && python examples/adapters.py
    trained             frozen base   loss before    after   weights and state
    all, float32        none               2.3026   1.5531            4.540 MB
    adapters, float32   float32            2.3026   1.8253            1.673 MB
    adapters, float32   one byte           2.3028   1.8269            0.539 MB
    adapters, two bytes one byte           2.3028   1.8231            0.415 MB

(CPython 3.11, jax 0.10, two CPU cores, one minute, one seed.) Full fine-tuning and float32 adapters each have their
best learning rate of the powers of two. Adapters of rank 8 do not reach full fine-tuning of so small a network, whether
the base takes four bytes per weight or one.
"""

import argparse
import functools
import pathlib
import pydoc_data.topics
import sysconfig
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import altgrad_jax as ag

CONTEXT, EMBEDDING, HIDDEN, BATCH, RANK = 8, 16, 512, 256, 8
VALIDATION = 16_384
ADAPTED = ("kernel_in", "kernel_hidden")
VOCABULARY = 96  # Line feed and the printable ASCII characters; every other one becomes a space.


def batches(text: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows at random places, to train `[steps, BATCH, CONTEXT + 1]` and to validate, int32."""
    codes = np.frombuffer(text.encode("ascii", "replace").replace(b"\n", b"\x1f"), np.uint8).astype(np.int32) - 31
    codes = np.where((codes >= 0) & (codes < VOCABULARY), codes, 1)
    places = np.random.default_rng(0).permutation(len(codes) - CONTEXT)
    places = places[np.arange(VALIDATION + steps * BATCH) % len(places)]
    windows = codes[places[:, None] + np.arange(CONTEXT + 1)]
    return windows[VALIDATION:].reshape(steps, BATCH, CONTEXT + 1), windows[:VALIDATION]


def start(key: jax.Array) -> optax.Params:
    """Initial weights."""
    shapes = {
        "embedding": (VOCABULARY, EMBEDDING),
        "kernel_in": (CONTEXT * EMBEDDING, HIDDEN),
        "kernel_hidden": (HIDDEN, HIDDEN),
        "kernel_out": (HIDDEN, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, (n, m)) / n**0.5 for key, (name, (n, m)) in zip(keys, shapes.items(), strict=True)
    }


def start_adapters(key: jax.Array, base: optax.Params) -> optax.Params:
    """Adapters that change nothing yet, because their b is zero."""
    return {
        name: {"a": jax.random.normal(key, (n, RANK)) / n**0.5, "b": jnp.zeros((RANK, m))}
        for key, name in zip(jax.random.split(key), ADAPTED, strict=True)
        for n, m in [base[name].shape]
    }


def loss_fn(adapters: optax.Params, base: optax.Params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the last character, nats; weights are read as they are, floats or GridArrays."""

    def product(x, name):
        adapter = adapters.get(name)
        return x @ base[name] + ((x @ adapter["a"]) @ adapter["b"] if adapter else 0.0)

    x = base["embedding"][windows[:, :-1]].reshape(len(windows), -1)
    x = jax.nn.gelu(product(x, "kernel_in"))
    x = jax.nn.gelu(product(x, "kernel_hidden"))
    return optax.softmax_cross_entropy_with_integer_labels(x @ base["kernel_out"], windows[:, -1]).mean()


def train(label: str, loss_fn: Callable, params, frozen, tx: optax.GradientTransformation, data: np.ndarray) -> tuple:
    """Parameters and state after one step for each batch of the data."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, frozen, batch):
        _, grads = ag.value_and_grad(loss_fn)(params, frozen, batch)  # Of the first argument alone.
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, params)  # A copy, because donation deletes it.
    state, bar = tx.init(params), tqdm(data, desc=f"{label}: compiling", unit="step", leave=False)
    for batch in bar:
        params, state = jax.block_until_ready(step(params, state, frozen, batch))
        bar.set_description(label, refresh=False)
    return params, state


def nbytes(*trees) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of each training; default: %(default)s")
    parser.add_argument("--full-rate", type=float, default=8e-3, help="of full fine-tuning; default: %(default)s")
    parser.add_argument("--rate", type=float, default=16e-3, help="of adapters; default: %(default)s")
    args = parser.parse_args()
    help_of_python = "".join(sorted(pydoc_data.topics.topics.values()))
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    first, _ = batches(help_of_python, args.steps)
    second, validation = batches("".join(file.read_text("utf-8", "replace") for file in files), args.steps)

    schedule = functools.partial(optax.cosine_decay_schedule, decay_steps=args.steps)
    adamw = lambda rate: optax.adamw(schedule(rate), weight_decay=0.01)  # noqa: E731
    full = lambda base, _, batch: loss_fn({}, base, batch)  # noqa: E731
    evaluate = jax.jit(loss_fn)
    pretrained, _ = train("pretraining", full, start(jax.random.key(0)), {}, adamw(8e-3), first)
    stored, adapters = ag.to_grid(pretrained), start_adapters(jax.random.key(1), pretrained)

    print(f"{'trained':20}{'frozen base':14}loss before    after   weights and state")
    row = "{:20}{:14}{:11.4f}{:9.4f}{:17.3f} MB"
    params, state = train("all weights", full, pretrained, {}, adamw(args.full_rate), second)
    losses = evaluate({}, pretrained, validation), evaluate({}, params, validation)
    print(row.format("all, float32", "none", *losses, nbytes(params, state) / 1e6))
    two_bytes = ag.grid_adamw(schedule(args.rate))
    for name, kind, before, base, tx in (
        ("adapters, float32", "float32", adapters, pretrained, adamw(args.rate)),
        ("adapters, float32", "one byte", adapters, stored, adamw(args.rate)),
        ("adapters, two bytes", "one byte", ag.to_grid(adapters), stored, two_bytes),
    ):
        after, state = train(f"{name}; base: {kind}", loss_fn, before, base, tx, second)
        losses = evaluate(before, base, validation), evaluate(after, base, validation)
        print(row.format(name, kind, *losses, nbytes(base, after, state) / 1e6))


if __name__ == "__main__":
    main()
