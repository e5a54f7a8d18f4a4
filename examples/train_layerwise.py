"""Trains a character-level GPT whose layers are updated inside of the backward pass, beside float32 AdamW.

    $ pip install -e ".[examples]" && python examples/train_layerwise.py
                            training loss   weights and state   peak of a step
    float32 AdamW              2.528 nats            19.32 MB         38.81 MB
    two bytes, layerwise       2.402 nats             3.33 MB         16.95 MB

Both start from the same weights and see the same batches; the text is CPython's own help. The peak of a step is what
XLA allocates for it: parameters, state, gradients, decoded weights, activations.
"""

import argparse
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import altgrad_jax as ag

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 8, 128, 4, 64, 8


def text() -> tuple[jax.Array, int]:
    """Characters, int32, and how many different ones there are."""
    topics = pydoc_data.topics.topics
    alphabet, characters = np.unique(list("\n".join(topics[name] for name in sorted(topics))), return_inverse=True)
    return jnp.asarray(characters, jnp.int32), len(alphabet)


def start(key: jax.Array, vocabulary: int) -> tuple[dict, dict]:
    """Initial parameters: (outer, layers), the layers stacked along their first axis."""
    keys = iter(jax.random.split(key, 7))
    normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[-2] ** -0.5  # noqa: E731
    outer = {
        "embed": {"character": normal(vocabulary, WIDTH), "place": 0.1 * normal(CONTEXT, WIDTH)},
        "head": {"norm": {"scale": jnp.ones(WIDTH)}, "kernel": normal(WIDTH, vocabulary)},
    }
    layers = {
        "attention": {"norm": {"scale": jnp.ones((LAYERS, WIDTH))}, "kernel": normal(LAYERS, WIDTH, 3 * WIDTH)},
        "mix": {"kernel": normal(LAYERS, WIDTH, WIDTH) / (2 * LAYERS) ** 0.5},
        "up": {"norm": {"scale": jnp.ones((LAYERS, WIDTH))}, "kernel": normal(LAYERS, WIDTH, 4 * WIDTH)},
        "down": {"kernel": normal(LAYERS, 4 * WIDTH, WIDTH) / (2 * LAYERS) ** 0.5},
    }
    return outer, layers


def norm(p: dict, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * p["scale"]


def embed(p: dict, windows: jax.Array) -> jax.Array:
    return p["character"][windows[:, :-1]] + jnp.asarray(p["place"])


def layer(p: dict, x: jax.Array) -> jax.Array:
    """Causal self-attention and a perceptron, both residual; kernels are read as they are, floats or GridArrays."""
    qkv = (norm(p["attention"]["norm"], x) @ p["attention"]["kernel"]).reshape(*x.shape[:2], 3, HEADS, -1)
    attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
    x = x + attended.reshape(x.shape) @ p["mix"]["kernel"]
    return x + jax.nn.gelu(norm(p["up"]["norm"], x) @ p["up"]["kernel"]) @ p["down"]["kernel"]


def head(outer: dict, x: jax.Array, windows: jax.Array) -> jax.Array:
    logits = norm(outer["head"]["norm"], x) @ outer["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def whole_step(tx: optax.GradientTransformation):
    """Initial state, and an ordinary step: all gradients, then all updates."""

    def loss(params, windows):
        outer, layers = params
        x, _ = jax.lax.scan(jax.checkpoint(lambda x, p: (layer(p, x), None)), embed(outer["embed"], windows), layers)
        return head(outer, x, windows)

    def update(params, state, windows):
        value, gradients = jax.value_and_grad(loss)(params, windows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return tx.init, update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    args = parser.parse_args()
    characters, vocabulary = text()
    rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, args.steps // 10 + 1, args.steps)
    layerwise = ag.layerwise_update(ag.grid_adamw(rate), layer, embed=embed, head=head)
    arms = {
        "float32 AdamW": (lambda params: params, *whole_step(optax.adamw(rate))),
        "two bytes, layerwise": (ag.to_grid, *layerwise),
    }
    print(f"{'':24}training loss   weights and state   peak of a step")
    for name, (store, init, update) in arms.items():
        params = store(start(jax.random.key(0), vocabulary))
        state, random, losses = init(params), np.random.default_rng(0), []
        resident = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
        with tqdm(total=args.steps, desc=f"{name}: compiling", leave=False) as bar:
            place = lambda: random.integers(characters.size - CONTEXT, size=(BATCH, 1))  # noqa: B023, E731
            step = jax.jit(update, donate_argnums=(0, 1))
            step = step.lower(params, state, characters[place() + np.arange(CONTEXT + 1)]).compile()
            bar.set_description(name)
            for _ in range(args.steps):
                params, state, loss = step(params, state, characters[place() + np.arange(CONTEXT + 1)])
                losses.append(float(loss))
                bar.update()
        peak = resident + step.memory_analysis().temp_size_in_bytes
        print(f"{name:24}{np.mean(losses[-20:]):8.3f} nats{resident / 1e6:17.2f} MB{peak / 1e6:14.2f} MB")


if __name__ == "__main__":
    main()
