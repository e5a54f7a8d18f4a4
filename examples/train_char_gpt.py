"""Trains a character-level GPT whose weights are on an 8-bit grid: AdamW against ManifoldAdamW.

By default the weights of the matmuls are rounded to a scaled grid in every forward pass, with float32 master weights
and straight-through gradients; `--storage grid` stores them on the grid in one byte and `--storage grid+8` in two, with
a scale per row, no float32 copy and moments of one byte. Embeddings, biases and norms stay in float32. Both optimizers
start from the same weights and see the same batches. The text is CPython's own help, so its version changes the
numbers a little, and so does the CPU.

    $ python examples/train_char_gpt.py
    optimizer   validation loss (nats)  weights moved  median |ULPs|  p99 |ULPs|  ms per step  bytes per weight
    adamw                        1.302          95.3%           8.15       552.9         57.0             12.00
    manifold_adamw               1.337          96.3%          10.12       273.0         48.7             12.00
    $ python examples/train_char_gpt.py --storage grid
    adamw                        1.308          95.2%           7.00       202.0         22.9              3.06
    manifold_adamw               1.343          96.2%          10.00       152.0         23.8              3.06
    $ python examples/train_char_gpt.py --storage grid+8
    adamw                        1.309          95.3%           7.55       203.7         56.4              4.07
    manifold_adamw               1.328          96.3%           9.96       162.8         54.5              4.07

(CPython 3.11, jax 0.10, two CPU cores; about 200 s each, 25 ms per step on a faster machine.) Smoothed counts of
character pairs reach 2.32 nats. "Moved" are the weights whose rounded value is not the initial one. The bytes
are those of the matmul weights, scales included, and of all that the optimizer keeps for them but the 4 of the count of
ULPs, a diagnostic. out/train_char_gpt.png has the loss curves and a histogram of the ULPs; in its outer humps are
mostly weights that changed sign, which takes about a hundred steps of this grid.
"""

import argparse
import functools
import pathlib
import pydoc_data.topics
import time
from typing import Any, NamedTuple

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
STORAGES = ("float32", "grid", "grid+8")
STEPS_PER_CALL = 50  # Between two validations.
VALIDATION_BATCHES = 32


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


def is_matmul_weight(path: tuple, _: Any = None) -> bool:
    """Whether a parameter, or what an optimizer keeps of it, belongs to the weight of a matmul, by its path alone."""
    return jax.tree_util.DictKey("kernel") in path


def stored(params: optax.Params, format: ag.FloatFormat, storage: str) -> optax.Params:
    """The parameters as they are trained: with float32 weights, or on the grid in one byte or in two."""
    if storage == "float32":
        return params
    return ag.to_grid(params, format, fraction_bits=8 if storage == "grid+8" else 0, where=is_matmul_weight)


@functools.partial(jax.jit, static_argnames=("format", "storage"))
def rounded(params: optax.Params, format: ag.FloatFormat, storage: str) -> optax.Params:
    """The parameters, or what `from_grid` makes of them, as the forward pass sees them."""
    if storage != "float32":
        return ag.from_grid(params)
    return jax.tree.map_with_path(lambda path, w: ag.fake_quantize(w, format) if is_matmul_weight(path) else w, params)


def grid_scale(params: optax.Params, format: ag.FloatFormat) -> optax.Params:
    """The scale of every grid in `rounded` of float32 weights, so that the optimizer knows its ULPs.

    The other parameters are on no grid; ManifoldAdamW gives them the stiffness of the format unscaled.
    """
    return jax.tree.map_with_path(
        lambda path, w: ag.power_of_two_scale(w, format) if is_matmul_weight(path) else 1.0, params
    )


def optimizers(schedule, format, storage) -> dict[str, optax.GradientTransformation]:
    """AdamW and ManifoldAdamW for parameters as `stored` gives them, and around both a count of the ULPs moved."""
    stiffness, tracker = ag.stiffness_precondition(format=format), ag.track_ulp_position(format)
    adamw = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    manifold_adamw = optax.chain(stiffness, adamw)  # With the tracker: ag.manifold_adamw.
    if storage == "grid":
        adamw = ag.grid_adamw(schedule, weight_decay=WEIGHT_DECAY, second_moment="8bit")
        inner = optax.chain(
            stiffness,  # Without it, the rest is the one above.
            optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.scale_by_learning_rate(schedule),
        )
        manifold_adamw = ag.compress_state(ag.on_grid(inner, momentum=0.9))
    if storage == "grid+8":
        adamw, manifold_adamw = (ag.compress_state(ag.on_grid(tx)) for tx in (adamw, manifold_adamw))
    return {"adamw": optax.chain(adamw, tracker), "manifold_adamw": optax.chain(manifold_adamw, tracker)}


