"""Arrays stored as integers: the positions of their elements on a scaled grid."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax._checks import check_float_leaves, check_number, check_same_tree, fits
from altgrad_jax.formats import FloatFormat, as_format
from altgrad_jax.grid import as_real, number_at
from altgrad_jax.rounding import nearest_index, power_of_two_scale

# Steps between two looks at the largest element under every scale: one pass over the stored arrays each.
RESCALE_PERIOD = 64

_HARDWARE_FORMATS = (
    "float8_e4m3fn float8_e5m2 float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2fnuz"
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["index", "scale"], meta_fields=["format", "fraction_bits"]
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GridArray:
    """An array of numbers of a scaled format, stored as their integer positions.

    The element with index `i` is `scale * value(i / 2**fraction_bits, format)`; the most negative index of the dtype,
    which no format reaches, is NaN. A pytree of two leaves, so that `optax.apply_updates` adds an update of the same
    structure to it: integer steps, and zero or the growth of the scale. Made by `to_grid`. An average of GridArrays
    (`optax.incremental_update`) is one of indices; average what `from_grid` gives.

    Attributes:
        index: Signed positions, in steps of `2**-fraction_bits`. int8, int16 or int32, shape `[...]`.
        scale: Powers of two, float32: real units per unit of the format. Of as many dimensions as the index, and in
            each of its size or 1; from `to_grid` one per row, shape `[..., 1]`.
        format: The format whose grid it is.
        fraction_bits: Bits of every position behind the point.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.to_grid(jnp.array([[0.5, -1.0], [0.1, 0.0]]), "float8_e4m3fn")
        GridArray(float8_e4m3fn, shape=(2, 2), int8 + float32[2,1])
    """

    index: jax.Array
    scale: jax.Array
    format: FloatFormat
    fraction_bits: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.index.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.index.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.index.size

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales included."""
        return self.index.nbytes + self.scale.nbytes

    @property
    def grid(self) -> FloatFormat:
        """The grid whose indices are stored: that of the format, with the fraction bits in its mantissa."""
        return self.format.refined(self.fraction_bits)

    def value(self, dtype: Any = jnp.float32, *, full: bool = False) -> jax.Array:
        """The numbers, as `from_grid` gives them."""
        if full or self.fraction_bits == 0:
            numbers = decoded(self.index, self.grid)
        else:
            numbers = decoded(_whole_index(self.index, self.fraction_bits), self.format)
        return jnp.where(self._is_nan, jnp.nan, numbers * self.scale).astype(dtype)

    def fp8(self) -> tuple[jax.Array, jax.Array]:
        """The numbers in their hardware dtype, without a scale, and the scale, for a quantized matmul.

        The codes are made of the indices by integer operations. Fraction bits are rounded to nearest-even first.

        The product of `x` and a kernel with a scale per row, `[in, 1]`, is `(x * scale[:, 0]) @ codes`.

        Returns:
            Numbers of the 8-bit dtype, shape `[...]`, and the scales that multiply them, float32.

        Raises:
            TypeError: If no 8-bit hardware dtype has the format.
        """
        if self.format.name not in _HARDWARE_FORMATS.split():
            raise TypeError(f"fp8() needs one of the formats {_HARDWARE_FORMATS}, got {self.format.name}.")
        index = _whole_index(self.index, self.fraction_bits).astype(jnp.int32)
        code = jnp.abs(index) | jnp.where(index < 0, 0x80, 0)
        numbers = lax.bitcast_convert_type(code.astype(jnp.uint8), self.format.dtype)
        return jnp.where(self._is_nan, jnp.array(jnp.nan, self.format.dtype), numbers), self.scale

    @property
    def _is_nan(self) -> jax.Array:
        # In int32, in which the numbers are decoded too: a comparison in int8 takes TPUs a kernel of its own.
        return self.index.astype(jnp.int32) == nan_index(self.index.dtype)

    def __repr__(self) -> str:
        bits = f" + {self.fraction_bits} bits" if self.fraction_bits else ""
        try:
            scales = ",".join(map(str, self.scale.shape))
            return f"GridArray({self.format.name}{bits}, shape={self.shape}, {self.index.dtype} + float32[{scales}])"
        except AttributeError:  # Leaves that are no arrays, as in a tree of shardings.
            return f"GridArray({self.format.name}{bits}, index={self.index!r}, scale={self.scale!r})"


