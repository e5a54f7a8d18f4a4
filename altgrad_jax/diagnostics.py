"""Pure measurements of weights, gradients, moments and movements on a grid: arrays or trees in, scalars out.

Trees are measured as one: a share is a share of all their elements. GridArrays count as the numbers that they stand
for, fraction bits included, and have their own format. `format`, anything that `as_format` accepts, is the grid of
arrays, by default their own dtype; `scale` is in real units per unit of it. Everything except `storage` can be jitted,
with the format static.

`stall_rate` does not rank methods, because most weights stand still in a step under any unbiased rounding;
`effective_descent_quality` over a window does. `storage` is a table for people, also of shapes.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from altgrad_jax._checks import check_number
from altgrad_jax._floats import as_real, largest
from altgrad_jax.codec import decode, encode, narrowed
from altgrad_jax.formats import FloatFormat, FormatLike, as_format, own_format
from altgrad_jax.grid import scaled_ulp
from altgrad_jax.grid_array import flatten_stored, from_grid, is_grid_array, map_stored
from altgrad_jax.random_words import leaf_keys, mix, random_words
from altgrad_jax.rounding import round_nearest
from altgrad_jax.weights import reasons_against


class UlpDistance(NamedTuple):
    """Distances in ULPs, float32, []."""

    mean: jax.Array
    median: jax.Array
    p99: jax.Array
    max: jax.Array
    zero_share: jax.Array  # Share of elements that did not move.


class GridAlignment(NamedTuple):
    """Distances to the nearest number of a grid, float32, []."""

    mean_ulps: jax.Array  # At most 0.5, except where elements saturate.
    max_ulps: jax.Array
    on_grid_share: jax.Array


class GradientStiffness(NamedTuple):
    """How gradients relate to the spacing of the grid, float32, []."""

    correlation: jax.Array  # Pearson's, of |gradient| and spacing.
    ratio: jax.Array  # Mean of |gradient| / spacing.
    below_share: jax.Array  # Share of gradients smaller than the spacing.


class Capacity(NamedTuple):
    """How much of a format is used."""

    codes_used: jax.Array  # int32, []: distinct numbers.
    codes: int  # How many there are, with both signs and zero.
    entropy: jax.Array  # float32, []: bits per element.


class Freeze(NamedTuple):
    """When weights on a grid stop moving."""

    last_move: Any  # int32, shapes of the weights: number of the last step that moves each, from 1; 0 if none does.
    never_share: jax.Array  # float32, []: share of weights that no step moves.


def storage(params: Any) -> str:
    """A table of the leaves of a tree: path, shape, how it is stored, bytes per element, and why it is not a GridArray.

    The reason is that of the default of `to_grid`; a weight that is not a GridArray is "left out". Leaves may be
    shapes. A leaf that is not an array counts no bytes.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> print(ag.diagnostics.storage(ag.to_grid({"kernel": jnp.ones((64, 64)), "scale": jnp.ones((2, 64))})))
        ['kernel']  (64, 64)  float8_e3m4  1.02
        ['scale']   (2, 64)   float32      4.00  named scale
        all                                1.11
    """
    paths, leaves, _ = flatten_stored(params)
    rows, total, size = [], 0, 0
    for path, leaf, reason in zip(paths, leaves, reasons_against(paths, leaves), strict=True):
        arrays = [leaf.index, leaf.exponent] if is_grid_array(leaf) else [leaf] if hasattr(leaf, "dtype") else []
        stored, elements = sum(x.size * x.dtype.itemsize for x in arrays), arrays[0].size if arrays else 0
        if is_grid_array(leaf):
            kind, reason = leaf.format.name + f" + {leaf.fraction_bits} bits" * bool(leaf.fraction_bits), ""
        else:
            kind, reason = str(leaf.dtype) if arrays else type(leaf).__name__, reason or "left out"
        shape = str(tuple(leaf.shape)) if arrays else ""
        rows.append((jax.tree_util.keystr(path), shape, kind, f"{stored / max(elements, 1):.2f}", reason))
        total, size = total + stored, size + elements
    rows.append(("all", "", "", f"{total / max(size, 1):.2f}", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def fingerprint(tree: Any) -> jax.Array:
    """A hash of all bits of a tree of arrays, of their places in it and of its key paths; uint32, [].

    The same on any sharding: save it beside a checkpoint and compare it after the restore, because most formats of
    files have no checksum. A change of one element changes it for certain, other changes all but once in 2**32.
    GridArrays count with version, format and fraction bits. Numbers of Python count as arrays of their default dtype.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.fingerprint(jnp.ones(3)) == ag.diagnostics.fingerprint(jnp.array([1.0, 1.0, 1.0]))
        Array(True, dtype=bool)
    """
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    # By names alone: Flax nnx makes a dictionary of a GridArray in the state of an optimizer.
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_path]
    paths, leaves = [(jax.tree_util.DictKey(name),) for name in names], [jnp.asarray(leaf) for _, leaf in with_path]
    shapes = np.array([zlib.crc32(f"{leaf.dtype}{leaf.shape}".encode()) for leaf in leaves], np.uint32)
    keys = mix(leaf_keys(0, jnp.uint32(0), paths) ^ shapes[:, None])
    return sum(map(_hash, leaves, keys), jnp.uint32(0))


def stall_rate(update: Any, before: Any, after: Any) -> jax.Array:
    """Share of elements that keep their number, among those with a nonzero update: 1 - `flip_rate`.

    Args:
        update: The intended movement, a tree of real arrays: what the optimizer made before rounding.
        before, after: Weights, or a state of moments, before and after the step: trees of arrays or GridArrays.
            Integer leaves, such as counters, are left out.

    Returns:
        float32 in [0, 1], []; NaN if no update is nonzero.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.stall_rate(jnp.array([0.1, 0.0, -0.1]), jnp.ones(3), jnp.array([1.0, 1.0, 0.9]))
        Array(0.5, dtype=float32)
    """
    return _share_of_meant(jnp.equal, update, before, after)


def flip_rate(update: Any, before: Any, after: Any) -> jax.Array:
    """Share of elements that change their number, among those with a nonzero update; arguments as in `stall_rate`.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.flip_rate(jnp.array([0.1, 0.0, -0.1]), jnp.ones(3), jnp.array([1.0, 1.0, 0.9]))
        Array(0.5, dtype=float32)
    """
    return _share_of_meant(jnp.not_equal, update, before, after)


def ulp_distance(before: Any, after: Any, format: FormatLike | None = None) -> UlpDistance:
    """Statistics of abs(after - before) / spacing(before), of trees; fraction bits do not change the spacing.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.ulp_distance(jnp.array([1.0, -4.0]), jnp.array([1.5, -4.0]), "float8_e4m3fn").mean
        Array(2., dtype=float32)
    """

    def leaf(x, y):
        real = _real(x)
        return jnp.abs(_real(y) - real) / scaled_ulp(real, *_grid(x, format))

    ulps = _joined(leaf, before, after)
    median, p99 = jnp.quantile(ulps, jnp.array([0.5, 0.99]))
    return UlpDistance(jnp.mean(ulps), median, p99, largest(ulps), jnp.mean(ulps == 0))


def grid_alignment(x: Any, format: FormatLike, scale: ArrayLike = 1.0) -> GridAlignment:
    """Distances of real numbers, a tree of arrays, to the nearest number of a scaled format, in its ULPs.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.grid_alignment(jnp.array([1.0, 1.03125]), "float8_e4m3fn").on_grid_share
        Array(0.5, dtype=float32)
    """
    format = as_format(format)

    def leaf(x):
        x = _real(x)
        return jnp.abs(x - scale * round_nearest(x / scale, format)) / scaled_ulp(x, format, scale)

    ulps = _joined(leaf, x)
    return GridAlignment(jnp.mean(ulps), largest(ulps), jnp.mean(ulps == 0))


def gradient_stiffness(gradients: Any, params: Any, format: FormatLike | None = None) -> GradientStiffness:
    """Correlation, ratio and order of gradients and the spacing of the grid at their weights, weights at 0 left out.

    The correlation is NaN if either is constant.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.gradient_stiffness(jnp.array([0.1, -0.4]), jnp.array([1.0, 4.0]), "float8_e4m3fn").ratio
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