def grid_weights(tree: optax.Params) -> np.ndarray:
    """What a tree like the parameters has for the weights of the matmuls, `[grid weights]`."""
    return np.concatenate([np.ravel(leaf) for path, leaf in jax.tree.leaves_with_path(tree) if is_matmul_weight(path)])


def bytes_per_weight(params: optax.Params, state: optax.OptState) -> float:
    """What is stored for the weights of the matmuls, ULPs aside."""
    leaves = jax.tree.leaves_with_path((params, optax.tree.set(state, ulp_position=None)))
    weights = grid_weights(optax.tree.get(state, "ulp_position")).size
    return sum(leaf.nbytes for path, leaf in leaves if is_matmul_weight(path)) / weights


def batch_loss(params, graphdef, format, storage, text, key) -> jax.Array:
    """Mean cross-entropy, nats per character, of a random batch of windows of the text."""
    start = jax.random.randint(key, (BATCH, 1), 0, text.size - CONTEXT)
    window = text[start + jnp.arange(CONTEXT + 1)]
    logits = nnx.merge(graphdef, rounded(params, format, storage))(window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), donate_argnums=(0, 1))
def train(params, state, tx, graphdef, format, storage, text, keys) -> tuple[optax.Params, optax.OptState, jax.Array]:
    """One optimizer step per key; returns parameters, state and mean training loss."""

    def step(carry, key):
        params, state = carry
        numbers = ag.from_grid(params)  # For float32 weights these themselves, with straight-through gradients.
        loss, grads = jax.value_and_grad(batch_loss)(numbers, graphdef, format, storage, text, key)
        # on_grid knows the scales of its grids.
        extra = {"grid_scale": grid_scale(params, format)} if storage == "float32" else {}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), keys)
    return params, state, losses.mean()


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def evaluate(params, graphdef, format, storage, text) -> jax.Array:
    """Mean loss of the same random batches at every call."""
    keys = jax.random.split(jax.random.key(0), VALIDATION_BATCHES)
    return jax.lax.map(lambda key: batch_loss(params, graphdef, format, storage, text, key), keys).mean()


class Run(NamedTuple):
    """What is kept of one training, or, stacked, of several."""

    losses: np.ndarray  # [calls, 2]: training and validation, nats per character
    seconds: np.ndarray  # [calls]: of the optimizer steps alone; the first call compiles
    moved: np.ndarray  # bool [grid weights]: whether the rounded weight is another one than at the start
    ulp_position: np.ndarray  # [grid weights]: signed ULPs
    bytes_per_weight: float  # of the weights and what the optimizer keeps of them, without the ULPs


