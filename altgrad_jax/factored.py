"""A second moment as means over rows and over columns: Adafactor's, with the decay rate of Adam and bounded squares."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from altgrad_jax._floats import as_real, varying_like, zeros_like

# Squares of normally distributed numbers are hardly ever so many times their mean.
_FEW = 32.0


class FactoredState(NamedTuple):
    """State of `scale_by_factored_rms`."""

    count: ArrayLike  # int32, []: updates so far.
    row: Any  # Mean square of each row, float32, the shapes of the parameters with 1 in place of the columns.
    column: Any  # The same for each column.


def scale_by_factored_rms(b2: ArrayLike, eps: ArrayLike) -> optax.GradientTransformation:
    """Divides gradients by the root of a second moment that is the product of its rows and columns (Adafactor).

    For matrices without large outliers it is `optax.scale_by_factored_rms` (Shazeer, Stern 2018, arXiv 1804.04235) with
    `epsilon=eps**2` and the decay rates of a mean with a bias correction. A leaf of more dimensions is a stack of
    matrices (see `matrix_axes`); with fewer than two, every element has its own second moment.

    A square raises the means of its row and of its column by at most a quarter, unless it is below `1 / (1 - b2)` times
    that of its matrix, or 32 times the second moment that these three give. Without the bound, one gradient of 1e6
    times the others, in step 5, multiplies all other updates of a 64 x 128 leaf by 4,500, and the means remember it. In
    matrices that grow for good and rows that start late, all squares together still raise a mean at once. In the first
    gradient of a matrix, four times the geometric means replace the means; there one element of 1e6 still multiplies
    the others by 1.6 in a matrix of 16 x 16, for ten steps. Squares count up to 2**100, and NaN counts as the bound.

    As in AdamW, weight decay and learning rate follow it in a chain; a momentum comes last.

    Args:
        b2: Decay rate, in [0, 1).
        eps: >= 0. Its square is added to the means, or the smallest normal float32 number if that is larger.

    Returns:
        A transformation whose updates are at most `(1 - b2)**-0.5`, as under Adam, or 5.7, whichever is more, also
        for an infinite gradient; NaN gives NaN. Its means are float32 for gradients and parameters of up to 32 bits.
    """

    def init(params):
        zeros = lambda axes: jax.tree.map(lambda p: _zero_means(p, _averaged(jnp.shape(p))[axes]), params)  # noqa: E731
        return FactoredState(jnp.int32(0), zeros(0), zeros(1))

    def update(updates, state, params=None):
        structure = jax.tree.structure(updates)
        leaves, rows, columns = map(structure.flatten_up_to, (updates, state.row, state.column))
        t = state.count.astype(jnp.float32)
        rate = b2 * (1 - b2**t) / (1 - b2 ** (t + 1))
        results = [_scaled(rate, eps, *leaf) for leaf in zip(leaves, rows, columns, strict=True)]
        scaled, rows, columns = map(structure.unflatten, zip(*results, strict=True)) if leaves else (updates,) * 3
        like = updates if params is None else params
        scaled = jax.tree.map(lambda u, g, p: u.astype(jnp.result_type(g, p)), scaled, updates, like)
        return scaled, FactoredState(optax.safe_increment(state.count), rows, columns)

    return optax.GradientTransformation(init, update)


def matrix_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Which axes of a leaf are the rows and the columns of its matrices: the two longest.

    The first of three or more axes stacks matrices and is left out, unless its length is half the product of the others
    or more, or fewer than two of the others are 4 or longer: `[layers, n, m]` is a stack, and kernels are
    `[d, heads, size]`, `[d, 3, d]` and `[c, k, 3, 3]`.
    """
    rest = shape[1:]
    stack = len(shape) > 2 and 2 * shape[0] < math.prod(rest) and sorted(rest)[-2] >= 4
    row, column = sorted(sorted(range(stack, len(shape)), key=lambda axis: shape[axis])[-2:])
    return row, column


