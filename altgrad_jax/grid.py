"""Where a real number lies among the numbers of a format.

The numbers of a format are counted from 0: the k-th positive one has index k, its negative -k. The chart `position`
continues the index linearly between neighbours, `value` is its inverse, and `spacing` is the slope of `value`: the
stiffness of the grid, one ULP.

Everything is exact: powers of two are made of exponent bits, as XLA's `log2` and `exp2` are inexact next to powers of
two. What is below the smallest normal number of the dtype that computes (float32; float64 for float64 input) counts
as zero, as XLA flushes it: it matters for the formats bfloat16 and float32 alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.formats import FloatFormat, as_format

# Outside jit one program per function instead of one per operation; inside it, as if the decorator were not there.
compiled = functools.partial(jax.jit, static_argnames="format", inline=True)


def spacing(x: jax.typing.ArrayLike, format: Any) -> jax.Array:
    """Gap between neighbouring numbers of a format at x, away from zero: one ULP, the stiffness of the grid.

    Agrees with `numpy.spacing(abs(x))` for the formats that numpy has.

    Args:
        x: Real numbers. Shape `[...]`, any floating dtype.
        format: Anything that `as_format` accepts.

    Returns:
        Powers of two, float32 (float64 for float64 x), shape `[...]`. At 0 the smallest positive value, beyond the
        largest value the gap of the top binade, NaN for NaN; never below 2**-126 (float64: 2**-1022).

    Raises:
        TypeError: If x is not floating.
        ValueError: If there is no such format.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.spacing(jnp.array([0.0, 1.0, -1.9, 2.0, 1e9]), "float8_e4m3fn")
        Array([1.953125e-03, 1.250000e-01, 1.250000e-01, 2.500000e-01,
               3.200000e+01], dtype=float32)
    """
    x, format = as_real(x), as_format(format)
    return ulp(x, format)


def position(x: jax.typing.ArrayLike, format: Any) -> jax.Array:
    """Places real numbers on the index line of a format.

    Args:
        x: Real numbers. Shape `[...]`, any floating dtype.
        format: Anything that `as_format` accepts.

    Returns:
        Signed fractional index, float32 (float64 for float64 x), shape `[...]`: an integer where x is a number of
        the format, linear between neighbours, +-max_index beyond the largest value, NaN for NaN. The exact
        quotient, rounded once. Its derivative is 1 / spacing, 0 beyond the largest value.

    Raises:
        TypeError: If x is not floating.
        ValueError: If there is no such format.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.position(jnp.array([0.0, 1.0, 1.125, -1.03125, 448.0, jnp.inf]), "float8_e4m3fn")
        Array([  0.  ,  56.  ,  57.  , -56.25, 126.  , 126.  ], dtype=float32)
    """
    return _position(as_real(x), as_format(format))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _position(x: jax.Array, format: FloatFormat) -> jax.Array:
    steps, base = steps_and_base(x, format)
    return jnp.copysign(base.astype(x.dtype) + steps, x)


@_position.defjvp
def _position_jvp(format, primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _position(x, format), jnp.where(jnp.abs(x) <= format.max, tangent / ulp(x, format), 0)


def value(position: jax.typing.ArrayLike, format: Any) -> jax.Array:
    """The real number at a position of the index line: the inverse of `position`.

    Args:
        position: Signed fractional index. Shape `[...]`, any floating dtype.
        format: Anything that `as_format` accepts.

    Returns:
        Real numbers, float32 (float64 for a float64 position), shape `[...]`: numbers of the format at integers,
        linear between them, +-max beyond +-max_index, NaN for NaN. Exact. Its derivative is the spacing, 0 beyond
        +-max_index.

    Raises:
        TypeError: If the position is not floating.
        ValueError: If there is no such format.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.value(jnp.array([0.0, 1.0, 56.0, -56.25, 200.0]), "float8_e4m3fn")
        Array([ 0.000000e+00,  1.953125e-03,  1.000000e+00, -1.031250e+00,
                4.480000e+02], dtype=float32)
    """
    return _value(as_real(position, "position"), as_format(format))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _value(position: jax.Array, format: FloatFormat) -> jax.Array:
    magnitude = jnp.minimum(jnp.abs(position), format.max_index)
    whole = jnp.floor(magnitude)
    index = jnp.minimum(as_integer(whole), format.max_index)  # float32 rounds its own max_index up.
    return jnp.copysign(magnitude_at(index, magnitude - whole, format), position)


@_value.defjvp
def _value_jvp(format, primals, tangents):
    (position,), (tangent,) = primals, tangents
    value = _value(position, format)
    return value, jnp.where(jnp.abs(position) <= format.max_index, tangent * ulp(value, format), 0)


def nextafter(x: jax.typing.ArrayLike, toward: jax.typing.ArrayLike, format: Any) -> jax.Array:
    """The next number of a format after x in the direction of another one.

    Agrees with `numpy.nextafter` for the formats that numpy has, but for staying at the largest value.

    Args:
        x: Real numbers. Shape `[...]`, any floating dtype; they need not be numbers of the format.
        toward: Real numbers that broadcast against x.
        format: Anything that `as_format` accepts.

    Returns:
        Numbers of the format, float32 (float64 for float64 x), of the broadcast shape: the smallest one above x
        where `toward` is above x, the largest one below x where it is below, +-max where there is none; `toward`
        where it equals x; NaN where either is NaN.

    Raises:
        TypeError: If x or toward is not floating.
        ValueError: If there is no such format.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.nextafter(jnp.array([1.0, 1.0, 1.1, 0.0, 448.0]), jnp.array([2.0, 0.0, 2.0, -1.0, 1e9]), "float8_e4m3fn")
        Array([ 1.125000e+00,  9.375000e-01,  1.125000e+00, -1.953125e-03,
                4.480000e+02], dtype=float32)
    """
    x, toward, format = as_real(x), as_real(toward, "toward"), as_format(format)
    return _nextafter(*jnp.broadcast_arrays(x, toward), format)


@compiled
def _nextafter(x: jax.Array, toward: jax.Array, format: FloatFormat) -> jax.Array:
    away = jnp.where(x == 0, toward != 0, (toward > x) == (x > 0))
    steps, base = steps_and_base(x, format)
    # The first number away from 0 that XLA does not flush; 1 for all formats but bfloat16 and float32.
    first = 2 ** max(jnp.finfo(x.dtype).minexp - (format.minexp - format.mantissa_bits), 0)
    inwards = base + as_integer(jnp.ceil(steps)) - 1 + (jnp.abs(x) > format.max)
    outwards = base + as_integer(jnp.floor(steps)) + 1
    index = jnp.where(away, jnp.clip(outwards, first, format.max_index), jnp.maximum(inwards, 0))
    result = jnp.copysign(magnitude_at(index, jnp.zeros_like(x), format), jnp.where(x == 0, toward, x))
    return jnp.where(toward == x, toward, jnp.where(jnp.isnan(x) | jnp.isnan(toward), jnp.nan, result))


@compiled
def ulp(x: jax.Array, format: FloatFormat) -> jax.Array:
    """`spacing`, for float32 or float64 x."""
    exponent = jnp.maximum(ulp_exponent(x, format), jnp.finfo(x.dtype).minexp)
    return jnp.where(jnp.isnan(x), x, power_of_two(exponent, x.dtype))


@compiled
def scaled_ulp(w: jax.Array, format: FloatFormat, scale: jax.typing.ArrayLike) -> jax.Array:
    """Spacing at w of a format whose numbers are multiplied by a scale; never below the smallest normal number."""
    return jnp.maximum(scale * ulp(w / scale, format), jnp.finfo(w.dtype).tiny).astype(w.dtype)


def ulp_exponent(x: jax.Array, format: FloatFormat) -> jax.Array:
    """log2 of the spacing at x, int32, also where the spacing itself is below the normal numbers of x's dtype."""
    return _binade(x, format) - format.mantissa_bits


