"""The powers of two by which a format is multiplied, and how they follow the numbers that are stored.

Each row has an exponent. The bits of its largest element before rounding give its *level*, in eighths of octaves
relative to the top binade of the format. A row above the level at which it counts as full takes a greater exponent at
the next step, a row far below a smaller one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax._floats import as_real, floor_log2, largest, ldexp, power_of_two
from altgrad_jax.codec import exponent_range
from altgrad_jax.formats import FloatFormat, FormatLike, as_format

# The level of a row of zeros, below that of all others. Levels fit int8: 16 octaves up and down.
EMPTY = -128
# Instead of an exponent: the row has always been zero.
UNSET = -128


class Rule(NamedTuple):
    """How an exponent follows the level of its row."""

    full: int  # From this level on, a row grows until it is below.
    empty: int  # The level below which it shrinks.
    growth: int  # The most binades by which a row grows in one step.
    shrinkage: int  # The same for shrinking.
    period: int  # A row can shrink once in so many steps.


def weight_rule(format: FloatFormat, shrinkage: int = 1) -> Rule:
    """For weights: full above half of the largest number, empty below a 16th, or a 7th if they shrink by one binade.

    A uniform format, whose numbers are evenly spaced, has no bits to spare: seven eighths and a quarter.
    """
    uniform = format.max == format.max_index * format.smallest_subnormal
    full = _eighths(format) - (1 if uniform else 8)
    return Rule(full, full - (14 if uniform or shrinkage == 1 else 24), 16, shrinkage, 1)


def moment_rule(format: FloatFormat) -> Rule:
    """For averages of gradients and, in formats without a sign, of their squares, which span twice as many binades.

    Growth is bounded, so that one outlier does not erase its row. Shrinking is slow, because a row may pause.
    """
    full, one = _eighths(format) - 8, 1 if format.signed else 2
    return Rule(full, full - 80 * one, 7 * one, 1, 64)


def followed(exponent: jax.Array, level: jax.Array, rule: Rule, format: FloatFormat, step: jax.Array) -> jax.Array:
    """The exponents of the next step, int8: from those of this step and the levels of the rows.

    Rows of zeros keep theirs. The format is the stored one, whose range bounds the exponents; the step is uint32, [].
    """
    excess = ((level - rule.full) >> 3) + 1
    shrinks = (level < rule.empty) & (level > EMPTY) & (step % rule.period == 0)
    change = jnp.where((excess > 0) | shrinks, jnp.clip(excess, -rule.shrinkage, rule.growth), 0)
    return jnp.clip(exponent.astype(jnp.int32) + change, *exponent_range(format)).astype(jnp.int8)


def fitted(magnitude: jax.Array, rule: Rule, format: FloatFormat) -> jax.Array:
    """The least exponents under which rows whose largest elements have these bits are not full, int32."""
    excess = (magnitude >> 20) - ((format.maxexp + 126) << 3) - rule.full
    return jnp.clip((excess >> 3) + 1, *exponent_range(format))


def with_level(
    indices: Sequence[tuple[jax.Array, np.dtype]], magnitude: jax.Array, shape: tuple[int, ...], format: FloatFormat
) -> tuple[list[jax.Array], jax.Array]:
    """Casts the int32 indices of a step to the given dtypes, and gives the levels of the rows before rounding.

    The levels come from the bits of the magnitudes before rounding in units of their scale, int32, 0 where they are not
    finite. They have the shape of the exponents: 1 in each dimension that shares one.
    """
    arrays, dtypes = zip(*indices, strict=True)

    def level(magnitude):
        level = jnp.clip((magnitude >> 20) - ((format.maxexp + 126) << 3), EMPTY + 1, 127)
        return jnp.where(magnitude < 2**23, EMPTY, level)

    def cast(indices):
        return [index.astype(dtype) for index, dtype in zip(indices, dtypes, strict=True)]

    # For a TPU, where a maximum of int8 costs 30 bytes per element.
    def wide(magnitude, *indices):
        return cast(indices), level(row_maximum(magnitude, shape))

    # On a CPU a maximum of int8 is the fast one.
    def narrow(magnitude, *indices):
        return cast(indices), row_maximum(level(magnitude).astype(jnp.int8), shape).astype(jnp.int32)

    # XLA:CPU makes a kernel of each output and repeats all that came before in each. So one word holds all outputs,
    # with the level on top: the largest word has the largest level. A division keeps XLA from computing the word again
    # for each output; the compiler behind XLA sees that it divides by 1.
    def packed(magnitude, *indices):
        word, shifts = level(magnitude) << 24, [0, 8 * dtypes[0].itemsize]
        for index, dtype, shift in zip(indices, dtypes, shifts, strict=True):
            word |= (index & (2 ** (8 * dtype.itemsize) - 1)) << shift
        word = lax.div(word, ((magnitude & np.int32(2**31 - 1)) >> 31) + 1)
        stored = [(word >> shift).astype(dtype) for shift, dtype in zip(shifts, dtypes, strict=True)]
        return stored, row_maximum(word, shape) >> 24

    # XLA:GPU does not compute two indices and a maximum in one kernel: it passes float32 numbers between two, 21 bytes
    # per element in a step of `grid_adamw` instead of 12. Behind the barrier the maximum reads one byte.
    def apart(magnitude, *indices):
        levels = lax.optimization_barrier(level(magnitude).astype(jnp.int8))
        return cast(indices), row_maximum(levels, shape).astype(jnp.int32)

    two = len(dtypes) == 2
    cpu = packed if two and sum(dtype.itemsize for dtype in dtypes) < 4 else narrow
    return lax.platform_dependent(magnitude, *arrays, cpu=cpu, cuda=apart if two else wide, default=wide)


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the exponents of an array: one for every row along the last axis.

    Rows of fewer than 8 elements merge with the axis before and no other, because stacks are scanned and mapped.
    """
    merged = 2 if len(shape) > 1 and shape[-1] < 8 else min(len(shape), 1)
    return shape[: len(shape) - merged] + (1,) * merged


