"""Any Optax transformation, with its moments in 8 bits."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax._checks import check_number
from altgrad_jax.formats import FloatFormat, as_format
from altgrad_jax.grid import as_real
from altgrad_jax.grid_array import RESCALE_PERIOD, GridArray, is_grid_array, nan_index, with_nan
from altgrad_jax.rounding import leaf_words, nearest_index, power_of_two_scale, random_bits, stochastic_index

# Three mantissa bits and 2**18 between the smallest and the largest number.
FIRST = as_format("E4M3")
# No sign, so three mantissa bits and 2**34. Up to 1.75 only, so that scales of tiny moments stay normal numbers.
SECOND = FloatFormat("moment_e5m3", exponent_bits=5, mantissa_bits=3, bias=31, max=1.75)
# By how much a moment can grow between two looks. The root of a second moment reaches further than a first moment, so
# that no burst of gradients is cut off in the denominator alone.
HEADROOM = {FIRST: 2.0**4, SECOND: 2.0**10}
# By how much a scale shrinks at every fourth look, at most: after a thousand steps without gradients the next ones
# should still fit.
SHRINKAGE = {FIRST: 0.5, SECOND: 0.25}
SHRINKAGE_PERIOD = 4 * RESCALE_PERIOD
DEFAULTS = ("mu", "trace", "momentum", "nu")


class CompressedState(NamedTuple):
    """State of `compress_state`."""

    moment_step: jax.Array  # uint32, []: updates so far, modulo 2**32. It keys the random bits.
    saturated: jax.Array  # uint32, []: elements found at the largest number when looked at, modulo 2**32.
    inner_state: optax.OptState  # That of the inner transformation, its moments GridArrays.


def compress_state(
    inner: optax.GradientTransformation,
    *,
    first: tuple[str, ...] = ("mu", "trace", "momentum"),
    second: tuple[str, ...] = ("nu",),
    seed: int = 0,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of an Optax transformation in one byte per element, rounded stochastically.

    A leaf of the inner state is compressed if it lies under a named field of a state, at the path and in the shape of
    a parameter, is floating and has `min_size` elements. Everything else stays as it is: the moments of small leaves,
    and those in fields of other names (`m1` and `m2` of `optax.contrib.ademamix`, `nu_max` of `optax.amsgrad`).

    Moments become GridArrays with one power-of-two scale per leaf. First moments have 3 mantissa bits, a sign and a
    range of 2**18; second moments have no sign, 3 mantissa bits and a range of 2**34. Rounding is unbiased, as to
    nearest a moment freezes as soon as its relative change per step (0.001 for a decay of 0.999) is less than half a
    step of its grid. It makes a second moment with decay 0.999 scatter by a tenth to a fifth, and an element of a first
    moment that is 2**14 times smaller than the largest of its leaf jump between 0 and the smallest number; behind the
    division by the second moment, where `grid_adamw` has it, there are none such. A nonzero second moment never
    becomes 0, and a negative one becomes NaN.

    At each of the first 64 steps and then every 64 steps the scales are chosen anew, such that a first moment can grow
    16 times until the next look and a second one 1024 times; every 256 steps (at the start, at each look) they shrink
    to a half and a quarter at most, as gradients can pause. What grows further saturates until the next look, and so
    does all of a leaf whose first gradient comes later: `saturated` counts the elements that are still there then,
    which is a lower bound. For the scales, a step that looks runs the inner transformation twice.

    Works around any transformation, `on_grid` included, whose momentum is a first moment. Not for those that subtract
    the square of a first moment from a second, which rounding can make negative (`optax.rmsprop(centered=True)`), and
    not for the largest of all second moments (`optax.amsgrad`), which grows with their scatter. A field may hold what
    its name does not say: `nu` of `optax.sm3` is a first moment.

    As with `on_grid`, lanes of `jax.vmap` and shards of `jax.shard_map` draw the same bits unless the seed is mapped
    too. On other shardings XLA may contract products and sums differently: if a float32 moment differs in its last
    bit, it can be rounded the other way.

    Args:
        inner: The transformation whose state is compressed.
        first: Names of the state fields with moments of either sign.
        second: Names of the state fields with nonnegative moments, under a root in a denominator.
        seed: Of the random bits, which are a function of the seed, the number of the step, the path of the leaf in
            the state and the position of the element alone.
        min_size: Elements that a leaf must have; under `optax.inject_hyperparams` a static argument.

    Returns:
        A transformation whose update needs the parameters if the inner one does. Without them the inner transformation
        sees float32 moments, with them moments of the dtype that it gave them. With `optax.tree.map_params` give
        `is_leaf=lambda leaf: isinstance(leaf, GridArray)` to map one value, such as a sharding, to a moment.

    Raises:
        ValueError: If an argument is out of bounds, a name is in `first` and `second`, or, in `init`, if a name that
            is no default, or all of them, are no field with a moment of the inner state, or it is compressed already.
        TypeError: If `first` or `second` is not a sequence of names, or `min_size` is an array.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> tx = ag.compress_state(optax.adamw(3e-3))
        >>> state = tx.init({"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)})
        >>> optax.tree.get(state, "mu")["kernel"], optax.tree.get(state, "nu")["kernel"]
        (GridArray(E4M3, shape=(64, 128), int8 + float32[1,1]),
         GridArray(moment_e5m3, shape=(64, 128), uint8 + float32[1,1]))
    """
    first, second = _names("first", first), _names("second", second)
    if set(first) & set(second):
        raise ValueError(f"first and second must not share names, got {sorted(set(first) & set(second))} in both.")
    check_number("seed", seed, "[0, 4294967295]", integer=True)
    if isinstance(min_size, jax.Array):
        raise TypeError(f"min_size must be a number, got {min_size}: name it in the static_args of inject_hyperparams.")
    check_number("min_size", min_size, "[0, inf)")
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state = inner.init(params)
        if any(map(is_grid_array, jax.tree.leaves(state, is_leaf=is_grid_array))):
            raise ValueError(
                "compress_state found GridArrays in the state of the inner transformation: compress it once only, and "
                "parameters that are stored on a grid need on_grid inside of compress_state."
            )
        paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_grid_array)
        shapes = {path: jnp.shape(param) for path, param in paths}
        fields, found = set(), set()

        def leaf(path, moment):
            for i, key in enumerate(path):
                name = getattr(key, "name", None)
                fields.add(name)
                if name in (*first, *second) and shapes.get(path[i + 1 :]) == jnp.shape(moment):
                    found.add(name)
                    if jnp.issubdtype(moment.dtype, jnp.floating) and moment.size >= min_size:
                        return _initial(moment, name in second)
            return moment

        state = jax.tree.map_with_path(leaf, state)
        missing = {name for name in (*first, *second) if name not in DEFAULTS} - found
        # Without parameters there are no moments to find: optax.tree.map_params asks for such a state.
        if shapes and (missing or not found):
            raise ValueError(
                f"compress_state found no moments of the shapes of the parameters under "
                f"{sorted(missing or {*first, *second})} "
                f"in the inner state, whose fields are {sorted(fields - {None})}: name them in `first` and `second`."
            )
        return CompressedState(jnp.uint32(0), jnp.uint32(0), state)

    def update(updates, state, params=None, **extra_args):
        leaves, tree = jax.tree_util.tree_flatten_with_path(state.inner_state, is_leaf=_is_moment)
        leaves = [(path, _joined(leaf) if _is_moment(leaf) else leaf) for path, leaf in leaves]
        stored = [(i, path, moment) for i, (path, moment) in enumerate(leaves) if is_grid_array(moment)]

        dtypes = [jnp.float32] * len(leaves)
        if params is not None:
            given = jax.eval_shape(inner.init, params)
            if jax.tree.structure(given) == tree:
                dtypes = [leaf.dtype for leaf in jax.tree.leaves(given)]

        def inner_update():
            moments = [m.value(dtype) if is_grid_array(m) else m for (_, m), dtype in zip(leaves, dtypes, strict=True)]
            floats = tree.unflatten(moments)
            updated, inner_state = inner.update(updates, floats, params, **extra_args)
            return updated, tree.flatten_up_to(inner_state)

        def look():
            # The update once more, for the sake of the scales alone: were they made of the moments that the step
            # stores, these would be written in float32 at every step.
            _, moments = inner_update()
            counts = [jnp.sum(_magnitude(m) == m.format.max_index, dtype=jnp.uint32) for _, _, m in stored]
            shrinks = (state.moment_step < RESCALE_PERIOD) | (state.moment_step % SHRINKAGE_PERIOD == 0)
            return [_scale(moments[i], m, shrinks) for i, _, m in stored], sum(counts, jnp.uint32(0))

        def no_look():
            return [moment.scale for _, _, moment in stored], jnp.uint32(0)

        # Often at the start, as optax.MultiSteps makes its first real step after several without any.
        due = (state.moment_step < RESCALE_PERIOD) | (state.moment_step % RESCALE_PERIOD == 0)
        scales, saturated = jax.lax.cond(due, look, no_look)
        updated, moments = inner_update()
        for (i, path, moment), scale in zip(stored, scales, strict=True):
            words = leaf_words(seed, path, state.moment_step)
            moments[i] = _rounded(moments[i], dataclasses.replace(moment, scale=scale), words)
        return updated, CompressedState(state.moment_step + 1, state.saturated + saturated, tree.unflatten(moments))

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(moment: jax.Array, second: bool) -> GridArray:
    """The moment that an inner transformation starts with, mostly zeros, to nearest."""
    format, dtype = (SECOND, jnp.uint8) if second else (FIRST, jnp.int8)
    zeros = GridArray(jnp.zeros(moment.shape, dtype), jnp.zeros((1,) * moment.ndim, jnp.float32), format, 0)
    return _rounded(moment, dataclasses.replace(zeros, scale=_scale(moment, zeros, True)), None)