def fit(label, tx, format, storage, texts, vocabulary, steps, seed) -> Run:
    """Trains on the first text and validates on the second; the seed gives initial weights and batches."""
    graphdef, params = nnx.split(GPT(vocabulary, rngs=nnx.Rngs(seed)), nnx.Param)
    params = stored(params, format, storage)
    state, initial = tx.init(params), grid_weights(rounded(params, format, storage))
    losses, seconds, task = [], [], (graphdef, format, storage)
    keys = jax.random.split(jax.random.key(seed), (steps // STEPS_PER_CALL, STEPS_PER_CALL))
    bar = tqdm(keys, desc=label, unit="step", unit_scale=STEPS_PER_CALL)
    for call_keys in bar:
        start = time.perf_counter()
        params, state, loss = jax.block_until_ready(train(params, state, tx, *task, texts[0], call_keys))
        seconds.append(time.perf_counter() - start)
        losses.append((float(loss), float(evaluate(params, *task, texts[1]))))
        bar.set_postfix(validation_loss=f"{losses[-1][1]:.3f}")
    moved = grid_weights(rounded(params, format, storage)) != initial
    ulp_position = grid_weights(optax.tree.get(state, "ulp_position"))
    return Run(np.array(losses), np.array(seconds), moved, ulp_position, bytes_per_weight(params, state))


def figure(runs: dict[str, Run], format: ag.FloatFormat) -> Figure:
    """Loss curves, means over the seeds, and histograms of the ULP positions."""
    result = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = result.subplots(1, 2)
    reach = np.arcsinh(max(np.abs(run.ulp_position).max() for run in runs.values()))
    for color, (name, run) in zip(("tab:blue", "tab:orange"), runs.items(), strict=True):
        training, validation = run.losses.mean(axis=0).T
        steps = STEPS_PER_CALL * np.arange(1, len(training) + 1)
        left.plot(steps - STEPS_PER_CALL / 2, training, color=color, linewidth=1, alpha=0.5, label=f"{name}, training")
        left.plot(steps, validation, color=color, linewidth=2, label=f"{name}, validation")
        ulps = run.ulp_position.ravel()
        bins, share = np.sinh(np.linspace(-reach, reach, 81)), np.full(ulps.size, 100 / ulps.size)
        right.hist(ulps, bins, weights=share, color=color, histtype="step", linewidth=1.5, label=name)
    left.set(xlabel="optimizer step", ylabel="loss (nats per character)", title=f"Weights rounded to {format.name}")
    right.set_xscale("asinh")
    right.set(xlabel="signed ULPs moved since the start", ylabel="weights per bin (%)", title="Movement on the grid")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--format", default="float8_e4m3fn", help="grid of the weights; default: %(default)s")
    parser.add_argument("--storage", choices=STORAGES, default=STORAGES[0], help="of the weights; default: %(default)s")
    parser.add_argument("--text", type=pathlib.Path, help="UTF-8 file to learn; default: the help of CPython")
    parser.add_argument("--steps", type=int, default=1500, help=f"a multiple of {STEPS_PER_CALL}; default: %(default)s")
    parser.add_argument("--quick", dest="steps", action="store_const", const=100, help="the same as --steps 100")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the schedule; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the first one; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="how many to average over; default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default="out", help="folder of the figure; default: %(default)s")
    args = parser.parse_args()
    topics = pydoc_data.topics.topics
    try:
        format = ag.as_format(args.format)
        stored({"kernel": jnp.ones((1, 1))}, format, args.storage)  # Not every format can be stored.
        text = args.text.read_text("utf-8") if args.text else "\n".join(topics[name] for name in sorted(topics))
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if len(text) < 10 * (CONTEXT + 1):
        parser.error(f"--text must have at least {10 * (CONTEXT + 1)} characters, got {len(text)}")
    if args.steps % STEPS_PER_CALL or args.steps < 2 * STEPS_PER_CALL:
        parser.error(f"--steps must be a multiple of {STEPS_PER_CALL} and twice that or more, got {args.steps}")
    if args.seeds < 1 or not args.learning_rate > 0:
        parser.error(f"--seeds and --learning-rate must be positive, got {args.seeds} and {args.learning_rate}")

    characters, indices = np.unique(list(text), return_inverse=True)
    texts = jnp.split(jnp.asarray(indices, jnp.int32), [len(text) - len(text) // 10])
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, args.steps // 10, args.steps)
    seeds, runs = range(args.seed, args.seed + args.seeds), {}
    for name, tx in optimizers(schedule, format, args.storage).items():
        task = tx, format, args.storage, texts, len(characters), args.steps
        results = [fit(f"{name}, seed {seed}", *task, seed) for seed in seeds]
        runs[name] = Run(*map(np.stack, zip(*results, strict=True)))

    print("optimizer   validation loss (nats)  weights moved  median |ULPs|  p99 |ULPs|  ms per step  bytes per weight")
    for name, run in runs.items():
        loss, moved = run.losses[:, -1, 1].mean(), run.moved.mean()
        median, p99 = np.percentile(np.abs(run.ulp_position), [50, 99])
        milliseconds = 1e3 * run.seconds.min() / STEPS_PER_CALL  # The fastest call, as others may use the machine.
        print(f"{name:14}{loss:20.3f}{moved:15.1%}{median:15.2f}{p99:12.1f}{milliseconds:13.1f}", end="")
        print(f"{run.bytes_per_weight.mean():18.2f}")
    figure(runs, format).savefig(args.out / "train_char_gpt.png", dpi=120)


if __name__ == "__main__":
    main()