def is_grid_array(leaf: Any) -> bool:
    """Whether a node of a tree is a GridArray: the `is_leaf` of trees that hold some."""
    return isinstance(leaf, GridArray)


def to_grid(
    params: Any,
    format: Any = "float8_e4m3fn",
    *,
    fraction_bits: int = 0,
    where: Callable[[tuple, jax.Array], bool] | Any | None = None,
    scale: Any | None = None,
) -> Any:
    """Stores parameters on a grid: every chosen leaf becomes a GridArray of its nearest numbers.

    Args:
        params: A tree of arrays. GridArrays in it are encoded again, from all of their bits.
        format: Anything that `as_format` accepts, up to 16 bits.
        fraction_bits: Bits that each position has behind the point. 8-bit formats take 1 byte per element with 0
            and 2 bytes with up to 8.
        where: Which leaves to store: a function of key path and leaf, or a tree of booleans like params. Default:
            floating leaves with two or more dimensions.
        scale: Powers of two by which the format is multiplied: a number for all leaves, or a tree like params of
            numbers and arrays that broadcast against the leaves. Default: for every row (all but the last axis) the
            smallest that leaves a factor of two between the largest magnitude and the largest number; a row of
            zeros gets that of the largest row, an array of zeros that of 1; a GridArray of the same format keeps
            its own.

    Returns:
        The tree with GridArrays in the places chosen and its other leaves untouched.

    Raises:
        ValueError: If there is no such format, it has more than 16 bits, an index would need more than 2**24 steps,
            a scale is not a normal power of two of float32 or does not broadcast, an element is not finite or would
            saturate, or nothing was chosen.
        TypeError: If a chosen leaf is not of a floating dtype, or `fraction_bits` is no integer.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[0.5, -1.06]]), "bias": jnp.zeros(2)}
        >>> stored = ag.to_grid(params, "float8_e4m3fn")
        >>> stored["kernel"], ag.from_grid(stored)["kernel"]
        (GridArray(float8_e4m3fn, shape=(1, 2), int8 + float32[1,1]), Array([[ 0.5, -1. ]], dtype=float32))
    """
    format = as_format(format)
    if format.bits > 16:
        raise ValueError(f"to_grid stores formats of up to 16 bits, got {format.name}.")
    fraction_bits, dtype = _index_dtype(format, fraction_bits)
    chosen = _chosen(params, where)
    scales = _scales(params, scale)

    def leaf(path, x, choice, scale):
        if not isinstance(choice, bool | np.bool):
            raise TypeError(f"where must be a bool at params{jax.tree_util.keystr(path)}, got {choice!r}.")
        if not choice:
            return x
        if is_grid_array(x):
            scale = x.scale if scale is None and x.format == format else scale
            x = x.value(full=True)
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(
                f"to_grid stores leaves of a floating dtype, got {jnp.result_type(x)} at "
                f"params{jax.tree_util.keystr(path)}: leave it out with `where`."
            )
        x = as_real(x)
        scale = row_scale(x, format) if scale is None else _broadcast_scale(path, scale, x.shape)
        _check_reach(path, x, scale, format)
        return GridArray(encoded(x / scale, format.refined(fraction_bits), dtype), scale, format, fraction_bits)

    return jax.tree.map_with_path(leaf, params, chosen, scales, is_leaf=is_grid_array)


