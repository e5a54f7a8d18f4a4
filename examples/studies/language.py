"""The language models of the studies: GPTs of one shape and many sizes on the sources of Python's standard library."""

import dataclasses
import functools
import pathlib
import sysconfig
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY = 96  # Line feed and the printable ASCII characters; every other one becomes a space.
WINDOWS = 256  # of validation
STEPS = 2000


@dataclasses.dataclass(frozen=True)
class Task:
    """A size of the model, and how it is trained."""

    name: str
    width: int
    layers: int
    center: int = -16  # The exponent of sqrt(2) around which learning rates are searched.
    steps: int = STEPS
    batch: int = 8
    context: int = 64
    dtype: str = "float32"  # of the forward pass
    select: int = 4  # Seeds that choose a learning rate,
    seeds: int = 24  # and the most that evaluate it.

    @property
    def weights(self) -> int:
        """Numbers in matrices, embeddings and head included."""
        return 12 * self.layers * self.width**2 + (2 * VOCABULARY + self.context) * self.width

    @property
    def heads(self) -> int:
        return max(1, self.width // 64) if self.width > 64 else self.width // 16


SIZES = {
    task.name: task
    for task in (
        Task("7k", 16, 1, center=-13),
        Task("60k", 32, 4, center=-14),
        Task("260k", 64, 5, center=-15, seeds=8),
        Task("1M", 128, 5, center=-16, select=2, seeds=8),
        Task("4M", 256, 5, center=-18, dtype="bfloat16", select=1, seeds=4),
        Task("30M", 512, 9, center=-20, batch=32, context=256, dtype="bfloat16", select=1, seeds=2),
        Task("100M", 1024, 8, center=-21, batch=32, context=256, dtype="bfloat16", select=1, seeds=2),
    )
}
TASKS = SIZES | {
    task.name: task
    for task in (
        dataclasses.replace(SIZES["60k"], name="60k, batch 2", batch=2, center=-16),
        dataclasses.replace(SIZES["60k"], name="60k, batch 32", batch=32, center=-13),
        dataclasses.replace(SIZES["260k"], name="260k, 8000 steps", steps=8000),
        dataclasses.replace(SIZES["7k"], name="tiny", steps=20, batch=2, context=32, select=1, seeds=2),
    )
}


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


def start(task: Task, key: jax.Array) -> dict:
    """Initial parameters, float32: the layers are stacked, as `lax.scan` takes them."""
    d, n, keys = task.width, task.layers, iter(jax.random.split(key, 7))
    normal = lambda *shape, std: std * jax.random.normal(next(keys), shape)  # noqa: E731
    return {
        "character": normal(VOCABULARY, d, std=0.1),
        "place": normal(task.context, d, std=0.1),
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


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * (jax.lax.rsqrt(square + 1e-6) * gain).astype(x.dtype)


@jax.default_matmul_precision("float32")  # On GPUs the default rounds float32 to 10 bits.
def loss(task: Task, params: dict, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per character, of windows `[batch, context + 1]`."""
    params = jax.tree.map(lambda w: w.astype(task.dtype), params)
    # Not by indices: the gradients of a few numbers that many characters share would be added one after the other.
    one_hot = jax.nn.one_hot(windows, VOCABULARY, dtype=task.dtype)
    x = one_hot[:, :-1] @ params["character"] + params["place"]

    def layer(x, p):
        qkv = (rms_norm(x, p["attention_norm"]["gain"]) @ p["attention"]).reshape(*x.shape[:2], 3, task.heads, -1)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True, implementation="xla")
        x = x + attended.reshape(x.shape) @ p["mix"]
        return x + jax.nn.gelu(rms_norm(x, p["mlp_norm"]["gain"]) @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"], unroll=True)  # Half the time of a loop, on a CPU.
    logits = (rms_norm(x, params["norm"]["gain"]) @ params["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy(logits, one_hot[:, 1:].astype(jnp.float32)).mean()


def validation(task: Task, params: dict, characters: jax.Array) -> jax.Array:
    """The loss of windows that are spread over the text."""
    starts = np.linspace(0, characters.size - task.context - 1, WINDOWS).astype(int)
    windows = characters[starts[:, None] + np.arange(task.context + 1)].reshape(-1, 16, task.context + 1)
    return jax.lax.map(lambda batch: loss(task, params, batch), windows).mean()


HYPERPARAMETERS = ("learning_rate", "b1", "b2", "warm_up", "end", "spike", "seed")


def trainer(task: Task, arm) -> Callable[..., jax.Array]:
    """A jitted function of training text, validation text and one array `[lanes]` of each of `HYPERPARAMETERS`.

    It gives the validation losses at the end, `[lanes]`. The learning rate rises from 0 over the share `warm_up` of
    the steps and falls to `end` of itself as a cosine; the gradient of step 5 is multiplied by `spike`.
    """

    def run(train, validate, learning_rate, b1, b2, warm_up, end, spike, seed):
        rising = jnp.maximum(1, jnp.round(warm_up * task.steps))

        def schedule(step):
            falling = (1 + jnp.cos(jnp.pi * (step - rising) / (task.steps - rising))) / 2
            return learning_rate * jnp.where(step < rising, step / rising, end + (1 - end) * falling)

        key, batches = jax.random.split(jax.random.key(seed))
        tx = arm.optimizer(schedule, b1, b2, seed)
        params = arm.store(start(task, key))

        def step(carry, i):
            params, state = carry
            places = jax.random.randint(jax.random.fold_in(batches, i), (task.batch, 1), 0, train.size - task.context)
            windows = train[places + jnp.arange(task.context + 1)]
            gradient = jax.grad(functools.partial(loss, task))(arm.values(params), windows)
            gradient = jax.tree.map(lambda g: g * jnp.where(i == 5, spike, 1), gradient)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(task.steps))
        return validation(task, arm.values(params), validate)

    return jax.jit(jax.vmap(run, in_axes=(None, None) + (0,) * len(HYPERPARAMETERS)))


def bytes_per_weight(task: Task, arm) -> float:
    """Bytes of parameters and optimizer state for each number of a matrix."""

    def resident():
        params = start(task, jax.random.key(0))
        weights = sum(w.size for w in jax.tree.leaves(params) if w.ndim > 1)
        params = arm.store(params)
        return (params, arm.optimizer(lambda step: 1e-3, 0.9, 0.99, 0).init(params)), jnp.zeros(weights)

    kept, weights = jax.eval_shape(resident)
    return round(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) / weights.size, 3)
