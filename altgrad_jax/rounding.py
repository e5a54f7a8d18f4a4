"""How a real number becomes one of the numbers of a format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax._floats import as_real, compiled
from altgrad_jax.codec import decode, encode, narrowed
from altgrad_jax.formats import FloatFormat, FormatLike, as_format
from altgrad_jax.random_words import random_words
from altgrad_jax.scales import power_of_two_scale


def round_nearest(x: jax.typing.ArrayLike, format: FormatLike) -> jax.Array:
    """Rounds to the nearest number of a format, ties to the even index, saturating.

    Args:
        x, format: As in `spacing`.

    Returns:
        Numbers of the format, float32 (float64 for float64 x), shape `[...]`; NaN for NaN; the sign of a zero is kept.
        As a cast to the dtype, for formats that are dtypes, except +-max beyond the largest value, also for infinities.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.round_nearest(jnp.array([1.0625, 1.07, -1.1875, 1e9]), "float8_e4m3fn")
        Array([  1.   ,   1.125,  -1.25 , 448.   ], dtype=float32)
    """
    return _rounded(as_real(x), None, as_format(format))


def round_stochastic(key: jax.Array, x: jax.typing.ArrayLike, format: FormatLike) -> jax.Array:
    """Rounds to one of the two neighbouring numbers of a format at random, so that the mean is x.

    The probability of the neighbour away from zero is exactly the distance to the other one in steps, for float32 x in
    a format's normal range; below, that is rounded down, by at most 2**-20 steps (2**-27 with 8 bits, 3 of mantissa).

    Args:
        key: PRNG key; consumed. The same key, x and format give the same result under jit, vmap and any sharding.
        x, format: As in `spacing`.

    Returns:
        As from `round_nearest`; x itself where it is a number of the format.

    Example:
        >>> import altgrad_jax as ag, jax, jax.numpy as jnp
        >>> x = ag.round_stochastic(jax.random.key(0), jnp.full(10_000, 1.03125), "float8_e4m3fn")
        >>> sorted(set(x.tolist())), round(float(x.mean()), 2)
        ([1.0, 1.125], 1.03)
    """
    x, format = as_real(x), as_format(format)
    return _rounded(x, random_words(jax.random.bits(key, (2,), jnp.uint32), x.shape), format)


def fake_quantize(x: jax.typing.ArrayLike, format: FormatLike, scale: jax.typing.ArrayLike | None = None) -> jax.Array:
    """Rounds to the nearest number of a scaled format; gradients pass straight through.

    Computes `scale * round_nearest(x / scale)`, with derivative 1 where |x / scale| <= max, 0 where it saturates, and
    none with respect to the scale, in forward and reverse mode: the straight-through estimator (Bengio, Leonard,
    Courville 2013, arXiv 1308.3432).

    Args:
        x, format: As in `spacing`.
        scale: Positive, finite numbers (else a ValueError, except in jax arrays) that broadcast against x; exact only
            for powers of two. Default: `power_of_two_scale(x, format)`, under which nothing saturates (except in
            formats that end below 1, next to the largest float32).

    Returns:
        Quantized numbers in the dtype of x, shape `[...]`. All NaN under the default scale if x is not finite.

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
    return _fake_quantize(format, real, jnp.asarray(scale, real.dtype)).astype(jnp.result_type(x))


@compiled
def _rounded(x: jax.Array, word: jax.Array | None, format: FloatFormat) -> jax.Array:
    """The number of a format that x becomes; NaN and the sign of a zero are those of x."""
    # Saturate first, because the codec makes NaN of an infinity.
    index = encode(narrowed(jnp.clip(x, format.min, format.max)), 0, format, word)
    number = jnp.abs(decode(index, 0, format)).astype(x.dtype)
    return jnp.where(jnp.isnan(x), x, jnp.copysign(number, x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fake_quantize(format: FloatFormat, x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * round_nearest(x / scale, format)


@_fake_quantize.defjvp
def _fake_quantize_jvp(format, primals, tangents):
    x, scale = primals
    inside = jnp.abs(x / scale) <= format.max
    return _fake_quantize(format, x, scale), jnp.where(inside, tangents[0], 0)