def from_grid(params: Any, dtype: Any = jnp.float32, *, full: bool = False) -> Any:
    """The numbers that a tree of parameters stands for, to be differentiated with respect to.

    Args:
        params: A tree of arrays and GridArrays.
        dtype: Dtype of the arrays that come from GridArrays; bfloat16 and wider hold every 8-bit format exactly, but
            for scales near the end of its range.
        full: False gives the numbers of the format, True those with the fraction bits.

    Returns:
        The tree with an array in place of every GridArray; its other leaves untouched.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> stored = ag.to_grid(jnp.array([[1.0, 1.05]]), "float8_e4m3fn", fraction_bits=2)
        >>> ag.from_grid(stored), ag.from_grid(stored, full=True)
        (Array([[1., 1.]], dtype=float32), Array([[1.     , 1.0625]], dtype=float32))
    """
    return jax.tree.map(
        lambda leaf: leaf.value(dtype, full=full) if is_grid_array(leaf) else leaf, params, is_leaf=is_grid_array
    )


def signed_steps(updates: Any, params: Any) -> Any:
    """The whole steps by which an update of `on_grid` moves its parameters.

    The update itself holds them modulo the range of the index, and would have to add the shift of the index that
    comes with a doubled scale.

    Args:
        updates: What `on_grid` returned.
        params: The parameters that it was given.

    Returns:
        Per GridArray its steps, int32, in units of `2**-fraction_bits` on the grid after the update; other leaves of
        the updates untouched.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> params = ag.to_grid(jnp.array([[0.5, -1.0]]))
        >>> tx = ag.on_grid(optax.sgd(1.0), rounding="nearest")
        >>> updates, _ = tx.update(jnp.array([[-0.125, 1.0]]), tx.init(params), params)
        >>> ag.signed_steps(updates, params)
        Array([[ 2, -8]], dtype=int32)
    """

    def leaf(update, param):
        if not is_grid_array(param):
            return update
        before = nearest_index(param.value(full=True) / (param.scale + update.scale), param.grid)
        return (param.index + update.index).astype(jnp.int32) - before

    return jax.tree.map(leaf, updates, params, is_leaf=is_grid_array)


def checked_values(transformation: str, updates: Any, params: Any) -> Any:
    """Returns the numbers of the parameters; raises unless some are stored and gradients with respect to them came."""
    if params is None:
        raise ValueError(f"{transformation} needs the parameters: call update(updates, state, params).")
    if not any(map(is_grid_array, jax.tree.leaves(params, is_leaf=is_grid_array))):
        raise ValueError(
            f"{transformation} was given no parameter that is stored on a grid: make some with to_grid(params)."
        )
    if any(map(is_grid_array, jax.tree.leaves(updates, is_leaf=is_grid_array))):
        raise ValueError(
            f"{transformation} takes gradients with respect to from_grid(params), got GridArrays: differentiate a "
            "function of from_grid(params), and put optax.MultiSteps and optax.apply_if_finite inside of on_grid."
        )
    floats = from_grid(params, full=True)
    check_same_tree(transformation, "updates", updates, floats)
    check_float_leaves(transformation, "updates", updates)
    return floats


def encoded(x: jax.Array, grid: FloatFormat, dtype: Any) -> jax.Array:
    """Indices of the nearest numbers of a grid, in an integer dtype; of what is not finite the index of NaN."""
    return with_nan(nearest_index(x, grid), x, dtype)


def nan_index(dtype: Any) -> int:
    """The index that stands for NaN: the most negative one, or without a sign the largest."""
    info = jnp.iinfo(dtype)
    return int(info.min if info.min < 0 else info.max)


def with_nan(index: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """Casts indices to an integer dtype; where x, which they round, is not finite, the index of NaN."""
    # Chosen before the cast: a choice in int8 takes TPUs a kernel of its own, twice the traffic of a step.
    return jnp.where(jnp.isfinite(x), index, nan_index(dtype)).astype(dtype)


def row_scale(x: jax.Array, format: FloatFormat) -> jax.Array:
    """Per row the smallest power of two that leaves a factor of two of headroom."""
    axis = -1 if x.ndim else ()
    amax = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0)
    largest = jnp.max(amax, initial=0.0)
    amax = jnp.where(amax == 0, jnp.where(largest == 0, 1.0, largest), amax)
    doubled = jnp.where(amax > jnp.finfo(x.dtype).max / 2, amax, 2 * amax)
    return power_of_two_scale(doubled, format, axis=axis).astype(jnp.float32)


