"""Trains a character-level GPT whose weights are rounded to an 8-bit grid: AdamW against ManifoldAdamW.

The weights of the matmuls are rounded to a scaled grid in every forward pass, with float32 master weights and
straight-through gradients; embeddings, biases and norms stay in float32. Both optimizers start from the same weights
and see the same batches. The text is CPython's own help, so its version changes the numbers a little.

    $ python examples/train_char_gpt.py
"""

import argparse
import functools
import pathlib
import pydoc_data.topics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import altgrad_jax as ag

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 128, 4, 64, 16
WEIGHT_DECAY = 0.01
STEPS_PER_CALL = 25  # Between two validations.
VALIDATION_BATCHES = 16


class Block(nnx.Module):
    """Causal self-attention and a two-layer perceptron, both normalized and residual."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """Logits of the next character, `[batch, length, vocabulary]`, from characters `[batch, length]`."""

    def __init__(self, vocabulary: int, *, rngs: nnx.Rngs):
        self.character = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.place = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(rngs=rngs) for _ in range(LAYERS)))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, vocabulary, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        x = self.character(characters) + self.place(jnp.arange(characters.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Text(NamedTuple):
    """A text as integers, its last tenth held out."""

    train: jax.Array  # int32 [characters]
    validation: jax.Array  # int32 [characters]
    vocabulary: int

    @classmethod
    def encode(cls, text: str) -> "Text":
        characters, indices = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
        train, validation = np.split(indices.astype(np.int32), [len(indices) - len(indices) // 10])
        return cls(jnp.asarray(train), jnp.asarray(validation), len(characters))

    def bigram_loss(self) -> float:
        """Validation loss, nats per character, of add-one smoothed counts of pairs: what a model must beat."""
        counts = np.ones((self.vocabulary, self.vocabulary))
        np.add.at(counts, (self.train[:-1], self.train[1:]), 1)
        probabilities = counts / counts.sum(axis=1, keepdims=True)
        return -np.log(probabilities[self.validation[:-1], self.validation[1:]]).mean()


class Run(NamedTuple):
    """What is kept of a training."""

    train_loss: np.ndarray  # [calls], nats per character
    validation_loss: np.ndarray  # [calls], nats per character
    moved: np.ndarray  # bool [grid weights]: whether the rounded weight is another one than at the start
    ulp_position: np.ndarray  # [grid weights], signed ULPs
    seconds_per_step: float


def on_grid(path: tuple) -> bool:
    """Whether a parameter is the weight of a matmul."""
    return jax.tree_util.DictKey("kernel") in path


def grid_weights(tree: optax.Params) -> np.ndarray:
    """What a tree like the parameters has at the weights of the matmuls, `[grid weights]`."""
    return np.concatenate([np.ravel(leaf) for path, leaf in jax.tree.leaves_with_path(tree) if on_grid(path)])


@functools.partial(jax.jit, static_argnames="format")
def quantize(params: optax.Params, format: ag.FloatFormat) -> optax.Params:
    """The parameters as the forward pass sees them."""
    return jax.tree.map_with_path(lambda path, w: ag.fake_quantize(w, format) if on_grid(path) else w, params)


def grid_scale(params: optax.Params, format: ag.FloatFormat) -> optax.Params:
    """The scale of every grid in `quantize`, so that the optimizer knows its ULPs; 1 for the other parameters."""
    return jax.tree.map_with_path(lambda path, w: ag.power_of_two_scale(w, format) if on_grid(path) else 1.0, params)


def batch_loss(params: optax.Params, graphdef: nnx.GraphDef, format: ag.FloatFormat, text: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of a random batch of windows of the text, in nats per character."""
    start = jax.random.randint(key, (BATCH, 1), 0, text.size - CONTEXT)
    window = text[start + jnp.arange(CONTEXT + 1)]
    logits = nnx.merge(graphdef, quantize(params, format))(window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("tx", "graphdef", "format"), donate_argnames=("params", "state"))
def train(params, state, tx, graphdef, format, text, keys):
    """One optimizer step per key; returns parameters, state and mean training loss."""

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(batch_loss)(params, graphdef, format, text, key)
        updates, state = tx.update(grads, state, params, grid_scale=grid_scale(params, format))
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), keys)
    return params, state, losses.mean()


@functools.partial(jax.jit, static_argnames=("graphdef", "format"))
def evaluate(params, graphdef, format, text):
    """Mean loss of the same random batches at every call."""
    keys = jax.random.split(jax.random.key(0), VALIDATION_BATCHES)
    return jax.lax.map(lambda key: batch_loss(params, graphdef, format, text, key), keys).mean()


