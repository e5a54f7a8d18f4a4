"""Pure measurements of weights, gradients and movements on a grid: arrays or trees of them in, scalars out.

Trees are measured as one: a share is a share of all their elements. GridArrays count as the numbers that they stand
for, fraction bits included. All of it can be jitted, with the format static.

What they can tell, and what not: `stall_rate` says how many weights did not move at a step, which is most of them under
any unbiased rounding, so it does not rank methods; `effective_descent_quality` over a window does, as long as the
intended movement contains no error that was carried from step to step. Ranks, capacity and alignment describe weights,
not their quality.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from altgrad_jax._checks import check_number
from altgrad_jax._floats import as_real
from altgrad_jax.codec import decode, encode, narrowed
from altgrad_jax.formats import FloatFormat, FormatLike, as_format, own_format
from altgrad_jax.grid import scaled_ulp
from altgrad_jax.grid_array import flatten_stored, from_grid, is_grid_array, map_stored
from altgrad_jax.rounding import round_nearest


class UlpDistance(NamedTuple):
    """Distances in ULPs, float32, []."""

    mean: jax.Array
    median: jax.Array
    p99: jax.Array
    max: jax.Array
    zero_share: jax.Array  # Of elements that did not move.


class GridAlignment(NamedTuple):
    """Distances to the nearest number of a grid, float32, []."""

    mean_ulps: jax.Array  # At most 0.5 but for what saturates.
    max_ulps: jax.Array
    on_grid_share: jax.Array


class GradientStiffness(NamedTuple):
    """How gradients go with the spacing of the grid, float32, []."""

    correlation: jax.Array  # Pearson's, of |gradient| and spacing.
    ratio: jax.Array  # Mean of |gradient| / spacing.
    below_share: jax.Array  # Of gradients smaller than the spacing.


class Capacity(NamedTuple):
    """How much of a format is used."""

    codes_used: jax.Array  # int32, []: distinct numbers.
    codes: int  # How many there are, with both signs and zero.
    entropy: jax.Array  # float32, []: bits per element.


class Freeze(NamedTuple):
    """When weights on a grid stop to move."""

    last_move: Any  # int32, shapes of the weights: number of the last step that moves each, from 1; 0 if none does.
    never_share: jax.Array  # float32, []: share of weights that no step moves.


def stall_rate(update: Any, before: Any, after: Any) -> jax.Array:
    """Share of weights that stay where they are among those that were to move.

    Args:
        update: The movement that was intended, a tree of real arrays: what the optimizer made before rounding.
        before: The stored weights, a tree of arrays or GridArrays.
        after: The stored weights after the step.

    Returns:
        A float32 scalar in [0, 1]; NaN if no update is nonzero. With `flip_rate` it adds up to 1.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.stall_rate(jnp.array([0.1, 0.0, -0.1]), jnp.ones(3), jnp.array([1.0, 1.0, 0.9]))
        Array(0.5, dtype=float32)
    """
    meant, moved = _meant_and_moved(update, before, after)
    return jnp.sum(meant & ~moved) / jnp.sum(meant)


def flip_rate(update: Any, before: Any, after: Any) -> jax.Array:
    """Share of weights that became another number among those that were to move; arguments as in `stall_rate`.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.flip_rate(jnp.array([0.1, 0.0, -0.1]), jnp.ones(3), jnp.array([1.0, 1.0, 0.9]))
        Array(0.5, dtype=float32)
    """
    meant, moved = _meant_and_moved(update, before, after)
    return jnp.sum(meant & moved) / jnp.sum(meant)


def ulp_distance(before: Any, after: Any, format: FormatLike | None = None) -> UlpDistance:
    """Statistics of |after - before| / spacing(before).

    Args:
        before: A tree of arrays or GridArrays.
        after: The same, later.
        format: The grid whose ULPs are meant, for arrays. Default: that of their dtype; GridArrays have their own,
            scaled, without fraction bits.

    Returns:
        Five float32 scalars.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> moved = ag.diagnostics.ulp_distance(jnp.array([1.0, -4.0]), jnp.array([1.5, -4.0]), "float8_e4m3fn")
        >>> float(moved.max), float(moved.mean), float(moved.zero_share)
        (4.0, 2.0, 0.5)
    """

    def leaf(x, y):
        real = _real(x)
        return jnp.abs(_real(y) - real) / scaled_ulp(real, *_grid(x, format))

    ulps = _joined(leaf, before, after)
    median, p99 = jnp.quantile(ulps, jnp.array([0.5, 0.99]))
    return UlpDistance(jnp.mean(ulps), median, p99, jnp.max(ulps), jnp.mean(ulps == 0))


def grid_alignment(x: Any, format: FormatLike, scale: jax.typing.ArrayLike = 1.0) -> GridAlignment:
    """Distances of real numbers to the nearest number of a format, in its ULPs.

    Args:
        x: A tree of real arrays.
        format: Anything that `as_format` accepts.
        scale: Real units per unit of the format, a number for all of the tree.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> aligned = ag.diagnostics.grid_alignment(jnp.array([1.0, 1.03125]), "float8_e4m3fn")
        >>> float(aligned.max_ulps), float(aligned.on_grid_share)
        (0.25, 0.5)
    """
    format = as_format(format)

    def leaf(x):
        x = _real(x)
        return jnp.abs(x - scale * round_nearest(x / scale, format)) / scaled_ulp(x, format, scale)

    ulps = _joined(leaf, x)
    return GridAlignment(jnp.mean(ulps), jnp.max(ulps), jnp.mean(ulps == 0))


def gradient_stiffness(gradients: Any, params: Any, format: FormatLike | None = None) -> GradientStiffness:
    """Correlation, ratio and order of gradients and the spacing of the grid at their weights, weights at 0 left out.

    Args:
        gradients: A tree of real arrays.
        params: A tree of arrays or GridArrays of the same shapes.
        format: The grid, for arrays. Default: that of their dtype.

    Returns:
        Three float32 scalars; the correlation is NaN where either does not vary.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> w, g = jnp.array([1.0, 2.0, 4.0]), jnp.array([0.1, 0.2, -0.4])
        >>> ag.diagnostics.gradient_stiffness(g, w, "float8_e4m3fn").ratio
        Array(0.8, dtype=float32)
    """
    stiffness = _joined(lambda w: scaled_ulp(_real(w), *_grid(w, format)), params)
    counted = _joined(_real, params) != 0
    magnitude, n = jnp.abs(_joined(_real, gradients)), jnp.sum(counted)
    mean = lambda x: jnp.sum(jnp.where(counted, x, 0)) / n  # noqa: E731
    g, s = magnitude - mean(magnitude), stiffness - mean(stiffness)
    return GradientStiffness(
        mean(g * s) / jnp.sqrt(mean(g**2) * mean(s**2)), mean(magnitude / stiffness), mean(magnitude < stiffness)
    )


def saturation_share(x: Any, format: FormatLike | None = None, scale: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """Share of elements at the largest number of a scaled format, or beyond; GridArrays have their own.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.saturation_share(jnp.array([448.0, -500.0, 3.0, 0.0]), "float8_e4m3fn")
        Array(0.5, dtype=float32)
    """

    def leaf(x):
        grid, own = _grid(x, format, scale)
        return jnp.abs(_real(x)) >= grid.max * own

    return jnp.mean(_joined(leaf, x))


def subnormal_share(x: Any, format: FormatLike | None = None, scale: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """Share of elements, zero aside, below the smallest normal number; all of them in a uniform format.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.subnormal_share(jnp.array([0.01, -0.01, 3.0, 0.0]), "float8_e4m3fn")
        Array(0.5, dtype=float32)
    """

    def leaf(x):
        grid, own = _grid(x, format, scale)
        limit = jnp.inf if grid.smallest_normal is None else grid.smallest_normal
        return (_real(x) != 0) & (jnp.abs(_real(x)) < limit * own)

    return jnp.mean(_joined(leaf, x))


def capacity(x: Any, format: FormatLike | None = None, scale: jax.typing.ArrayLike = 1.0) -> Capacity:
    """How many numbers of a format a tree uses, and the entropy of their distribution.

    Args:
        x: A tree of arrays, rounded to nearest, or of GridArrays of one format, whose fraction bits are ignored.
        format: Anything that `as_format` accepts; GridArrays have their own.
        scale: Real units per unit of the format, for arrays.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> used = ag.diagnostics.capacity(jnp.array([1.0, 1.0, -1.0, 0.0]), "float4_e2m1fn")
        >>> int(used.codes_used), used.codes, float(used.entropy)
        (3, 15, 1.5)
    """
    grids = {_grid(leaf, format)[0] for leaf in flatten_stored(x)[1]}
    if len(grids) != 1:
        raise ValueError(f"capacity needs a tree of one format, got {sorted(grid.name for grid in grids)}.")
    (grid,) = grids
    if 2 * grid.max_index + 1 > 2**16:
        raise ValueError(f"capacity counts formats of up to 16 bits, got {grid.name}.")

    lowest = -grid.max_index if grid.signed else 0
    codes = grid.max_index - lowest + 1

    def leaf(x):
        numbers = jnp.clip(_real(x, full=False) / _grid(x, format, scale)[1], grid.min, grid.max)
        return encode(narrowed(jnp.where(jnp.isnan(numbers), 0, numbers)), 0, grid) - lowest

    indices = _joined(leaf, x)
    counts = jnp.bincount(indices, length=codes)
    share = counts / indices.size
    entropy = -jnp.sum(jnp.where(counts > 0, share * jnp.log2(jnp.where(counts > 0, share, 1)), 0))
    return Capacity(jnp.sum(counts > 0, dtype=jnp.int32), codes, entropy)


def stable_rank(x: jax.Array) -> jax.Array:
    """Squared Frobenius norm over squared spectral norm of matrices `[..., m, n]`, float32 `[...]`; NaN for zeros.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0])))
        Array(1.5, dtype=float32)
    """
    squares = _spectrum(x) ** 2
    return jnp.sum(squares, axis=-1) / jnp.max(squares, axis=-1)


def effective_rank(x: jax.Array) -> jax.Array:
    """Exponential of the entropy of the singular values of matrices `[..., m, n]`, which sum to 1; float32 `[...]`.

    References:
        Roy, Vetterli (2007), The effective rank: a measure of effective dimensionality.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.effective_rank(jnp.eye(3))
        Array(3., dtype=float32)
    """
    spectrum = _spectrum(x)
    p = spectrum / jnp.sum(spectrum, axis=-1, keepdims=True)
    return jnp.exp(-jnp.sum(jnp.where(p == 0, 0, p * jnp.log(jnp.where(p == 0, 1, p))), axis=-1))


def variance_rank(x: jax.Array, share: float = 0.99) -> jax.Array:
    """How many singular values of matrices `[..., m, n]` hold a share of the sum of their squares; float32 `[...]`.

    Float32, so that NaN in gives NaN out.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.variance_rank(jnp.diag(jnp.array([3.0, 2.0, 0.1])))
        Array(2., dtype=float32)
    """
    check_number("share", share, "(0, 1]")
    squares = _spectrum(x) ** 2  # Descending.
    part = jnp.cumsum(squares, axis=-1) / jnp.sum(squares, axis=-1, keepdims=True)
    rank = jnp.minimum(1 + jnp.sum(part < share, axis=-1), squares.shape[-1])
    return jnp.where(jnp.isnan(part[..., -1]), jnp.nan, rank.astype(jnp.float32))


def effective_descent_quality(intended: Any, before: Any, after: Any) -> jax.Array:
    """Projection of the realised movement on the intended one, over the length of the intended one.

    1 where the weights moved as intended, 0 where they did not move or moved across. Over a window of steps it ranks
    methods that single steps do not: sum the updates that the optimizer meant over the window. These must not contain
    an error that is carried from step to step (the momentum of `on_grid` with feedback does): it is no intention, and
    would make every method with feedback look worse.

    Args:
        intended: The sum of the intended updates, a tree of real arrays.
        before: The weights at the start of the window, a tree of arrays or GridArrays.
        after: The weights at its end.

    Returns:
        A float32 scalar; NaN if nothing was intended.

    References:
        Yu, Lin, Park et al. (2024), Collage: Light-Weight Low-Precision Strategy for LLM Training, arXiv 2405.03637,
        whose quality is this times the length of the intended movement.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.effective_descent_quality(jnp.array([0.5, 0.5]), jnp.zeros(2), jnp.array([0.5, 0.0]))
        Array(0.5, dtype=float32)
    """
    u, moved = _joined(_real, intended), _joined(_real, after) - _joined(_real, before)
    return jnp.sum(u * moved) / jnp.sum(u * u)


def predict_freeze(trace: Any, format: FormatLike, *, scale: Any = 1.0, fraction_bits: int = 0) -> Freeze:
    """From a float32 trajectory, when weights that are rounded to nearest on a grid would stop to move.

    A weight on the grid takes the steps of the trajectory, but rounds to nearest after each and remembers nothing:
    from then on it is frozen at where the trajectory left it. Its gradients are assumed to be those of the float32 run:
    where freezing costs much loss they are larger, and fewer weights freeze (in `examples/format_study` the share that
    never moves was up to 0.10 smaller than predicted).

    Args:
        trace: A tree of real arrays `[steps + 1, ...]`: the weights before the first step and after each.
        format: Anything that `as_format` accepts.
        scale: Powers of two by which the format is multiplied, a number or a tree like the weights.
        fraction_bits: As in `to_grid`: bits of every position behind the point.

    Returns:
        The last step that moves each weight, and the share of weights that no step moves.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> freeze = ag.diagnostics.predict_freeze(jnp.array([[1.0, 1.0], [1.07, 1.01], [1.08, 1.02]]), "float8_e4m3fn")
        >>> freeze.last_move, float(freeze.never_share)
        (Array([1, 0], dtype=int32), 0.5)
    """
    grid = as_format(format).refined(fraction_bits)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(scale)):
        scale = jax.tree.map(lambda _: scale, trace)

    def leaf(weights, scale):
        weights = narrowed(_real(weights))

        def step(carry, now):
            index, last = carry
            number, update = now
            target = decode(index, 0, grid) * scale + update
            moved = encode(target / scale, 0, grid)
            return (moved, jnp.where(moved == index, last, number)), None

        start = encode(weights[0] / scale, 0, grid), jnp.zeros(weights.shape[1:], jnp.int32)
        numbers = jnp.arange(1, len(weights), dtype=jnp.int32)
        return jax.lax.scan(step, start, (numbers, jnp.diff(weights, axis=0)))[0][1]

    last = jax.tree.map(leaf, trace, scale)
    return Freeze(last, jnp.mean(_joined(lambda x: x == 0, last)))


def _real(x: Any, full: bool = True) -> jax.Array:
    return from_grid(x, full=full) if is_grid_array(x) else as_real(x)


def _grid(
    x: Any, format: FormatLike | None, scale: jax.typing.ArrayLike = 1.0
) -> tuple[FloatFormat, jax.typing.ArrayLike]:
    """The format and the scale of an array's own grid, or of the one that was given."""
    if is_grid_array(x):
        if format is not None:
            raise ValueError(f"GridArrays have a format of their own, {x.format.name}, and exclude format={format}.")
        return x.format, x.scale
    return (own_format(jnp.result_type(x)) if format is None else as_format(format)), scale


def _joined(f: Any, *trees: Any) -> jax.Array:
    """A function of leaves, mapped over trees, as one vector."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(map_stored(f, *trees))])


def _meant_and_moved(update: Any, before: Any, after: Any) -> tuple[jax.Array, jax.Array]:
    stored = [_joined(_real, tree) for tree in (before, after)]
    return _joined(_real, update) != 0, stored[0] != stored[1]


def _spectrum(x: jax.Array) -> jax.Array:
    """Singular values, descending; NaN for a matrix with elements that are not finite."""
    x = as_real(x)
    finite = jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True)
    return jnp.where(finite[..., 0], jnp.linalg.svd(jnp.where(finite, x, 0), compute_uv=False), jnp.nan)
