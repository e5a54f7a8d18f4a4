"""GPTs of one shape and many sizes on the sources of Python's standard library."""

import dataclasses
import functools
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training import Task

VOCABULARY = 96  # Line feed and the printable ASCII characters; every other one becomes a space.
WINDOWS = 256  # of validation


@dataclasses.dataclass(frozen=True)
class GPT:
    """A size of the model, and of its batches."""

    width: int
    layers: int
    batch: int = 8
    context: int = 64
    dtype: str = "float32"  # of the forward pass

    @property
    def heads(self) -> int:
        return self.width // 64 if self.width > 64 else self.width // 16


@functools.cache
def text() -> tuple[jax.Array, jax.Array]:
    """The modules of the standard library, uint8: every tenth file validates, all others train."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = np.full(256, ord(" ") - 31, np.uint8)
    code[ord("\n")] = 0
    code[32:127] = np.arange(1, VOCABULARY)
    parts = [code[np.frombuffer(file.read_bytes(), np.uint8)] for file in files]
    return tuple(
        jnp.asarray(np.concatenate([part for i, part in enumerate(parts) if (i % 10 == 9) == validates]))
        for validates in (False, True)
    )


def start(gpt: GPT, key: jax.Array, data: tuple) -> tuple[dict, tuple]:
    """Initial parameters, float32: the layers are stacked, as `lax.scan` takes them."""
    d, n, keys = gpt.width, gpt.layers, iter(jax.random.split(key, 7))
    normal = lambda *shape, std: std * jax.random.normal(next(keys), shape)  # noqa: E731
    params = {
        "character": normal(VOCABULARY, d, std=0.1),
        "place": normal(gpt.context, d, std=0.1),
        "layers": {
            "attention": normal(n, d, 3 * d, std=d**-0.5),
            "mix": normal(n, d, d, std=(2 * n * d) ** -0.5),
            "up": normal(n, d, 4 * d, std=d**-0.5),
            "down": normal(n, 4 * d, d, std=(8 * n * d) ** -0.5),
            "attention_norm": {"gain": jnp.ones((n, d))},
            "mlp_norm": {"gain": jnp.ones((n, d))},
        },
        "norm": {"gain": jnp.ones(d)},
        "head": normal(d, VOCABULARY, std=d**-0.5),
    }
    return params, data


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * (jax.lax.rsqrt(square + 1e-6) * gain).astype(x.dtype)


@jax.default_matmul_precision("float32")  # On GPUs the default rounds float32 to 10 bits.
def loss_of(gpt: GPT, params: dict, windows: jax.Array, first: int = 0) -> jax.Array:
    """Mean cross-entropy, nats per character, of windows `[batch, context + 1]` from the first character on."""
    params = jax.tree.map(lambda w: w.astype(gpt.dtype), params)
    # Not by indices: the gradients of a few numbers that many characters share would be added one after the other.
    one_hot = jax.nn.one_hot(windows, VOCABULARY, dtype=gpt.dtype)
    x = one_hot[:, :-1] @ params["character"] + params["place"]

    def layer(x, p):
        qkv = (rms_norm(x, p["attention_norm"]["gain"]) @ p["attention"]).reshape(*x.shape[:2], 3, gpt.heads, -1)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True, implementation="xla")
        x = x + attended.reshape(x.shape) @ p["mix"]
        return x + jax.nn.gelu(rms_norm(x, p["mlp_norm"]["gain"]) @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"], unroll=True)  # Half the time of a loop, on a CPU.
    logits = (rms_norm(x, params["norm"]["gain"]) @ params["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy(logits, one_hot[:, 1:].astype(jnp.float32))[:, first:].mean()


def loss(gpt: GPT, params: dict, data: tuple, key: jax.Array) -> jax.Array:
    """Of random windows of the text."""
    places = jax.random.randint(key, (gpt.batch, 1), 0, data[0].size - gpt.context)
    return loss_of(gpt, params, data[0][places + jnp.arange(gpt.context + 1)])


def validation(gpt: GPT, params: dict, data: tuple) -> jax.Array:
    """Of windows that are spread over the text."""
    starts = np.linspace(0, data[1].size - gpt.context - 1, WINDOWS).astype(int)
    windows = data[1][starts[:, None] + np.arange(gpt.context + 1)].reshape(-1, 16, gpt.context + 1)
    return jax.lax.map(lambda batch: loss_of(gpt, params, batch), windows).mean()


def task(name: str, gpt: GPT, **how: int) -> Task:
    return Task(name, text, *(functools.partial(f, gpt) for f in (start, loss, validation)), **how)


SMALL, LARGE = GPT(32, 4), {"batch": 32, "context": 256, "dtype": "bfloat16"}
SIZES = {
    one.name: one
    for one in (
        task("7k", GPT(16, 1), center=-13),
        task("60k", SMALL, center=-14),
        task("260k", GPT(64, 5), center=-15),
        task("1M", GPT(128, 5), center=-17, select=1, seeds=4),
        task("4M", GPT(256, 5, dtype="bfloat16"), center=-18, select=1, seeds=16),
        task("30M", GPT(512, 9, **LARGE), center=-20, select=1, seeds=2),
        task("100M", GPT(1024, 8, **LARGE), center=-21, select=1, seeds=2),
    )
}
OTHERS = (
    task("60k, batch 2", dataclasses.replace(SMALL, batch=2), center=-16),
    task("60k, batch 32", dataclasses.replace(SMALL, batch=32), center=-13),
    task("260k, 8000 steps", GPT(64, 5), center=-16, steps=8000, select=1, seeds=8),
    task("tiny", GPT(16, 1, batch=2, context=32), center=-13, steps=20, select=1, seeds=2),
)
