"""Random words as a function only of seed, step, path and position: the same on any sharding and after any restart.

A counter-based generator fuses into the kernel that uses it, but `jax.random.bits` costs ten times the rounding.
"""

import contextlib
import functools
import threading
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def leaf_keys(seed: jax.typing.ArrayLike, step: jax.Array, paths: Sequence[tuple]) -> jax.Array:
    """Two words for each key path, at a step. uint32, `[len(paths), 2]`."""
    # Not Python's hash, which differs from process to process.
    hashes = np.array([zlib.crc32(jax.tree_util.keystr(path).encode()) for path in paths], np.uint32)
    keys = _leaf_keys(jnp.asarray(seed, jnp.uint32), step.astype(jnp.uint32), hashes)
    return keys if _stack.part is None else mix(keys ^ mix(_stack.part.astype(jnp.uint32) + 1))


class _Stack(threading.local):
    """Which part of a stack is being computed, int32 []; None outside of stacks."""

    part = None


_stack = _Stack()


@contextlib.contextmanager
def part_of_a_stack(i: jax.Array) -> Iterator[None]:
    """Keys within have words of their own for each i: parts of a stack have equal paths."""
    before, _stack.part = _stack.part, i
    try:
        yield
    finally:
        _stack.part = before


@functools.partial(jax.jit, inline=True)
def _leaf_keys(seed: jax.Array, step: jax.Array, hashes: jax.typing.ArrayLike) -> jax.Array:
    leaf = mix(mix(seed) ^ hashes)
    # The first word has it all, because it is the one that is mixed with the position.
    return jnp.stack([mix(leaf ^ mix(step)), mix(mix(step + hashes) ^ np.uint32(0x9E3779B9))], axis=1)


@functools.partial(jax.jit, static_argnames="shape", inline=True)
def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 random bits per element, uint32, as a function only of two words, uint32 `[2]`, and its position.

    Take keys from `leaf_keys`: keys that differ only in a bit of the second word correlate. A ValueError
    unless the dimensions split into first and last ones, each with a product of at most 2**32.
    """
    word = key[0]
    # The key comes first: XLA would write out what all lanes of a vmap share.
    for strides in reversed(_strides(shape)):
        for axis, stride in strides:
            # Of the whole shape: positions of a row alone cost whole steps on a TPU 0.7 bytes per weight at their peak.
            word = word + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        word = mix(word)
    return jnp.broadcast_to((word ^ key[1]) * np.uint32(0x9E3779B1), shape)


def second_word(word: jax.Array) -> jax.Array:
    """A second word for an element: a bijection of the first. Its upper bits, which count, depend on all bits of it."""
    return word * np.uint32(0x85EBCA6B)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that changes half of the output bits with every input bit."""
    # Of the lowbias32 family, bias 0.108: C. Wellons, hash-prospector (public domain).
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _strides(shape: tuple[int, ...]) -> tuple[list, list]:
    """Axes and their strides, which make the position of an element in two words, the lower one first."""
    words, sizes, word = ([], []), [1, 1], 0
    for axis in reversed(range(len(shape))):
        if sizes[word] * shape[axis] > 2**32:
            word += 1
        if word > 1 or shape[axis] > 2**32:
            raise ValueError(f"random words reach arrays of 2**32 elements by 2**32, got shape {shape}.")
        words[word].append((axis, sizes[word] % 2**32))
        sizes[word] *= shape[axis]
    return words
