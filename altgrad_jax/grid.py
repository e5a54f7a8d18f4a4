"""Where a real number lies among the numbers of a format.

The numbers of a format are counted from 0: the k-th positive one has index k, its negative -k. The chart `position`
continues the index linearly between neighbours, `value` is its inverse, and `spacing`, the slope of `value`, is the
stiffness of the grid: one ULP. All are exact, in float32 (float64 for float64 input). Numbers below the smallest
normal number of that dtype count as zero, because XLA flushes them: it matters only for bfloat16 and float32.
"""

import functools

import jax
import jax.numpy as jnp

from altgrad_jax._floats import as_integer, as_real, compiled, floor_log2, ldexp, leading
from altgrad_jax.formats import FloatFormat, FormatLike, as_format


def spacing(x: jax.typing.ArrayLike, format: FormatLike) -> jax.Array:
    """Gap between neighbouring numbers of a format at x, away from zero: one ULP, the stiffness of the grid.

    Args:
        x: Real numbers, any floating dtype (else a TypeError), shape `[...]`.
        format: Anything that `as_format` accepts (else a ValueError).

    Returns:
        Powers of two, float32 (float64 for float64 x), shape `[...]`; as `numpy.spacing(abs(x))` in numpy's formats. At
        0 the smallest positive value, beyond max the top gap, NaN for NaN; at least 2**-126 (float64: 2**-1022).

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.spacing(jnp.array([0.0, 1.0, -1.9, 2.0, 1e9]), "float8_e4m3fn")
        Array([1.953125e-03, 1.250000e-01, 1.250000e-01, 2.500000e-01, 3.200000e+01], dtype=float32)
    """
    return ulp(as_real(x), as_format(format))


def position(x: jax.typing.ArrayLike, format: FormatLike) -> jax.Array:
    """Places real numbers on the index line of a format.

    Args:
        x, format: As in `spacing`.

    Returns:
        Signed fractional index, float32 (float64 for float64 x), shape `[...]`: the exact quotient, rounded once. An
        integer where x is a number of the format, linear between neighbours, +-max_index beyond the largest value, NaN
        for NaN. Its derivative is 1 / spacing, 0 beyond the largest value.

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


def value(position: jax.typing.ArrayLike, format: FormatLike) -> jax.Array:
    """The real number at a position of the index line: the inverse of `position`.

    Args:
        position: Signed fractional index, any floating dtype (else a TypeError), shape `[...]`.
        format: As in `spacing`.

    Returns:
        Real numbers, exact, float32 (float64 for a float64 position), shape `[...]`: numbers of the format at integers,
        linear between them, +-max beyond +-max_index, NaN for NaN. The derivative is the spacing, 0 beyond +-max_index.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.value(jnp.array([0.0, 1.0, 56.0, -56.25, 200.0]), "float8_e4m3fn")
        Array([ 0.000000e+00,  1.953125e-03,  1.000000e+00, -1.031250e+00, 4.480000e+02], dtype=float32)
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


def nextafter(x: jax.typing.ArrayLike, toward: jax.typing.ArrayLike, format: FormatLike) -> jax.Array:
    """The next number of a format after x in the direction of another one.

    Args:
        x, format: As in `spacing`; x need not be a number of the format.
        toward: Real numbers that broadcast against x, any floating dtype (else a TypeError).

    Returns:
        Numbers of the format, float32 (float64 for float64 x), of the broadcast shape: the smallest one above x where
        `toward` is above x, the largest one below x where it is below; `toward` where it equals x; NaN where either is
        NaN. As `numpy.nextafter` for numpy's formats, but +-max where there is no next number.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.nextafter(jnp.array([1.0, 1.0, 1.1, 0.0, 448.0]), jnp.array([2.0, 0.0, 2.0, -1.0, 1e9]), "float8_e4m3fn")
        Array([ 1.125000e+00,  9.375000e-01,  1.125000e+00, -1.953125e-03, 4.480000e+02], dtype=float32)
    """
    x, toward, format = as_real(x), as_real(toward, "toward"), as_format(format)
    return _nextafter(*jnp.broadcast_arrays(x, toward), format)


@compiled
def _nextafter(x: jax.Array, toward: jax.Array, format: FloatFormat) -> jax.Array:
    away = jnp.where(x == 0, toward != 0, (toward > x) == (x > 0))
    steps, base = steps_and_base(x, format)
    # Index of the first number that XLA does not flush; 1 for all formats except bfloat16 and float32.
    first = 2 ** max(jnp.finfo(x.dtype).minexp - (format.minexp - format.mantissa_bits), 0)
    inwards = base + as_integer(jnp.ceil(steps)) - 1 + (jnp.abs(x) > format.max)
    outwards = base + as_integer(jnp.floor(steps)) + 1
    index = jnp.where(away, jnp.clip(outwards, first, format.max_index), jnp.maximum(inwards, 0))
    result = jnp.copysign(magnitude_at(index, jnp.zeros_like(x), format), jnp.where(x == 0, toward, x))
    return jnp.where(toward == x, toward, jnp.where(jnp.isnan(x) | jnp.isnan(toward), jnp.nan, result))


@compiled
def ulp(x: jax.Array, format: FloatFormat) -> jax.Array:
    """`spacing`, for float32 or float64 x."""
    return jnp.where(jnp.isnan(x), x, ulp_of_number(x, format))


@compiled
def ulp_of_number(x: jax.Array, format: FloatFormat) -> jax.Array:
    """`ulp`, except that NaN has that of the largest numbers."""
    lowest, top = (x.dtype.type(2.0**exponent) for exponent in (format.minexp, format.maxexp - 1))
    # In this order: the lowest binade of a format without exponent bits lies above its largest number.
    spacing = jnp.maximum(jnp.minimum(leading(x), top), lowest) * x.dtype.type(format.eps)
    tiny = jnp.finfo(x.dtype).tiny
    return spacing if 2.0**format.minexp * format.eps >= tiny else jnp.maximum(spacing, tiny)


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

    Steps are min(|x|, max) / spacing(x) in the dtype of x, NaN for NaN; base, int32, is a multiple of 2**mantissa_bits.
    """
    binade = _binade(x, format)
    steps = ldexp(jnp.minimum(jnp.abs(x), format.max), format.mantissa_bits - binade)
    return steps, (binade - format.minexp) << format.mantissa_bits


@compiled
def magnitude_at(index: jax.Array, fraction: jax.Array, format: FloatFormat) -> jax.Array:
    """The number `index + fraction` steps above zero; index int32 in [0, max_index], fraction in [0, 1)."""
    binade = jnp.maximum(index >> format.mantissa_bits, 1) - 1
    steps = (index - (binade << format.mantissa_bits)).astype(fraction.dtype) + fraction
    return ldexp(steps, binade + (format.minexp - format.mantissa_bits))


def _binade(x: jax.Array, format: FloatFormat) -> jax.Array:
    """Exponent of the binade in which |x| lies, after saturation; the subnormal numbers share the lowest."""
    return jnp.maximum(jnp.minimum(floor_log2(x), format.maxexp - 1), format.minexp)
