"""Random words as a function of seed, step, path and position alone: the same on any sharding and after any restart.

A counter-based generator fuses into the kernel that uses its words, where `jax.random.bits` costs ten times the
rounding itself, and no sharding of an array can change its result.
"""

import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def leaf_keys(seed: jax.typing.ArrayLike, step: jax.Array, paths: Sequence[tuple]) -> jax.Array:
    """Two words for each of some key paths of a tree, at a step. uint32, `[len(paths), 2]`."""
    # Not Python's hash, which differs from process to process.
    hashes = np.array([zlib.crc32(jax.tree_util.keystr(path).encode()) for path in paths], np.uint32)
    leaf, step = mix(mix(jnp.asarray(seed, jnp.uint32)) ^ hashes), step.astype(jnp.uint32)
    # All of it in the first word, which is the one that is mixed with the position.
    return jnp.stack([mix(leaf ^ mix(step)), mix(mix(step + hashes) ^ np.uint32(0x9E3779B9))], axis=1)


@functools.partial(jax.jit, static_argnames="shape", inline=True)
def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 random bits per element, as a function of two words and the position of the element alone.

    Args:
        key: Two uniform words, uint32 of shape `[2]`. Keys that differ in a bit of the second alone give words that
            are correlated; `leaf_keys` makes none such.
        shape: Shape of the result.

    Returns:
        uint32 of the shape.

    Raises:
        ValueError: If a dimension, or the product of those behind it, has more than 2**32 elements.
    """
    low, high = _counter(shape)
    return jnp.broadcast_to((mix(mix(high + key[0]) + low) ^ key[1]) * np.uint32(0x9E3779B1), shape)


def second_word(word: jax.Array) -> jax.Array:
    """Another word for the same element, a bijection of the first by one multiplication.

    Its upper bits depend on all bits of the first word, and a decision takes the upper bits of either.
    """
    return word * np.uint32(0x85EBCA6B)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that changes half of the output bits with every input bit.

    References:
        C. Wellons, hash-prospector (public domain): the lowbias32 family, bias 0.108.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _counter(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Position of every element in two words, uint32; made of one iota per axis, so that it shards."""
    words, sizes, word = [jnp.uint32(0)] * 2, [1, 1], 0
    for axis in reversed(range(len(shape))):
        if sizes[word] * shape[axis] > 2**32:
            word += 1
        if word > 1 or shape[axis] > 2**32:
            raise ValueError(f"random words reach arrays of 2**32 elements by 2**32, got shape {shape}.")
        iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        words[word] = words[word] + iota * jnp.uint32(sizes[word] % 2**32)
        sizes[word] *= shape[axis]
    return words[0], words[1]