@compiled
def steps_and_base(x: jax.Array, format: FloatFormat) -> tuple[jax.Array, jax.Array]:
    """Splits |position|, which float32 cannot hold exactly, into two parts that are exact.

    Args:
        x: Real numbers, float32 or float64; their magnitude saturates at the largest value.
        format: The format whose grid is meant.

    Returns:
        Steps, x's dtype: |x| / spacing(x), NaN for NaN; and base, int32: the index to add to them, a multiple of
        2**mantissa_bits.
    """
    binade = _binade(x, format)
    exponents = format.mantissa_bits - (format.maxexp - 1), format.mantissa_bits - format.minexp
    steps = _scaled(jnp.minimum(jnp.abs(x), format.max), format.mantissa_bits - binade, exponents)
    return steps, (binade - format.minexp) << format.mantissa_bits


@compiled
def magnitude_at(index: jax.Array, fraction: jax.Array, format: FloatFormat) -> jax.Array:
    """The number `index + fraction` steps above zero; index int32 in [0, max_index], fraction in [0, 1)."""
    binade = jnp.maximum(index >> format.mantissa_bits, 1) - 1
    steps = (index - (binade << format.mantissa_bits)).astype(fraction.dtype) + fraction
    exponents = format.minexp - format.mantissa_bits, format.maxexp - 1 - format.mantissa_bits
    return _scaled(steps, binade + exponents[0], exponents)


