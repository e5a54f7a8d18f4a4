"""How a real number becomes one of the numbers of a format."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.formats import FloatFormat, as_format
from altgrad_jax.grid import (
    as_integer,
    as_real,
    compiled,
    floor_log2,
    ldexp,
    magnitude_at,
    power_of_two,
    steps_and_base,
)


def round_nearest(x: jax.typing.ArrayLike, format: Any) -> jax.Array:
    """Rounds to the nearest number of a format, ties to the even index, saturating.

    Agrees with a cast to the dtype, for formats that are dtypes, inside the finite range; beyond it the cast gives
    NaN or infinity and this the largest value.

    Args:
        x: Real numbers. Shape `[...]`, any floating dtype.
        format: Anything that `as_format` accepts.

    Returns:
        Numbers of the format, float32 (float64 for float64 x), shape `[...]`; +-max beyond the largest value, also
        for infinities; NaN for NaN; the sign of a zero is kept.

    Raises:
        TypeError: If x is not floating.
        ValueError: If there is no such format.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.round_nearest(jnp.array([1.0625, 1.07, -1.1875, 1e9]), "float8_e4m3fn")
        Array([  1.   ,   1.125,  -1.25 , 448.   ], dtype=float32)
    """
    x, format = as_real(x), as_format(format)
    return _value_at(nearest_index(x, format), x, format)


def round_stochastic(key: jax.Array, x: jax.typing.ArrayLike, format: Any) -> jax.Array:
    """Rounds to one of the two neighbouring numbers of a format at random, such that the mean is x.

    The probability of the upper neighbour is a multiple of 2**-24: exactly the distance to the lower neighbour in
    steps where that is one too (always, for float32 x in the normal range of a format), else rounded to nearest, a
    bias of at most 2**-25 steps.

    Args:
        key: PRNG key; consumed. The same key, x and format give the same result under jit, vmap and any sharding.
        x: Real numbers. Shape `[...]`, any floating dtype.
        format: Anything that `as_format` accepts.

    Returns:
        Numbers of the format, float32 (float64 for float64 x), shape `[...]`: x itself where it is one, +-max beyond
        the largest value, NaN for NaN.

    Raises:
        TypeError: If x is not floating.
        ValueError: If there is no such format.

    Example:
        >>> import altgrad_jax as ag, jax, jax.numpy as jnp
        >>> x = ag.round_stochastic(jax.random.key(0), jnp.full(10_000, 1.03125), "float8_e4m3fn")
        >>> sorted(set(x.tolist())), round(float(x.mean()), 2)
        ([1.0, 1.125], 1.03)
    """
    x, format = as_real(x), as_format(format)
    bits = random_bits(jax.random.bits(key, (2,), jnp.uint32), x.shape)
    return _value_at(stochastic_index(x, bits, format), x, format)


def fake_quantize(x: jax.typing.ArrayLike, format: Any, scale: jax.typing.ArrayLike | None = None) -> jax.Array:
    """Rounds to the nearest multiple, by a scale, of a number of a format; gradients pass straight through.

    Computes `scale * round_nearest(x / scale)`, with derivative 1 where |x / scale| <= max, 0 where it saturates,
    and none with respect to the scale, in forward and reverse mode (the straight-through estimator).

    Args:
        x: Real numbers. Shape `[...]`, any floating dtype.
        format: Anything that `as_format` accepts.
        scale: Positive real numbers that broadcast against x, as `[..., 1]` for one scale per row; the result is
            exact only if they are powers of two. Default: `power_of_two_scale(x, format)`, one for all of x, under
            which nothing saturates (but for formats that end below 1, next to the largest float32).

    Returns:
        Quantized numbers in the dtype of x, shape `[...]`. All NaN under the default scale if x is not finite.

    Raises:
        TypeError: If x is not floating.
        ValueError: If there is no such format, or a scale that is no jax array is not positive and finite.

    References:
        Bengio, Leonard, Courville (2013), Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation, arXiv 1308.3432.

    Example:
        >>> import altgrad_jax as ag, jax, jax.numpy as jnp
        >>> ag.fake_quantize(jnp.array([0.1, -0.7, 2.0]), "float4_e2m1fn", scale=0.25)
        Array([ 0.125, -0.75 ,  1.5  ], dtype=float32)
        >>> jax.grad(lambda x: ag.fake_quantize(x, "float4_e2m1fn", scale=0.25).sum())(jnp.array([0.1, -0.7, 2.0]))
        Array([1., 1., 0.], dtype=float32)
    """
    real, format = as_real(x), as_format(format)
    if scale is None:
        scale = power_of_two_scale(real, format)
    elif not isinstance(scale, jax.Array) and not (np.all(np.isfinite(scale)) and np.all(np.greater(scale, 0))):
        raise ValueError(f"scale must be positive and finite, got {scale}.")
    scale = jax.lax.stop_gradient(jnp.asarray(scale, real.dtype))
    return _fake_quantize(format, real, scale).astype(jnp.result_type(x))


def power_of_two_scale(x: jax.typing.ArrayLike, format: Any, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """The smallest power of two by which a format must be scaled to reach every element: 2**ceil(log2(amax / max)).

    A power of two moves no number off its grid when the weights change, as a scale of `amax / max` would.

    Args:
        x: Real numbers. Shape `[...]`, any floating dtype.
        format: Anything that `as_format` accepts.
        axis: The axes over which the largest magnitude is taken, kept with size 1: `-1` gives a scale per row.
            Default: all of them, and a scalar.

    Returns:
        Scales, float32 (float64 for float64 x); 1 where x is all zero, NaN where it is not finite. Within the normal
        range of their dtype.

    Raises:
        TypeError: If x is not floating.
        ValueError: If there is no such format.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.power_of_two_scale(jnp.array([[0.1, -0.7], [100.0, 500.0]]), "float8_e4m3fn", axis=-1)
        Array([[1.953125e-03],
               [2.000000e+00]], dtype=float32)
    """
    x, format = as_real(x), as_format(format)
    amax = jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None, initial=0.0)
    info = jnp.finfo(x.dtype)
    exponent = floor_log2(amax)
    significand = ldexp(amax, -exponent)
    exponent += (significand > format.max / 2.0 ** (format.maxexp - 1)) - (format.maxexp - 1)
    scale = power_of_two(jnp.clip(exponent, info.minexp, info.maxexp - 1), x.dtype)
    return jnp.where(jnp.isfinite(amax), jnp.where(significand == 0, 1, scale), jnp.nan)


@compiled
def nearest_index(x: jax.Array, format: FloatFormat) -> jax.Array:
    """Index, int32, of the nearest number of a format, ties to even; meaningless for NaN, which has none."""
    index, fraction = _lower_index(x, format)
    # The parity of the index, not of its steps: with mantissa_bits == 0 the base they are added to can be odd.
    index += (fraction > 0.5) | ((fraction == 0.5) & (index & 1 == 1))
    return jnp.where(x < 0, -index, index)


@compiled
def stochastic_index(x: jax.Array, bits: jax.Array, format: FloatFormat) -> jax.Array:
    """Index, int32, of a neighbour: the one away from zero where 24 random bits are below the rest of x in steps."""
    index, fraction = _lower_index(x, format)
    index += bits.astype(jnp.int32).astype(x.dtype) < jnp.round(fraction * 2.0**24)
    return jnp.where(x < 0, -index, index)


@functools.partial(jax.jit, static_argnames="shape", inline=True)
def random_bits(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """24 random bits per element, uint32, as a function of two words and the position of the element alone.

    A counter-based generator: it fuses into the kernel that uses the bits, where `jax.random.bits` costs ten times
    the rounding itself, and no sharding of the array can change its result.

    Args:
        words: The key, two uniform words, uint32 of shape `[2]`.
        shape: Shape of the result.

    Returns:
        Integers in [0, 2**24), uint32, of the shape.

    Raises:
        ValueError: If a dimension, or the product of those behind it, has more than 2**32 elements.
    """
    low, high = _counter(shape)
    return jnp.broadcast_to(mix(mix(mix(high + words[0]) + low) ^ words[1]) >> 8, shape)


def _lower_index(x: jax.Array, format: FloatFormat) -> tuple[jax.Array, jax.Array]:
    """Index, int32, of the number next to |x| from below, and the exact rest of |x| in steps."""
    steps, base = steps_and_base(x, format)
    whole = jnp.floor(steps)
    return base + as_integer(whole), steps - whole


@compiled
def _value_at(index: jax.Array, x: jax.Array, format: FloatFormat) -> jax.Array:
    """The number at an index to which x was rounded; NaN and the sign of a zero are those of x."""
    magnitude = magnitude_at(jnp.abs(index), jnp.zeros_like(x), format)
    return jnp.where(jnp.isnan(x), x, jnp.copysign(magnitude, x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fake_quantize(format: FloatFormat, x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * round_nearest(x / scale, format)


@_fake_quantize.defjvp
def _fake_quantize_jvp(format, primals, tangents):
    x, scale = primals
    inside = jnp.abs(x / scale) <= format.max
    return _fake_quantize(format, x, scale), jnp.where(inside, tangents[0], 0)


def leaf_words(seed: jax.typing.ArrayLike, path: tuple, step: jax.Array) -> jax.Array:
    """Two words that key the random bits of the leaf at a key path of a tree, at a step. uint32, `[2]`."""
    # Not Python's hash, which differs from process to process.
    leaf = jnp.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return jnp.stack([mix(mix(jnp.asarray(seed, jnp.uint32)) ^ leaf), mix(mix(step + leaf) ^ jnp.uint32(0x9E3779B9))])


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that changes half of the output bits with every input bit.

    References:
        C. Wellons, hash-prospector (public domain): the lowbias32 family, bias 0.108.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _counter(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Position of every element in two words, uint32; made of one iota per axis, so that it shards."""
    words, sizes, word = [jnp.uint32(0)] * 2, [1, 1], 0
    for axis in reversed(range(len(shape))):
        if sizes[word] * shape[axis] > 2**32:
            word += 1
        if word > 1 or shape[axis] > 2**32:
            raise ValueError(f"random bits reach arrays of 2**32 elements by 2**32, got shape {shape}.")
        iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        words[word] = words[word] + iota * jnp.uint32(sizes[word] % 2**32)
        sizes[word] *= shape[axis]
    return words[0], words[1]
