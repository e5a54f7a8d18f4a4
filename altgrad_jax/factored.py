"""A second moment as means over rows and over columns: Adafactor's, with the decay rate of Adam and bounded squares."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from altgrad_jax._floats import as_real

# Squares of normal numbers are hardly ever so many times their mean.
_FEW = 32.0


class FactoredState(NamedTuple):
    """State of `scale_by_factored_rms`."""

    count: ArrayLike  # int32, []: updates so far.
    row: Any  # Means of the squares over the columns of each leaf, float32, 1 in place of these.
    column: Any  # The same over its rows.


def scale_by_factored_rms(b2: ArrayLike, eps: ArrayLike) -> optax.GradientTransformation:
    """Divides gradients by the root of a second moment that is the product of its rows and columns (Adafactor).

    For matrices without large outliers it is `optax.scale_by_factored_rms` (Shazeer, Stern 2018, arXiv 1804.04235) with
    `epsilon=eps**2` and the decay rates of a mean with a bias correction. A leaf of more dimensions is a stack of
    matrices, as `matrix_axes` says. With fewer there are no columns, and every element has its own second moment.

    A square raises the means of its row and of its column by at most a quarter, unless it is below `1 / (1 - b2)` times
    that of the leaf, or 32 times one of the three. Unbounded, a gradient of 1e6 times the others multiplies all other
    updates of a 64 x 128 leaf by 1e4, for as long as the means remember it; and of matrices that grow for good, or rows
    that start late, all squares together raise a mean at once. In the first gradient of a leaf four times the geometric
    means of rows take the place of the means. Squares count up to 2**100, NaN as the bound. An update is at most
    `(1 - b2)**-0.5`, as under Adam, or 5.7, whichever is more, of an infinite gradient too; of NaN it is NaN.

    Args:
        b2: Decay rate, in [0, 1).
        eps: Its square is added to the means, >= 0; at least the smallest normal float32 number is.
    """

    def init(params):
        def zeros(axes):
            shape = lambda p: _without(_averaged(p.shape)[axes], p.shape)  # noqa: E731
            return jax.tree.map(lambda p: jnp.zeros(shape(p), jnp.promote_types(p.dtype, jnp.float32)), params)

        return FactoredState(jnp.int32(0), zeros(0), zeros(1))

    def update(updates, state, params=None):
        structure = jax.tree.structure(updates)
        leaves, rows, columns = map(structure.flatten_up_to, (updates, state.row, state.column))
        t = state.count.astype(jnp.float32)
        rate = b2 * (1 - b2**t) / (1 - b2 ** (t + 1))
        before = _before(rows, lax.stop_gradient(leaves))
        results = [_scaled(rate, eps, *leaf) for leaf in zip(leaves, rows, columns, before, strict=True)]
        scaled, rows, columns = map(structure.unflatten, zip(*results, strict=True)) if leaves else (updates,) * 3
        like = updates if params is None else params
        scaled = jax.tree.map(lambda u, g, p: u.astype(jnp.result_type(g, p)), scaled, updates, like)
        return scaled, FactoredState(optax.safe_increment(state.count), rows, columns)

    return optax.GradientTransformation(init, update)


def matrix_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Which axes of a leaf are the rows and the columns of matrices, of which it is a stack: the longest and the last.

    The first of three or more axes is that of a stack unless it is half as long as all others together: `[layers, n,
    m]` is a stack, `[d, heads, size]` a kernel of d rows.
    """
    first = 1 if len(shape) > 2 and 2 * shape[0] < math.prod(shape[1:]) else 0
    return max(range(first, len(shape) - 1), key=lambda axis: (shape[axis], axis)), len(shape) - 1


def _averaged(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Over which axes the means of rows and of columns go."""
    if len(shape) < 2:
        return (), tuple(range(len(shape)))
    row, column = matrix_axes(shape)
    return (column,), (row,)


def _without(axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if axis in axes else length for axis, length in enumerate(shape))


def _before(rows: list[Array], gradients: list[Array]) -> list[Array]:
    """The means of rows; for leaves that had no gradient other than zero yet, from the one that they have now."""
    unset = lambda row: ~jnp.any(row)  # noqa: E731

    def first(rows, gradients):
        return [jnp.where(unset(row), _geometric(gradient), row) for row, gradient in zip(rows, gradients, strict=True)]

    some = jnp.any(jnp.array([unset(row) for row in rows], bool))
    return lax.cond(some, first, lambda rows, _: rows, rows, gradients)


def _geometric(gradient: Array) -> Array:
    """Geometric means of the squares in rows, of what is finite and not zero: no element counts for much.

    Times 4, about the mean square of normal numbers.
    """
    size = jnp.abs(as_real(gradient))
    counts = (size > 0) & (size < jnp.inf)
    terms = jnp.where(counts, jnp.log(size), 0), counts.astype(size.dtype)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    axes = _averaged(gradient.shape)[0]
    logarithm, number = lax.reduce(terms, (size.dtype.type(0),) * 2, add, axes)
    squares = jnp.where(number > 0, 4 * jnp.exp(2 * logarithm / jnp.maximum(number, 1)), 0)
    return squares.reshape(_without(axes, gradient.shape))


@jax.jit
def _scaled(rate, eps, gradient, row, column, before):
    """Update of a leaf, and its means, of squares bounded by the means before."""
    g, (over_columns, over_rows) = as_real(gradient), _averaged(gradient.shape)
    mean = lambda x, axes: jnp.mean(x, axis=axes, keepdims=True)  # noqa: E731
    # A new square has this share of a mean of one element, and in a longer row or column so much less.
    share = 1 - rate
    times = lambda axes, part: jnp.maximum(part * math.prod(g.shape[i] for i in axes) / share, _FEW)  # noqa: E731
    of_row = times(over_columns, 0.25) * before
    of_column = times(over_rows, 0.25) * jnp.where(jnp.any(column), column, jnp.inf)
    of_leaf = times((), 1) * mean(before, over_rows)
    bound = jnp.maximum(jnp.minimum(of_row, of_column), of_leaf)
    bound = lax.stop_gradient(jnp.minimum(bound, 2.0**100))
    square = jnp.where(g * g < bound, g * g, bound)  # The bound for NaN.
    row = rate * row + share * mean(square, over_columns)
    column = rate * column + share * mean(square, over_rows)

    eps = jnp.maximum(jnp.square(eps), jnp.finfo(jnp.float32).tiny)
    update = g * (jnp.sqrt(mean(row, over_rows) + eps) * lax.rsqrt(row + eps)) * lax.rsqrt(column + eps)
    largest = jnp.sqrt(times((), 1))
    return jnp.clip(update, -largest, largest), row, column
