"""Encodes real numbers as integers and decodes them: the hot path, in integer operations.

An element of an array that is stored on a grid is `value(index, format) * 2**exponent`. Rounding reads only the bits
of a float32 number: below the bits of the index there is a rest, a fraction of the step to the next number, and a
random word decides whether it counts.

The index of NaN is one that no number has: the most negative one of its dtype, or the largest one without a sign.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax._floats import power_of_two
from altgrad_jax.formats import FloatFormat

_SIGN = np.int32(-(2**31))
_INFINITY = 0x7F800000
_NORMAL = 0x00800000


def index_dtype(format: FloatFormat) -> np.dtype:
    """The smallest integer dtype that holds every index of a format, and one more for NaN."""
    names = ("int8", "int16", "int32") if format.signed else ("uint8", "uint16", "int32")
    return next(np.dtype(name) for name in names if format.max_index < np.iinfo(name).max + format.signed)


def nan_index(format: FloatFormat) -> int:
    """The index that stands for NaN."""
    info = np.iinfo(index_dtype(format))
    return int(info.min if format.signed else info.max)


def exponent_range(format: FloatFormat) -> tuple[int, int]:
    """The least and the greatest exponent for which the largest number and the smallest step are normal float32.

    Both are 0 for bfloat16 and float32, whose own range is that of float32.
    """
    low, high = -126 - (format.minexp - format.mantissa_bits), min(128 - format.maxexp, 126)
    return (max(low, -126), high) if low <= high else (0, 0)


def encode(
    x: jax.Array, exponent: jax.typing.ArrayLike, format: FloatFormat, word: jax.Array | None = None
) -> jax.Array:
    """Rounds real numbers to the numbers of a format that is scaled by a power of two.

    Without a word, x goes to the nearest number, ties to the even index. With a uint32 word, it goes to one of its two
    neighbours. The share of words for which that is the one away from zero equals the rest in steps, exactly where x is
    in the normal range of the format; below it, the rest is first rounded down to a multiple of
    `2**-rest_bits_of(format)`.

    x is float32, `[...]`, and its subnormal numbers count as zero. The exponent, in `exponent_range(format)`,
    broadcasts to it. Indices are int32, to be cast to `index_dtype(format)` last: +-max_index beyond the largest
    number, and the index of NaN where x is not finite, or negative in a format without a sign.
    """
    rest_bits = rest_bits_of(format)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    scaled = x * power_of_two(-jnp.asarray(exponent, jnp.int32))
    steps = _fixed_point(magnitude(scaled), format, sticky=word is None)
    if word is not None and rest_bits:
        steps += lax.bitcast_convert_type(word >> (32 - rest_bits), jnp.int32)
    elif rest_bits:
        steps += (2 ** (rest_bits - 1) - 1) + ((steps >> rest_bits) & 1)
    index, undefined = steps >> rest_bits, ~is_finite(x)
    if format.signed:
        index = jnp.where(bits < 0, -index, index)
    else:
        undefined |= (bits < 0) & ((bits & ~_SIGN) >= _NORMAL)
    # Chosen in int32: on a TPU a choice in int8 takes a kernel of its own, twice the traffic of a step.
    return jnp.where(undefined, nan_index(format), index)


def rest_bits_of(format: FloatFormat) -> int:
    """How many bits after the point take part in the rounding: as many as int32 leaves, 24 in 8-bit formats."""
    return 31 - format.max_index.bit_length()


def decode(index: jax.Array, exponent: jax.typing.ArrayLike, format: FloatFormat) -> jax.Array:
    """The numbers at indices, exact, float32; NaN at the index of NaN, 0 below the normal range of float32."""
    index = index.astype(jnp.int32)
    # Scaled in float32: integer operations with a scale per row keep XLA from making one kernel of a step on a TPU.
    return jnp.where(index == nan_index(format), jnp.nan, number_at(index, format) * power_of_two(exponent))


def number_at(index: jax.Array, format: FloatFormat) -> jax.Array:
    """`decode` of int32 indices under the exponent 0, except that the index of NaN gives some number."""
    if not format.exponent_bits:
        return index.astype(jnp.float32) * np.float32(format.smallest_subnormal)
    # An index counts the codes of the format: shifted and rebiased it is the code of a float32.
    steps = jnp.abs(index) if format.signed else index
    code = (steps + ((format.minexp + 126) << format.mantissa_bits)) << (23 - format.mantissa_bits)
    number, sign = lax.bitcast_convert_type(code, jnp.float32), index & _SIGN
    if format.minexp - format.mantissa_bits < -126:
        number = jnp.where(steps < 2**format.mantissa_bits, steps * np.float32(format.smallest_subnormal), number)
    else:
        # Below the smallest normal number n = c / 2 + value / 2, and above it n < 2 n - c.
        number = jnp.minimum(number, number + (number - np.float32(2.0**format.minexp)))
    if not format.signed:
        return number
    return lax.bitcast_convert_type(lax.bitcast_convert_type(number, jnp.int32) | sign, jnp.float32)


def magnitude(x: jax.Array) -> jax.Array:
    """Bits of |x|, int32, in the order of |x|; x is float32."""
    return lax.bitcast_convert_type(x, jnp.int32) & ~_SIGN


def is_finite(x: jax.Array) -> jax.Array:
    """By the comparison that `encode` makes too: one operation for both."""
    return magnitude(x) < _INFINITY


def narrowed(x: jax.Array) -> jax.Array:
    """Casts to float32; float64 by rounding to odd, so that the result rounds to fewer bits as x itself would."""
    near = x.astype(jnp.float32)
    if x.dtype != jnp.float64:
        return near
    bits, error = lax.bitcast_convert_type(near, jnp.int32), x - near.astype(jnp.float64)
    away = jnp.where((error > 0) == (near > 0), 1, -1)
    odd = lax.bitcast_convert_type(jnp.where(bits & 1 == 1, bits, bits + away), jnp.float32)
    return jnp.where((error == 0) | ~jnp.isfinite(error), near, odd)


def _fixed_point(bits: jax.Array, format: FloatFormat, sticky: bool) -> jax.Array:
    """|x| as a fractional index with `rest_bits` bits after the point, saturating; int32."""
    mantissa_bits, rest_bits = format.mantissa_bits, rest_bits_of(format)
    # Below the normal range an index is a number of steps.
    real = lax.bitcast_convert_type(bits, jnp.float32)
    if exponent_range(format) == (0, 0):
        real *= 0  # XLA flushes what is below the normal range of float32.
    else:
        real *= np.float32(2.0**rest_bits / format.smallest_subnormal)
    if not format.exponent_bits:
        real = jnp.minimum(real, np.float32(format.max_index << rest_bits))
    below = real.astype(jnp.int32)
    if sticky and 0 < rest_bits < 24:  # With more, only numbers below half of the smallest lose bits here.
        below |= (below.astype(jnp.float32) != real).astype(jnp.int32)
    if not format.exponent_bits:
        return below
    # Within it, an index counts the codes of the format, which are leading bits of those of float32.
    above = bits - ((format.minexp + 126) << 23)
    above = jnp.minimum(above, format.max_index << (23 - mantissa_bits)) << (rest_bits - 23 + mantissa_bits)
    return jnp.where(bits < ((format.minexp + 127) << 23), below, above)
