"""By which power of two a format is multiplied, and how that follows what is stored under it.

Rows have an exponent each. Where a row was about to go is known from the bits of its largest element before it was
rounded: in eighths of octaves relative to the top binade of the format, its *level*. A row above the level at which it
counts as full takes a greater exponent at the next step, a row far below a smaller one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax._floats import as_real, floor_log2, ldexp, power_of_two
from altgrad_jax.codec import exponent_range
from altgrad_jax.formats import FloatFormat, FormatLike, as_format

# The level of a row of zeros, below that of all others. Levels fit int8: 16 octaves up and down.
EMPTY = -128
# Instead of an exponent: the row was never other than zero.
UNSET = -128


class Rule(NamedTuple):
    """How an exponent follows the level of its row."""

    full: int  # The level from which on a row grows until it is below.
    empty: int  # The level below which it shrinks.
    growth: int  # Binades that a row grows by in one step at most.
    shrinkage: int  # The same for shrinking.
    period: int  # Steps between two of which it can shrink.


def weight_rule(format: FloatFormat, shrinkage: int = 1) -> Rule:
    """For weights: full above half of the largest number, empty below a 16th, or by single binades a 7th."""
    # A uniform format has no bits to spare: seven eighths and a quarter.
    uniform = format.exponent_bits == 0
    full = _eighths(format) - (1 if uniform else 8)
    return Rule(full, full - (14 if uniform or shrinkage == 1 else 24), 16, shrinkage, 1)


def moment_rule(format: FloatFormat) -> Rule:
    """For averages of gradients, and without a sign of their squares, whose binades are twice as many.

    Growth is bounded, so that no element takes its row with it, and shrinking slow, as a row may pause.
    """
    full, one = _eighths(format) - 8, 1 if format.signed else 2
    return Rule(full, full - 80 * one, 7 * one, 1, 64)


def followed(exponent: jax.Array, level: jax.Array, rule: Rule, format: FloatFormat, step: jax.Array) -> jax.Array:
    """The exponents of the next step, int8: from those of this step and the levels of what rows were about to store.

    Rows of zeros keep theirs. The format is the one that is stored, for its range; the step is uint32, [].
    """
    excess = ((level - rule.full) >> 3) + 1
    shrinks = (level < rule.empty) & (level > EMPTY) & (step % rule.period == 0)
    change = jnp.where((excess > 0) | shrinks, jnp.clip(excess, -rule.shrinkage, rule.growth), 0)
    return jnp.clip(exponent.astype(jnp.int32) + change, *exponent_range(format)).astype(jnp.int8)


def fitted(magnitude: jax.Array, rule: Rule, format: FloatFormat) -> jax.Array:
    """The exponents under which rows whose largest elements have these bits are just not full, int32."""
    excess = (magnitude >> 20) - ((format.maxexp + 126) << 3) - rule.full
    return jnp.clip((excess >> 3) + 1, *exponent_range(format))


def with_level(
    indices: Sequence[tuple[jax.Array, np.dtype]], magnitude: jax.Array, shape: tuple[int, ...], format: FloatFormat
) -> tuple[list[jax.Array], jax.Array]:
    """Casts what a step stores, int32 to the dtypes given, and gives the levels of the rows that it was about to store.

    The levels come from the bits of the magnitudes that elements are about to have in units of their scale, int32, 0
    for what is not finite, and have the shape of the exponents: 1 in each dimension that shares one.
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

    # On a CPU it is the fast one.
    def narrow(magnitude, *indices):
        return cast(indices), row_maximum(level(magnitude).astype(jnp.int8), shape).astype(jnp.int32)

    # XLA:CPU makes a kernel of each output, with all that came before in each. One word holds them all, the level on
    # top, so that it is that of the largest word; and a division keeps XLA from making the word again for each. The
    # compiler behind XLA sees that it divides by 1.
    def packed(magnitude, *indices):
        word, shifts = level(magnitude) << 24, [0, 8 * dtypes[0].itemsize]
        for index, dtype, shift in zip(indices, dtypes, shifts, strict=True):
            word |= (index & (2 ** (8 * dtype.itemsize) - 1)) << shift
        word = lax.div(word, ((magnitude & np.int32(2**31 - 1)) >> 31) + 1)
        stored = [(word >> shift).astype(dtype) for shift, dtype in zip(shifts, dtypes, strict=True)]
        return stored, row_maximum(word, shape) >> 24

    fits = len(dtypes) == 2 and sum(dtype.itemsize for dtype in dtypes) < 4
    return lax.platform_dependent(magnitude, *arrays, cpu=packed if fits else narrow, default=wide)


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the exponents of an array: one for every row, that is along the last axis.

    Rows of fewer than 8 elements merge with the axis before, and no other: stacks of matrices are scanned and mapped.
    """
    merged = 2 if len(shape) > 1 and shape[-1] < 8 else min(len(shape), 1)
    return shape[: len(shape) - merged] + (1,) * merged


def row_maximum(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Largest integers in the rows that share one of the exponents of a shape, and of that shape."""
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
        axis: Over which the largest magnitude is taken, kept with size 1. Default: all of them, and a scalar.

    Returns:
        Scales, float32 (float64 for float64 x), normal numbers; 1 where x is all zero, NaN where it is not finite.

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
