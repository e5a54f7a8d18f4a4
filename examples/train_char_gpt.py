"""Trains a character-level GPT in two bytes per weight, momentum and second moment included, beside float32 AdamW.

Both start from the same weights and see the same batches. The text is CPython's own help, so that its version changes
the numbers a little, and so does the CPU.

    $ pip install -e ".[examples]" && python examples/train_char_gpt.py
                            validation loss   weights and state   peak of a step   time per step
    float32 AdamW                1.297 nats             5.18 MB         41.52 MB         19.6 ms
    two bytes                    1.275 nats             0.95 MB         38.00 MB         22.1 ms
    picture: out/train_char_gpt.png

(CPython 3.11, jax 0.10, two CPU cores, 100 s.) The learning rate is AdamW's: at half, twice and a quarter of it AdamW
ends at about 1.31, 1.37 and 1.38. Activations take most of the peak of so small a model. `--manifold` adds AdamW and
ManifoldAdamW on weights that the forward pass rounds:

    AdamW, rounded               1.297 nats             6.90 MB         45.66 MB         32.4 ms
    ManifoldAdamW, rounded       1.325 nats             6.90 MB         45.66 MB         33.0 ms
    AdamW, rounded: median 14.15 ULPs moved, 99th percentile 734.8
    ManifoldAdamW, rounded: median 23.52 ULPs moved, 99th percentile 458.3
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
import altgrad_jax.flax_support

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 128, 4, 64, 16
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


class Arm(NamedTuple):
    """A way to keep weights and optimizer state, and what the forward pass sees of the weights."""

    name: str
    optimizer: optax.GradientTransformation
    stored: bool = False  # in 8 bits, without a float32 copy
    rounded: ag.FloatFormat | None = None  # the format to which the forward pass rounds float32 weights of matmuls


def arms(schedule: optax.Schedule, format: ag.FloatFormat | None) -> list[Arm]:
    """AdamW and two bytes; with a format AdamW and ManifoldAdamW on float32 weights that it rounds too."""
    result = [
        Arm("float32 AdamW", optax.adamw(schedule, weight_decay=0.01)),
        Arm("two bytes", ag.grid_adamw(schedule), stored=True),
    ]
    for name, aware in (("AdamW, rounded", False), ("ManifoldAdamW, rounded", True)) if format else ():
        tx = ag.manifold_adamw(schedule, format=format, manifold_aware=aware)
        result.append(Arm(name, tx, rounded=format))
    return result


def is_matmul_weight(path: tuple) -> bool:
    return jax.tree_util.DictKey("kernel") in path


def scales(params: optax.Params, format: ag.FloatFormat) -> optax.Params:
    """The scale of each rounded weight, from which ManifoldAdamW knows its ULPs; 1 for the others."""
    return jax.tree.map_with_path(
        lambda path, w: ag.power_of_two_scale(w, format) if is_matmul_weight(path) else 1.0, params
    )


def batch_loss(params: optax.Params, graphdef: nnx.GraphDef, format, text: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per character, of a random batch of windows of the text."""
    if format:
        params = jax.tree.map_with_path(
            lambda path, w: ag.fake_quantize(w, format) if is_matmul_weight(path) else w, params
        )
    start = jax.random.randint(key, (BATCH, 1), 0, text.size - CONTEXT)
    window = text[start + jnp.arange(CONTEXT + 1)]
    logits = nnx.merge(graphdef, params)(window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=(0, 1))
def train(params, state, arm: Arm, graphdef, text, keys) -> tuple[optax.Params, optax.OptState, jax.Array]:
    """One optimizer step per key; returns parameters, state and mean training loss."""

    def step(carry, key):
        params, state = carry
        loss, grads = ag.value_and_grad(batch_loss)(params, graphdef, arm.rounded, text, key)
        extra = {"grid_scale": scales(params, arm.rounded)} if arm.rounded else {}
        updates, state = arm.optimizer.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), keys)
    return params, state, losses.mean()


@functools.partial(jax.jit, static_argnums=(1, 2))
def evaluate(params, graphdef, format, text) -> jax.Array:
    """Mean loss of the same random batches at every call."""
    keys = jax.random.split(jax.random.key(0), VALIDATION_BATCHES)
    return jax.lax.map(lambda key: batch_loss(params, graphdef, format, text, key), keys).mean()


class Run(NamedTuple):
    """What is kept of one training."""

    losses: np.ndarray  # [calls, 2]: training and validation, nats per character
    milliseconds: float  # per step, of the fastest call, because others may use the machine
    at_rest: int  # bytes of parameters and optimizer state
    peak: int  # bytes that a step has at once: these, gradients and activations
    ulps: np.ndarray  # ULPs moved by each weight of a matmul; empty without a tracker