def saturation_share(x: Any, format: FormatLike | None = None, scale: ArrayLike = 1.0) -> jax.Array:
    """Share of elements at the largest number of a scaled format, or beyond; integer leaves of a state are left out.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.saturation_share(jnp.array([448.0, -500.0, 3.0, 0.0]), "float8_e4m3fn")
        Array(0.5, dtype=float32)
    """

    def leaf(x):
        grid, own = _grid(x, format, scale)
        return jnp.abs(_real(x)) >= grid.max * own

    return jnp.mean(_joined(leaf, _real_leaves(x)))


def subnormal_share(x: Any, format: FormatLike | None = None, scale: ArrayLike = 1.0) -> jax.Array:
    """Share of elements that are nonzero and below the smallest normal number; without exponent bits none is normal.

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


def capacity(x: Any, format: FormatLike | None = None, scale: ArrayLike = 1.0) -> Capacity:
    """How many numbers of one format a tree uses, and the entropy of their distribution.

    Arrays are rounded to nearest; fraction bits of GridArrays are ignored.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.capacity(jnp.array([1.0, 1.0, -1.0, 0.0]), "float4_e2m1fn").codes_used
        Array(3, dtype=int32)
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

    counts = jnp.bincount(_joined(leaf, x), length=codes)
    return Capacity(jnp.sum(counts > 0, dtype=jnp.int32), codes, _entropy(counts / jnp.sum(counts)) / jnp.log(2.0))