def rescale_due(step: jax.Array) -> jax.Array:
    """Whether a step looks at the scales: at the start after 1, 2, 4, ... steps, then once in every period."""
    return (step % RESCALE_PERIOD == 0) | ((step < RESCALE_PERIOD) & (step & (step - 1) == 0))


def decoded(index: jax.Array, grid: FloatFormat) -> jax.Array:
    """The numbers of a grid at signed indices, float32."""
    return number_at(index.astype(jnp.int32), grid)


def _whole_index(index: jax.Array, fraction_bits: int) -> jax.Array:
    """Rounds positions to whole ones, nearest, ties to even."""
    if fraction_bits == 0:
        return index
    whole, rest = index >> fraction_bits, index & (2**fraction_bits - 1)
    half = 2 ** (fraction_bits - 1)
    return whole + ((rest > half) | ((rest == half) & (whole % 2 == 1)))


def _index_dtype(format: FloatFormat, fraction_bits: int) -> tuple[int, np.dtype]:
    """The fraction bits as an int, and the smallest dtype for the indices."""
    try:
        fraction_bits = operator.index(fraction_bits)
    except TypeError:
        raise TypeError(f"fraction_bits must be an integer, got {fraction_bits!r}.") from None
    check_number("fraction_bits", fraction_bits, "[0, 24]")
    largest = format.max_index * 2**fraction_bits
    if largest > 2**24:
        raise ValueError(
            f"an index must not exceed 2**24, which float32 counts to: {format.name} has {format.max_index} numbers "
            f"and takes up to {int(math.log2(2**24 / format.max_index))} fraction_bits, got {fraction_bits}."
        )
    dtype = next(np.dtype(dtype) for dtype in ("int8", "int16", "int32") if largest <= np.iinfo(dtype).max)
    return fraction_bits, dtype


def _chosen(params: Any, where: Any) -> Any:
    if where is None:
        where = lambda path, leaf: leaf.ndim >= 2 if is_grid_array(leaf) else _is_matrix(leaf)  # noqa: E731
    chosen = jax.tree.map_with_path(where, params, is_leaf=is_grid_array) if callable(where) else where
    if not any(jax.tree.leaves(chosen)):
        raise ValueError(
            "to_grid was given nothing to store: no leaf is chosen by `where`, whose default takes floating leaves "
            "with two or more dimensions."
        )
    return chosen


def _is_matrix(leaf: Any) -> bool:
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _scales(params: Any, scale: Any) -> Any:
    """A scale for every leaf, None for the default."""
    if scale is None or jax.tree_util.treedef_is_leaf(jax.tree.structure(scale)):
        scale = jax.tree.map(lambda leaf: scale, params, is_leaf=is_grid_array)
    for one in jax.tree.leaves(scale):
        if not isinstance(one, jax.core.Tracer):
            mantissa, exponent = np.frexp(np.asarray(one, np.float64))
            if not np.all((mantissa == 0.5) & (exponent >= -125) & (exponent <= 128)):
                raise ValueError(f"scale must be a power of two from 2**-126 to 2**127, got {one}.")
    return scale


def _broadcast_scale(path: tuple, scale: Any, shape: tuple[int, ...]) -> jax.Array:
    """Gives a scale the dimensions of its array, so that both can be stacked, sliced and sharded together."""
    given = jnp.shape(scale)
    if not fits(given, shape):
        raise ValueError(f"scale must broadcast to {shape}, got shape {given} at params{jax.tree_util.keystr(path)}.")
    if not given or given[-1] == 1:
        return jnp.array(jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (*shape[:-1], 1)[: len(shape)]))
    return jnp.array(scale, jnp.float32).reshape((1,) * (len(shape) - len(given)) + given)


def _check_reach(path: tuple, x: jax.Array, scale: jax.Array, format: FloatFormat) -> None:
    """Raises if an element would saturate, where the elements are known."""
    if isinstance(x, jax.core.Tracer) or isinstance(scale, jax.core.Tracer):
        return
    if not jnp.all(jnp.abs(x) <= scale * format.max):  # False for NaN.
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} is not finite or exceeds {format.max} times its scale: clip it first, "
            "or leave the scale to to_grid."
        )