def fit(arm: Arm, label: str, texts, vocabulary: int, steps: int, seed: int) -> Run:
    """Trains on the first text and validates on the second; the seed gives initial weights and batches."""
    graphdef, params = nnx.split(GPT(vocabulary, rngs=nnx.Rngs(seed)), nnx.Param)
    if arm.stored:
        params = ag.to_grid(params)
    state = arm.optimizer.init(params)
    keys = jax.random.split(jax.random.key(seed), (steps // STEPS_PER_CALL, STEPS_PER_CALL))
    at_rest = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    losses, seconds, bar = [], [], tqdm(keys, desc=f"{label}: compiling", unit="step", unit_scale=STEPS_PER_CALL)
    compiled = train.lower(params, state, arm, graphdef, texts[0], keys[0]).compile()
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes - texts[0].nbytes
    for call_keys in bar:
        start = time.perf_counter()
        params, state, loss = jax.block_until_ready(compiled(params, state, texts[0], call_keys))
        seconds.append(time.perf_counter() - start)
        losses.append((float(loss), float(evaluate(params, graphdef, arm.rounded, texts[1]))))
        bar.set_description(f"{label}: validation loss {losses[-1][1]:.3f}")
    positions = jax.tree.leaves_with_path(optax.tree.get(state, "ulp_position", ()))
    ulps = [np.abs(np.ravel(leaf)) for path, leaf in positions if is_matmul_weight(path)]
    ulps = np.concatenate([np.zeros(0), *ulps])
    return Run(np.array(losses), 1e3 * min(seconds) / STEPS_PER_CALL, at_rest, peak, ulps)


def figure(runs: dict[str, list[Run]]) -> Figure:
    """Bytes of parameters and optimizer state beside the validation losses, means over the seeds."""
    result = Figure(figsize=(11, 4), layout="constrained")
    left, right = result.subplots(1, 2, width_ratios=(1, 2))
    for color, (name, of_seeds) in zip(("tab:gray", "tab:blue", "tab:orange", "tab:green"), runs.items(), strict=False):
        megabytes = of_seeds[0].at_rest / 1e6
        left.bar_label(left.bar(name.replace(" ", "\n"), megabytes, color=color), [f"{megabytes:.2f}"])
        validation = np.mean([run.losses[:, 1] for run in of_seeds], axis=0)
        right.plot(STEPS_PER_CALL * np.arange(1, len(validation) + 1), validation, color=color, label=name)
    left.margins(y=0.12)
    left.set(ylabel="MB", title="Weights and optimizer state")
    right.set(xlabel="step", ylabel="nats per character", title="Validation loss")
    right.grid(alpha=0.3)
    right.legend()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, help="UTF-8 file to learn; default: the help of CPython")
    parser.add_argument("--steps", type=int, default=1500, help=f"a multiple of {STEPS_PER_CALL}; default: %(default)s")
    parser.add_argument("--quick", dest="steps", action="store_const", const=100, help="the same as --steps 100")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="peak of the schedule; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the first one; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="how many to average over; default: %(default)s")
    parser.add_argument("--manifold", action="store_true", help="also AdamW and ManifoldAdamW on rounded weights")
    parser.add_argument("--format", default="float8_e4m3fn", help="to which --manifold rounds; default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default="out", help="folder of the picture; default: %(default)s")
    args = parser.parse_args()
    topics = pydoc_data.topics.topics
    try:
        format = ag.as_format(args.format)
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
    runs = {}
    for arm in arms(schedule, format if args.manifold else None):
        seeds = range(args.seed, args.seed + args.seeds)
        runs[arm.name] = [
            fit(arm, f"{arm.name}, seed {seed}", texts, len(characters), args.steps, seed) for seed in seeds
        ]

    print(f"{'':24}validation loss   weights and state   peak of a step   time per step")
    for name, of_seeds in runs.items():
        loss, run = np.mean([run.losses[-1, 1] for run in of_seeds]), of_seeds[0]
        milliseconds = min(run.milliseconds for run in of_seeds)
        print(f"{name:24}{loss:10.3f} nats{run.at_rest / 1e6:17.2f} MB{run.peak / 1e6:14.2f} MB{milliseconds:13.1f} ms")
    for name, of_seeds in runs.items():
        if (ulps := np.concatenate([run.ulps for run in of_seeds])).size:
            print(f"{name}: median {np.median(ulps):.2f} ULPs moved, 99th percentile {np.percentile(ulps, 99):.1f}")
    path = args.out / "train_char_gpt.png"
    figure(runs).savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