def stable_rank(x: jax.Array) -> jax.Array:
    """Squared Frobenius norm over squared spectral norm of matrices `[..., m, n]`, float32 `[...]`; NaN for zeros.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0])))
        Array(1.5, dtype=float32)
    """
    squares = _spectrum(x) ** 2
    return jnp.sum(squares, axis=-1) / largest(squares, -1)


def effective_rank(x: jax.Array) -> jax.Array:
    """Exponential of the entropy of the singular values, scaled to sum 1, of matrices `[..., m, n]`; float32 `[...]`.

    Roy, Vetterli (2007), The effective rank: a measure of effective dimensionality.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.effective_rank(jnp.eye(3))
        Array(3., dtype=float32)
    """
    spectrum = _spectrum(x)
    return jnp.exp(_entropy(spectrum / jnp.sum(spectrum, axis=-1, keepdims=True)))


def variance_rank(x: jax.Array, share: float = 0.99) -> jax.Array:
    """How many singular values of matrices `[..., m, n]` hold a share of the sum of their squares; float32 `[...]`.

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
    """Projection of the realised movement on the intended one, over the length of the intended one; float32, [].

    1 if the weights moved as intended, 0 if they did not move or moved at right angles, NaN if nothing was intended.
    For windows of steps, where `intended` is the sum of the updates of the optimizer, without errors that are carried
    from step to step. Collage (arXiv 2405.03637) multiplies it by the length of `intended`.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.diagnostics.effective_descent_quality(jnp.array([0.5, 0.5]), jnp.zeros(2), jnp.array([0.5, 0.0]))
        Array(0.5, dtype=float32)
    """
    u, moved = _joined(_real, intended), _joined(_real, after) - _joined(_real, before)
    return jnp.sum(u * moved) / jnp.sum(u * u)


def predict_freeze(trace: Any, format: FormatLike, *, scale: Any = 1.0, fraction_bits: int = 0) -> Freeze:
    """Predicts from a float32 trajectory when weights that are rounded to nearest on a grid would stop moving.

    A weight takes the steps of the trajectory, but rounds to nearest after each and remembers nothing. Where
    freezing costs much loss, gradients grow and fewer weights freeze than predicted.

    Args:
        trace: A tree of real arrays `[steps + 1, ...]`: the weights before the first step and after each.
        format: The grid.
        scale: Powers of two by which it is multiplied, a number or a tree like the weights.
        fraction_bits: As in `to_grid`.

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


def _grid(x: Any, format: FormatLike | None, scale: ArrayLike = 1.0) -> tuple[FloatFormat, ArrayLike]:
    """The format and the scale: those of a GridArray, or the given ones of an array."""
    if is_grid_array(x):
        if format is not None:
            raise ValueError(f"GridArrays have a format of their own, {x.format.name}, and exclude format={format}.")
        return x.format, x.scale
    return (own_format(jnp.result_type(x)) if format is None else as_format(format)), scale


def _real_leaves(tree: Any) -> list[Any]:
    """The GridArrays and the floating leaves of a tree."""
    leaves = flatten_stored(tree)[1]
    return [x for x in leaves if is_grid_array(x) or not jnp.issubdtype(jnp.result_type(x), jnp.integer)]


def _joined(f: Any, *trees: Any) -> jax.Array:
    """A function of leaves, mapped over trees, as one vector."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(map_stored(f, *trees))])


def _share_of_meant(counts: Any, update: Any, before: Any, after: Any) -> jax.Array:
    """Share of elements that count, among those with a nonzero update."""
    meant, before, after = (_joined(_real, _real_leaves(tree)) for tree in (update, before, after))
    return jnp.sum((meant != 0) & counts(before, after)) / jnp.sum(meant != 0)


@jax.jit
def _hash(x: jax.Array, key: jax.Array) -> jax.Array:
    """The sum of a bijection, that of its place, of each element: the order of summation does not matter."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.finfo(x.dtype).bits
        x = lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")) if bits >= 8 else x.astype(jnp.float32)
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.int32)
    bits = lax.bitcast_convert_type(x, jnp.uint32)  # One more axis for 64 bits.
    words = mix(bits ^ random_words(key, bits.shape))
    return mix(key[1]) + jnp.sum(words, dtype=jnp.uint32)


def _entropy(p: jax.Array) -> jax.Array:
    """Entropy in nats of shares `[..., n]`."""
    return -jnp.sum(jnp.where(p == 0, 0, p * jnp.log(jnp.where(p == 0, 1, p))), axis=-1)


def _spectrum(x: jax.Array) -> jax.Array:
    """Singular values, descending; NaN for a matrix with elements that are not finite."""
    x = as_real(x)
    finite = jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True)
    return jnp.where(finite[..., 0], jnp.linalg.svd(jnp.where(finite, x, 0), compute_uv=False), jnp.nan)
