"""A decoder of Llama's shapes, its layers stacked, for benchmarks of whole training steps.

Activations are bfloat16. Attention takes a few heads at once and the loss a part of the sequence, so that activations
do not decide the memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

import altgrad_jax as ag

BFLOAT16 = jnp.bfloat16


def matrix(kernel):
    return kernel.value(BFLOAT16) if isinstance(kernel, ag.GridArray) else kernel.astype(BFLOAT16)


def normalised(x, scale):
    y = jnp.float32(x)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6) * scale).astype(BFLOAT16)


def rotated(x):
    """Rotary positions, of `[batch, length, heads, size]`."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    sin, cos = (f(angle)[:, None].astype(x.dtype) for f in (jnp.sin, jnp.cos))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@dataclasses.dataclass(frozen=True)
class Llama:
    """Shapes, by default those of Llama-2-7B, and the functions that `ag.layerwise_update` takes."""

    width: int = 4096
    hidden: int = 11008
    heads: int = 32
    vocabulary: int = 32_000
    context: int = 2048
    heads_at_once: int = 4
    tokens_at_once: int = 256

    def shapes(self, layers: int, dtype=jnp.float32):
        """Parameters as shapes."""
        matrices = dict.fromkeys(("query", "key", "value", "mix"), (self.width, self.width))
        matrices |= {"gate": (self.width, self.hidden), "up": (self.width, self.hidden)}
        matrices |= {"down": (self.hidden, self.width)}
        norms = {"attention_norm": {"scale": (self.width,)}, "mlp_norm": {"scale": (self.width,)}}
        is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
        described = lambda tree, *stack: jax.tree.map(  # noqa: E731
            lambda shape: jax.ShapeDtypeStruct((*stack, *shape), dtype), tree, is_leaf=is_shape
        )
        head = {"norm": {"scale": (self.width,)}, "kernel": (self.width, self.vocabulary)}
        outer = {"embed": {"embedding": (self.vocabulary, self.width)}, "head": head}
        return described(outer), described(matrices | norms, layers)

    def attention(self, query, key, value):
        """Causal, a few heads at once."""

        @jax.checkpoint
        def of_heads(parts):
            return jax.nn.dot_product_attention(*parts, is_causal=True)

        def grouped(x):
            return jnp.moveaxis(x.reshape(*x.shape[:2], -1, self.heads_at_once, x.shape[-1]), 2, 0)

        groups = jax.lax.map(of_heads, tuple(map(grouped, (query, key, value))))
        return jnp.moveaxis(groups, 0, 2).reshape(*query.shape[:2], -1)

    def layer(self, p, x):
        y = normalised(x, p["attention_norm"]["scale"])
        split = lambda name: (y @ matrix(p[name])).reshape(*y.shape[:2], self.heads, -1)  # noqa: E731
        query, key, value = map(split, ("query", "key", "value"))
        x = x + self.attention(rotated(query), rotated(key), value) @ matrix(p["mix"])
        y = normalised(x, p["mlp_norm"]["scale"])
        return x + (jax.nn.silu(y @ matrix(p["gate"])) * (y @ matrix(p["up"]))) @ matrix(p["down"])

    def embed(self, p, tokens):
        return jnp.asarray(p["embedding"][tokens[:, :-1]]).astype(BFLOAT16)

    def head(self, outer, x, tokens):
        x, kernel = normalised(x, outer["head"]["norm"]["scale"]), matrix(outer["head"]["kernel"])

        @jax.checkpoint
        def part(parts):
            x, labels = parts
            return optax.softmax_cross_entropy_with_integer_labels((x @ kernel).astype(jnp.float32), labels).mean()

        def split(x):
            return jnp.moveaxis(x.reshape(x.shape[0], -1, self.tokens_at_once, *x.shape[2:]), 1, 0)

        return jax.lax.map(part, (split(x), split(tokens[:, 1:]))).mean()

    def loss(self, params, tokens, layer=None):
        outer, layers = params
        layer = jax.checkpoint(layer or self.layer)
        x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), self.embed(outer["embed"], tokens), layers)
        return self.head(outer, x, tokens)


def whole(tx, value_and_grad):
    """Initial state and a step that has all gradients at once."""

    def update(params, state, tokens):
        value, grads = value_and_grad(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return tx.init, update
