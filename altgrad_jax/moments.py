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
from altgrad_jax.grid_array import GridArray, is_grid_array, rescale_due, row_scale, with_nan
from altgrad_jax.rounding import leaf_words, nearest_index, random_bits, stochastic_index

# Four mantissa bits and a sign. Headroom of 4: between two looks a momentum grows with its learning rate.
FIRST = as_format("E3M4")
FIRST_HEADROOM = 4.0
# No sign, so three mantissa bits and 32 binades: 2**8 of them headroom, the rest below the largest element of a row.
# Up to 1.75 only, so that scales of tiny second moments stay normal numbers.
SECOND = FloatFormat("moment_e5m3", exponent_bits=5, mantissa_bits=3, bias=31, max=1.75)
SECOND_HEADROOM = 256.0


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
    a parameter, is floating and has `min_size` elements. Everything else stays as it is. The inner transformation sees
    float32 moments (from which it may make float32 updates of narrower parameters, as with `mu_dtype`), and what it
    returns is rounded to GridArrays with a power-of-two scale per row: first moments to
    4 mantissa bits and a sign, in 7 normal binades and 2**-6 of steps below; second moments, which have no sign, to
    3 mantissa bits in 32 binades. Rounding is unbiased, as to nearest a moment freezes as soon as its relative
    change per step (0.001 for a decay of 0.999) is less than half a step; a nonzero second moment never becomes 0, and
    a negative one becomes NaN.

    At the start, after 1, 2, 4, 8, 16 and 32 steps and then every 64 steps the scales are chosen anew, such that a
    first moment can grow 4 times and a second one 256 times. What grows further in between saturates until the next
    look, which `saturated` counts.

    Works around any transformation, `on_grid` included, whose momentum is a first moment. Not for those that subtract
    the square of a first moment from a second (`optax.rmsprop(centered=True)`): the difference of two rounded numbers
    can be negative. A field may hold what its name does not say: `nu` of `optax.sm3` is a first moment.

    Args:
        inner: The transformation whose state is compressed.
        first: Names of the state fields with moments of either sign.
        second: Names of the state fields with nonnegative moments, under a root in a denominator.
        seed: Of the random bits, which are a function of the seed, the number of the step, the path of the leaf in
            the state and the position of the element alone.
        min_size: Elements that a leaf must have.

    Returns:
        A transformation of the same updates; its update needs the parameters if the inner one does.

    Raises:
        ValueError: If an argument is out of bounds, a name is in `first` and `second`, or, in `init`, if no state
            field has any of the names or the state is compressed already.
        TypeError: If `first` or `second` is not a sequence of names.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> tx = ag.compress_state(optax.adamw(3e-3))
        >>> state = tx.init({"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)})
        >>> optax.tree.get(state, "mu")["kernel"], optax.tree.get(state, "nu")["kernel"]
        (GridArray(E3M4, shape=(64, 128), int8 + float32[64,1]),
         GridArray(moment_e5m3, shape=(64, 128), uint8 + float32[64,1]))
    """
    first, second = _names("first", first), _names("second", second)
    if set(first) & set(second):
        raise ValueError(f"first and second must not share names, got {sorted(set(first) & set(second))} in both.")
    check_number("seed", seed, "[0, 4294967295]", integer=True)
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
        fields, found = set(), False

        def leaf(path, moment):
            nonlocal found
            for i, key in enumerate(path):
                name = getattr(key, "name", None)
                fields.add(name)
                if name in (*first, *second) and shapes.get(path[i + 1 :]) == jnp.shape(moment):
                    found = True
                    if jnp.issubdtype(moment.dtype, jnp.floating) and moment.size >= min_size:
                        return _initial(moment, name in second)
            return moment

        state = jax.tree.map_with_path(leaf, state)
        # Without parameters there are no moments to find: optax.tree.map_params asks for such a state.
        if shapes and not found:
            raise ValueError(
                f"compress_state found no moments of the shapes of the parameters under the fields {(*first, *second)} "
                f"of the inner state, which has {sorted(fields - {None})}: name them in `first` and `second`."
            )
        return CompressedState(jnp.uint32(0), jnp.uint32(0), state)

    def update(updates, state, params=None, **extra_args):
        leaves, tree = jax.tree_util.tree_flatten_with_path(state.inner_state, is_leaf=_is_moment)
        leaves = [(path, _joined(leaf) if _is_moment(leaf) else leaf) for path, leaf in leaves]
        stored = [(i, path, moment) for i, (path, moment) in enumerate(leaves) if is_grid_array(moment)]

        def inner_update():
            floats = tree.unflatten([m.value() if is_grid_array(m) else m for _, m in leaves])
            updated, inner_state = inner.update(updates, floats, params, **extra_args)
            return updated, tree.flatten_up_to(inner_state)

        def look():
            # The update once more, for the sake of the scales alone: were they made of the moments that the step
            # stores, these would be written in float32 at every step.
            _, moments = inner_update()
            counts = [jnp.sum(m.index == m.grid.max_index, dtype=jnp.uint32) for _, _, m in stored]
            return [_scale(moments[i], m.format) for i, _, m in stored], sum(counts, jnp.uint32(0))

        def no_look():
            return [moment.scale for _, _, moment in stored], jnp.uint32(0)

        scales, saturated = jax.lax.cond(rescale_due(state.moment_step), look, no_look)
        updated, moments = inner_update()
        for (i, path, moment), scale in zip(stored, scales, strict=True):
            words = leaf_words(seed, path, state.moment_step)
            moments[i] = _rounded(moments[i], dataclasses.replace(moment, scale=scale), words)
        return updated, CompressedState(state.moment_step + 1, state.saturated + saturated, tree.unflatten(moments))

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(moment: jax.Array, second: bool) -> GridArray:
    """The moment that an inner transformation starts with, mostly zeros, to nearest."""
    format, dtype = (SECOND, jnp.uint8) if second else (FIRST, jnp.int8)
    scale = _scale(moment, format)
    return _rounded(moment, GridArray(jnp.zeros(moment.shape, dtype), scale, format, 0), None)


def _scale(moment: jax.Array, format: FloatFormat) -> jax.Array:
    """A scale per row that leaves headroom to grow, and keeps the smallest second moment a normal number."""
    moment = as_real(moment).astype(jnp.float32)
    if format is FIRST:
        return row_scale(moment, format, FIRST_HEADROOM)
    return jnp.maximum(row_scale(moment, format, SECOND_HEADROOM), 2.0**-90)


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