def number_at(index: jax.Array, format: FloatFormat) -> jax.Array:
    """The number at a signed index, int32 in [-max_index, max_index], float32."""
    magnitude, shift = jnp.abs(index), 23 - format.mantissa_bits
    if not (shift > 0 and format.minexp - format.mantissa_bits >= -126 and format.maxexp <= 128):
        number = magnitude_at(magnitude, jnp.zeros(index.shape, jnp.float32), format)
        return jnp.where(index < 0, -number, number)
    # An index counts the codes of the format: shifted and rebiased it is the code of a float32.
    code = (magnitude + ((format.minexp + 126) << format.mantissa_bits)) << shift
    normal = lax.bitcast_convert_type(code | (index & jnp.int32(-(2**31))), jnp.float32)
    subnormal = index.astype(jnp.float32) * format.smallest_subnormal
    return jnp.where(magnitude < 2**format.mantissa_bits, subnormal, normal)


def floor_log2(x: jax.Array) -> jax.Array:
    """Exponent of the binade of |x|, int32, exact; one below the lowest where |x| is subnormal or 0."""
    info = jnp.finfo(x.dtype)
    field = (lax.bitcast_convert_type(x, _INTEGERS[info.bits]) >> info.nmant) & (2**info.nexp - 1)
    return field.astype(jnp.int32) + (info.minexp - 1)


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """2**exponent, exact; the exponent must be that of a normal number of the dtype."""
    info = jnp.finfo(dtype)
    field = (exponent - (info.minexp - 1)).astype(_INTEGERS[info.bits])
    return lax.bitcast_convert_type(field << info.nmant, dtype)


def ldexp(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x * 2**exponent, exact, 0 instead of a subnormal number; NaN and infinities stay. It must not overflow."""
    # Not jnp.ldexp, which multiplies by `2 ** exponent` before jax 0.11: pow is inexact.
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, _INTEGERS[info.bits])
    scaled = lax.bitcast_convert_type(bits + (exponent.astype(bits.dtype) << info.nmant), x.dtype)
    before = floor_log2(x)
    normal = jnp.minimum(before, before + exponent) >= info.minexp
    return jnp.where(jnp.isfinite(x), jnp.where(normal, scaled, 0), x)


def _scaled(x: jax.Array, exponent: jax.Array, bounds: tuple[int, int]) -> jax.Array:
    """`ldexp` for exponents within bounds: where these are all those of normal numbers, a third of its operations."""
    info = jnp.finfo(x.dtype)
    if not (bounds[0] >= info.minexp and bounds[1] < info.maxexp):
        return ldexp(x, exponent)
    x = jnp.where(jnp.abs(x) < info.smallest_normal, 0, x)
    return x * power_of_two(exponent, x.dtype)


def as_real(x: jax.typing.ArrayLike, name: str = "x") -> jax.Array:
    """Casts to the dtype that computes, float32 or float64, without rounding."""
    if not (hasattr(x, "dtype") or isinstance(x, int | float | complex)):
        raise TypeError(f"{name} must be an array or a float, got {x!r}: convert it with jnp.asarray.")
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be of a floating dtype, got {dtype} {x}: cast it, as with x.astype('float32').")
    return jnp.asarray(x, jnp.float64 if dtype == jnp.float64 else jnp.float32)


def as_integer(x: jax.Array) -> jax.Array:
    """Casts integral numbers to int32; NaN, whose cast is undefined, to 0."""
    return jnp.where(jnp.isnan(x), 0, x).astype(jnp.int32)


_INTEGERS = {32: jnp.int32, 64: jnp.int64}


def _binade(x: jax.Array, format: FloatFormat) -> jax.Array:
    """Exponent of the binade in which |x| lies, after saturation; the subnormal numbers share the lowest."""
    return jnp.maximum(jnp.minimum(floor_log2(x), format.maxexp - 1), format.minexp)