def row_maximum(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The largest integer of each row that shares an exponent, in the shape of the exponents."""
    shared = [axis for axis in range(x.ndim) if shape[axis] == 1]
    return jnp.max(x, axis=shared, keepdims=True, initial=jnp.iinfo(x.dtype).min)


def _eighths(format: FloatFormat) -> int:
    """Level of the largest number."""
    return int(8 * (format.max / 2.0 ** (format.maxexp - 1) - 1))


def power_of_two_scale(
    x: jax.typing.ArrayLike, format: FormatLike, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """The smallest power of two by which a format must be scaled to reach every element: 2**ceil(log2(amax / max)).

    Args:
        x, format: As in `spacing`.
        axis: Axes over which the largest magnitude is taken, kept with size 1. Default: all of them, for a scalar.

    Returns:
        Scales, float32 (float64 for float64 x), normal numbers; 1 where x is all zero, NaN where it is not finite.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.power_of_two_scale(jnp.array([[0.1, -0.7], [100.0, 500.0]]), "float8_e4m3fn", axis=-1)
        Array([[1.953125e-03],
               [2.000000e+00]], dtype=float32)
    """
    x, format = as_real(x), as_format(format)
    amax = largest(x, axis, keepdims=axis is not None)
    info = jnp.finfo(x.dtype)
    exponent = floor_log2(amax)
    significand = ldexp(amax, -exponent)
    exponent += (significand > format.max / 2.0 ** (format.maxexp - 1)) - (format.maxexp - 1)
    scale = power_of_two(jnp.clip(exponent, info.minexp, info.maxexp - 1), x.dtype)
    return jnp.where(jnp.isfinite(amax), jnp.where(significand == 0, 1, scale), jnp.nan)
