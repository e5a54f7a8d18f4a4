"""The bits of float32 and float64: exponents and powers of two, exact where XLA's `log2` and `exp2` are not.

Numbers below the smallest normal number of a dtype count as zero, because XLA flushes them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Outside of jit one program per function instead of one per operation; inside of it, no effect.
compiled = functools.partial(jax.jit, static_argnames="format", inline=True)

_INTEGERS = {32: jnp.int32, 64: jnp.int64}


def floor_log2(x: jax.Array) -> jax.Array:
    """Exponent of the binade of |x|, int32, exact; one below the lowest where |x| is subnormal or 0."""
    info = jnp.finfo(x.dtype)
    field = (lax.bitcast_convert_type(x, _INTEGERS[info.bits]) >> info.nmant) & (2**info.nexp - 1)
    return field.astype(jnp.int32) + (info.minexp - 1)


def leading(x: jax.Array) -> jax.Array:
    """The power of two at the start of the binade of |x|; 0 below the normal numbers, infinity for NaN."""
    info = jnp.finfo(x.dtype)
    integer = _INTEGERS[info.bits]
    field = integer((2**info.nexp - 1) << info.nmant)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, integer) & field, x.dtype)


def power_of_two(exponent: jax.typing.ArrayLike, dtype: Any = jnp.float32) -> jax.Array:
    """2**exponent, exact; the exponent, of any integer dtype, must be that of a normal number of the dtype."""
    info = jnp.finfo(dtype)
    field = jnp.asarray(exponent, _INTEGERS[info.bits]) - (info.minexp - 1)
    return lax.bitcast_convert_type(field << info.nmant, dtype)


def ldexp(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x * 2**exponent, exact, 0 instead of a subnormal number; NaN and infinities stay. It must not overflow."""
    # Not jnp.ldexp: before jax 0.11 it multiplies by `2 ** exponent`, and pow is inexact.
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, _INTEGERS[info.bits])
    scaled = lax.bitcast_convert_type(bits + (exponent.astype(bits.dtype) << info.nmant), x.dtype)
    before = floor_log2(x)
    normal = jnp.minimum(before, before + exponent) >= info.minexp
    return jnp.where(jnp.isfinite(x), jnp.where(normal, scaled, 0), x)


def largest(x: jax.Array, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> jax.Array:
    """The largest |x|, 0 without elements, NaN if there is one."""
    # By its bits, because XLA:CPU (jax 0.10) loses NaN in the maximum of a matrix of 64 x 64 or more.
    integer = _INTEGERS[jnp.finfo(x.dtype).bits]
    bits = lax.bitcast_convert_type(x, integer) & jnp.iinfo(integer).max
    return lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=keepdims, initial=0), x.dtype)


def as_real(x: jax.typing.ArrayLike, name: str = "x") -> jax.Array:
    """Casts to the dtype of the computation, float32 or float64, without rounding."""
    if not (hasattr(x, "dtype") or isinstance(x, int | float | complex)):
        raise TypeError(f"{name} must be an array or a float, got {x!r}: convert it with jnp.asarray.")
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be of a floating dtype, got {dtype} {x}: cast it, as with x.astype('float32').")
    return jnp.asarray(x, jnp.float64 if dtype == jnp.float64 else jnp.float32)


def zeros_like(x: jax.Array, dtype: Any) -> jax.Array:
    """Zeros in the sharding of x."""
    if jax.sharding.AxisType.Explicit not in jax.typeof(x).sharding.mesh.axis_types:
        return jnp.zeros_like(x, dtype)
    # From jax 0.12 on a constant has the explicit sharding of an array only inside of `jax.set_mesh`. XLA makes it one.
    return jnp.logical_and(x != x, False).astype(dtype)


def as_integer(x: jax.Array) -> jax.Array:
    """Casts integral numbers to int32; NaN, whose cast is undefined, to 0."""
    return jnp.where(jnp.isnan(x), 0, x).astype(jnp.int32)


def varying_like(tree: Any, like: jax.Array) -> Any:
    """The same numbers; inside of `jax.shard_map` their type varies over the same axes as that of another array.

    Both branches of a conditional must have the same type, even if one of them returns a state that was made inside.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    first = like[(0,) * like.ndim] == 0
    return jax.tree.map(lambda x: jnp.where(first, x, x), tree)  # XLA removes the choice.