def _scale(moment: jax.Array, before: GridArray, shrinks: jax.typing.ArrayLike) -> jax.Array:
    """A scale for all of a moment that leaves it headroom to grow, and is not much smaller than before."""
    amax = jnp.max(jnp.where(jnp.isfinite(moment), jnp.abs(moment), 0), initial=0, keepdims=True).astype(jnp.float32)
    headroom = jnp.minimum(HEADROOM[before.format] * amax, jnp.finfo(jnp.float32).max)
    # Zeros have no scale of their own: under the smallest one what is cut off is next to nothing in both moments.
    scale = jnp.where(amax == 0, jnp.finfo(jnp.float32).tiny, power_of_two_scale(headroom, before.format))
    return jnp.maximum(scale, jnp.where(shrinks, SHRINKAGE[before.format], 1.0) * before.scale)


def _magnitude(moment: GridArray) -> jax.Array:
    """|index|, int32; 0 for NaN."""
    index = moment.index.astype(jnp.int32)
    return jnp.where(index == nan_index(moment.index.dtype), 0, jnp.abs(index))


def _rounded(moment: jax.Array, like: GridArray, words: jax.Array | None) -> GridArray:
    """Rounds a moment to the format and the scale of a GridArray."""
    x = as_real(moment).astype(jnp.float32)
    scaled = x / like.scale
    if words is None:
        index = nearest_index(scaled, like.grid)
    else:
        index = stochastic_index(scaled, random_bits(words, x.shape), like.grid)
    if like.format is SECOND:
        index = jnp.where(x > 0, jnp.maximum(index, 1), index)
        x = jnp.where(x < 0, jnp.nan, x)
    return dataclasses.replace(like, index=with_nan(index, x, like.index.dtype))


def _is_moment(node: Any) -> bool:
    """Whether a node of a state is a compressed moment, or what flax.nnx.Optimizer makes of one: a mapping."""
    if isinstance(node, Mapping) and set(node) == {"index", "scale"}:
        return getattr(node["index"], "dtype", None) in (jnp.int8, jnp.uint8)
    return is_grid_array(node)


def _joined(moment: GridArray | Mapping) -> GridArray:
    if is_grid_array(moment):
        return moment
    index, scale = moment["index"], moment["scale"]
    return GridArray(index, scale, SECOND if index.dtype == jnp.uint8 else FIRST, 0)


def _names(argument: str, names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a sequence of names of state fields, got {names!r}.")
    return tuple(names)