def run(name: str, tx: optax.GradientTransformation, format: ag.FloatFormat, text: Text, steps: int, seed: int) -> Run:
    """Trains from the weights, and on the batches, of a seed."""
    graphdef, params = nnx.split(GPT(text.vocabulary, rngs=nnx.Rngs(seed)), nnx.Param)
    state, start_weights = tx.init(params), grid_weights(quantize(params, format))
    calls = []
    with tqdm(total=steps, desc=f"{name}, seed {seed}", unit="step") as bar:
        for keys in jax.random.split(jax.random.key(seed), (steps // STEPS_PER_CALL, STEPS_PER_CALL)):
            start = time.perf_counter()
            params, state, train_loss = train(params, state, tx, graphdef, format, text.train, keys)
            train_loss.block_until_ready()
            seconds = time.perf_counter() - start
            validation_loss = evaluate(params, graphdef, format, text.validation)
            calls.append((float(train_loss), float(validation_loss), seconds))
            bar.set_postfix(validation_loss=f"{validation_loss:.3f}", refresh=False)
            bar.update(STEPS_PER_CALL)
    train_losses, validation_losses, seconds = np.transpose(calls)
    moved = grid_weights(quantize(params, format)) != start_weights
    ulp_position = grid_weights(optax.tree.get(state, "ulp_position"))
    # The median forgets the first call, which compiles.
    return Run(train_losses, validation_losses, moved, ulp_position, np.median(seconds) / STEPS_PER_CALL)


def table(runs: dict[str, list[Run]]) -> str:
    """One row per optimizer, means over the seeds."""
    lines = ["optimizer        validation loss   weights moved   |ULP position|   |ULP position|   time per step",
             "                          (nats)   on the grid           median              p99            (ms)"]
    for name, seeds in runs.items():
        loss = np.mean([run.validation_loss[-1] for run in seeds])
        moved = np.mean([run.moved for run in seeds])
        median, p99 = np.percentile(np.abs([run.ulp_position for run in seeds]), [50, 99])
        milliseconds = 1e3 * np.median([run.seconds_per_step for run in seeds])
        lines.append(f"{name:15}{loss:17.3f}{moved:16.1%}{median:17.2f}{p99:17.1f}{milliseconds:16.1f}")
    return "\n".join(lines)


def figure(runs: dict[str, list[Run]], bigram_loss: float, format: ag.FloatFormat) -> Figure:
    """Loss curves, means over the seeds, and a histogram of ULP positions."""
    result = Figure(figsize=(12, 4.5), layout="constrained")
    losses, positions = result.subplots(1, 2)
    edge = np.arcsinh(max(np.abs(run.ulp_position).max() for seeds in runs.values() for run in seeds))
    for color, (name, seeds) in zip(("tab:blue", "tab:orange"), runs.items()):
        train_loss, validation_loss = (
            np.mean([getattr(run, field) for run in seeds], axis=0) for field in ("train_loss", "validation_loss")
        )
        steps = STEPS_PER_CALL * np.arange(1, len(train_loss) + 1)
        losses.plot(steps, train_loss, color=color, linewidth=1, alpha=0.6, label=f"{name}, training")
        losses.plot(steps, validation_loss, color=color, linewidth=2, label=f"{name}, validation")
        ulps = np.concatenate([run.ulp_position for run in seeds])
        share = np.full(ulps.shape, 100 / ulps.size)
        bins = np.sinh(np.linspace(-edge, edge, 81))
        positions.hist(ulps, bins, weights=share, color=color, histtype="step", linewidth=1.5, label=name)
    losses.axhline(bigram_loss, color="gray", linestyle=":", label="bigram counts, validation")
    losses.set(xlabel="optimizer step", ylabel="loss (nats per character)", title="Loss")
    positions.set_xscale("asinh")
    positions.set(
        xlabel=f"distance from the initial weight (ULPs of the scaled {format.name})",
        ylabel="weights per bin (%)",
        title="ULP position of the weights on the grid",
    )
    for axes in (losses, positions):
        axes.grid(alpha=0.3)
        axes.legend()
    return result


def format_argument(name: str) -> ag.FloatFormat:
    try:
        return ag.as_format(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def text_argument(path: str) -> str:
    try:
        text = pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {path} as UTF-8 text: {error}") from None
    shortest = 10 * (CONTEXT + 1)
    if len(text) < shortest:
        raise argparse.ArgumentTypeError(f"needs at least {shortest} characters, got {len(text)} in {path}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--format", type=format_argument, default="float8_e4m3fn", help="default: %(default)s")
    parser.add_argument("--text", type=text_argument, help="UTF-8 file to learn; default: the help of CPython")
    parser.add_argument("--steps", type=int, default=1500, help="default: %(default)s")
    parser.add_argument("--quick", dest="steps", action="store_const", const=150, help="the same as --steps 150")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="first seed; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="how many to average over; default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default="out", help="folder of the figure; default: %(default)s")
    args = parser.parse_args()
    if args.steps < 1 or args.steps % STEPS_PER_CALL:
        parser.error(f"--steps must be a positive multiple of {STEPS_PER_CALL}, got {args.steps}")
    if args.seeds < 1:
        parser.error(f"--seeds must be >= 1, got {args.seeds}")
    if not 0 < args.learning_rate < np.inf:
        parser.error(f"--learning-rate must be positive and finite, got {args.learning_rate}")
    args.out.mkdir(parents=True, exist_ok=True)

    topics = pydoc_data.topics.topics
    text = Text.encode(args.text or "\n".join(topics[topic] for topic in sorted(topics)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, args.steps // 10, args.steps)
    optimizers = {
        "adamw": optax.chain(
            optax.adamw(schedule, weight_decay=WEIGHT_DECAY), ag.track_ulp_position(args.format)
        ),
        "manifold_adamw": ag.manifold_adamw(schedule, weight_decay=WEIGHT_DECAY, format=args.format),
    }
    runs = {name: [] for name in optimizers}
    for seed in range(args.seed, args.seed + args.seeds):
        for name, tx in optimizers.items():
            runs[name].append(run(name, tx, args.format, text, args.steps, seed))

    bigram_loss = text.bigram_loss()
    weights = runs["adamw"][0].ulp_position.size
    print(f"{weights} weights on {args.format.name}, {args.steps} steps, {args.seeds} seed(s); bigram {bigram_loss:.3f}")
    print(table(runs))
    figure(runs, bigram_loss, args.format).savefig(args.out / "train_char_gpt.png", dpi=120)


if __name__ == "__main__":
    main()