def _averaged(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which axes the means of rows and of columns average over."""
    if len(shape) < 2:
        return (), tuple(range(len(shape)))
    row, column = matrix_axes(shape)
    return (column,), (row,)


@functools.partial(jax.jit, static_argnums=1, keep_unused=True)  # On the devices of p.
def _zero_means(p: Array, axes: tuple[int, ...]) -> Array:
    """Zeros in the sharding of the means of p; XLA makes no array of the shape of p."""
    return jnp.sum(zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), axis=axes, keepdims=True)


@jax.jit
def _scaled(rate, eps, gradient, row, column):
    """The update of a leaf, and its means of bounded squares."""
    if not gradient.size:
        return gradient, row, column
    g, rate = as_real(gradient).astype(row.dtype), jnp.asarray(rate).astype(row.dtype)
    (over_columns, over_rows), share = _averaged(g.shape), 1 - rate
    bound = lax.stop_gradient(_bound(share, gradient, row, column))
    square = jnp.where(g * g < bound, g * g, bound)  # The bound for NaN.
    row = rate * row + share * _mean(square, over_columns)
    column = rate * column + share * _mean(square, over_rows)

    eps = jnp.maximum(jnp.square(eps), jnp.finfo(jnp.float32).tiny).astype(row.dtype)
    update = g * (jnp.sqrt(_mean(row, over_rows) + eps) * lax.rsqrt(row + eps)) * lax.rsqrt(column + eps)
    largest = jnp.sqrt(jnp.maximum(1 / share, _FEW))
    # Not jnp.clip: with it XLA:CPU loses NaN where only a reduction reads the update.
    return lax.clamp(-largest, update, largest), row, column


def _bound(share: Array, g: Array, row: Array, column: Array) -> Array:
    """The bound of each square. The share is that of a new square in the mean of one element."""
    over_columns, over_rows = _averaged(g.shape)
    row, column, whole = _before(g, (row, column, _mean(row, over_rows)))
    # In a mean over n elements each has 1 / n of that share.
    quarter = lambda axes: jnp.maximum(math.prod(g.shape[axis] for axis in axes) / 4 / share, _FEW)  # noqa: E731
    bound = jnp.minimum(quarter(over_columns) * row, quarter(over_rows) * column)
    bound = jnp.maximum(bound, jnp.maximum(1 / share, _FEW) * whole)
    model = (_FEW * row / jnp.where(whole > 0, whole, 1)) * column
    return jnp.minimum(jnp.maximum(bound, model), 2.0**100)


def _before(g: Array, means: tuple[Array, ...]) -> tuple[Array, ...]:
    """The means of rows, columns and matrices that bound a square; for the first gradient of a matrix, its own."""
    return lax.cond(jnp.all(means[2] > 0), lambda g, means: means, _first, g, varying_like(means, g))


def _first(g: Array, means: tuple[Array, ...]) -> tuple[Array, ...]:
    """Four times the geometric means, for matrices that have always been zero: no single element counts for much.

    The means are over the finite, nonzero squares; for normally distributed numbers the result is about their mean.
    """
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731

    def logarithms(g):
        # Cast here, because the operand of a conditional is written out, and the gradient may have half the bytes.
        size = jnp.abs(as_real(g).astype(means[0].dtype))
        counts = (size > 0) & (size < jnp.inf)
        return jnp.where(counts, jnp.log(size), 0), counts.astype(size.dtype)

    def added(terms, axes):
        return tuple(jnp.expand_dims(x, axes) for x in lax.reduce(terms, (terms[0].dtype.type(0),) * 2, add, axes))

    def geometric(sums, mean):
        logarithm, number = sums
        square = jnp.where(number > 0, 4 * jnp.exp(2 * logarithm / jnp.maximum(number, 1)), 0)
        return jnp.where(means[2] > 0, mean, jnp.minimum(square, 2.0**100))

    over_columns, over_rows = _averaged(g.shape)
    rows = added(logarithms(g), over_columns)
    # Without the barrier XLA:GPU writes the logarithms out for both sums, 5 bytes per element.
    again = lax.platform_dependent(g, cuda=lax.optimization_barrier, default=lambda g: g)
    columns = added(logarithms(again), over_rows)
    return tuple(map(geometric, (rows, columns, added(rows, over_rows)), means))


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.mean(x, axis=axes, keepdims=True)
