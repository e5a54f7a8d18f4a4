"""Any Optax transformation, with its moments in 8 bits."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from altgrad_jax._checks import check_number, check_static
from altgrad_jax._floats import as_real, power_of_two
from altgrad_jax.codec import encode, exponent_range, index_dtype, magnitude
from altgrad_jax.formats import FloatFormat, as_format
from altgrad_jax.grid_array import GridArray, flatten_stored, is_grid_array, is_split, rejoined, resplit, started
from altgrad_jax.random_words import leaf_keys, random_words
from altgrad_jax.scales import EMPTY, UNSET, fitted, followed, moment_rule, row_maximum, row_shape, with_level

# Three mantissa bits and 2**18 between the smallest and the largest number.
FIRST = as_format("E4M3")
# No sign, so three mantissa bits and 2**34. Up to 1.75 only, so that scales of tiny moments stay normal numbers.
SECOND = FloatFormat("moment_e5m3", exponent_bits=5, mantissa_bits=3, bias=31, max=1.75, signed=False)
DEFAULTS = ("mu", "trace", "momentum", "nu")
_LARGEST = np.finfo(np.float32).max


class CompressedState(NamedTuple):
    """State of `compress_state`."""

    moment_step: jax.Array  # uint32, []: updates so far, modulo 2**32. It keys the random words.
    exponent: Any  # int8: the exponents that the moments take in the next update; None for other leaves.
    inner_state: optax.OptState  # State of the inner transformation, with moments as GridArrays.


def compress_state(
    inner: optax.GradientTransformation,
    *,
    first: tuple[str, ...] = ("mu", "trace", "momentum"),
    second: tuple[str, ...] = ("nu",),
    seed: int = 0,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of an Optax transformation in one byte per element, rounded stochastically.

    A leaf of the inner state is compressed if it lies under a named field of a state, with the path and the shape of a
    parameter, is floating and has `min_size` elements or more. Everything else stays as it is, also GridArrays of
    `on_grid`.

    Moments have 3 mantissa bits. First moments have a sign and a range of 2**18 in each row (as in `to_grid`), second
    moments a range of 2**34. The exponent of a row follows its largest element, one step behind and by few binades at
    once, so that one outlier does not erase its row; a row of zeros takes it from its first gradient. A nonzero second
    moment never becomes 0, a negative one becomes NaN, and an infinite one saturates.

    Not for transformations that subtract the square of a first moment from a second (`optax.rmsprop(centered=True)`) or
    keep the largest second moment (`optax.amsgrad`). `nu` of `optax.sm3` is a first moment.

    Args:
        inner: The transformation whose state is compressed.
        first, second: Names of the state fields with moments of either sign, and with nonnegative moments under a root.
        seed: Seed of the random words, as in `on_grid`.
        min_size: The fewest elements of a compressed leaf; under `optax.inject_hyperparams` a static argument.

    Returns:
        A transformation whose update needs the parameters if the inner one does. With `optax.tree.map_params` give
        `is_leaf=lambda leaf: isinstance(leaf, GridArray)` to map one value, such as a sharding, to a moment. Its init
        raises a ValueError if no name, or a name that is not a default, matches no field with a moment.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> tx = ag.compress_state(optax.adamw(3e-3))
        >>> state = tx.init({"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)})
        >>> optax.tree.get(state.inner_state, "nu")["kernel"]  # state.exponent is a tree of the same names.
        GridArray(moment_e5m3, shape=(64, 128), uint8 + int8[64,1])
    """
    _check_arguments(first, second, seed, min_size)
    inner = optax.with_extra_args_support(inner)

    def leaf(moment, name):
        if name and jnp.issubdtype(moment.dtype, jnp.floating) and moment.size >= min_size:
            return _initial(moment, SECOND if name in second else FIRST)
        return moment, None

    def init(params):
        paths, leaves, structure = _flatten(inner.init(params))
        names = _moment_names(paths, leaves, params, (*first, *second))
        _check_found(names, paths, params, first, second)
        moments, exponents = zip(*map(leaf, leaves, names), strict=True) if leaves else ((), ())
        state = CompressedState(jnp.uint32(0), structure.unflatten(exponents), structure.unflatten(moments))
        return started(params, state)

    def update(updates, state, params=None, **extra_args):
        paths, leaves, structure = _flatten(state.inner_state)
        exponents = structure.flatten_up_to(state.exponent)
        # `optax.tree.set` also sets the fields of that name in the tree of exponents.
        ours = [i for i, leaf in enumerate(leaves) if _is_moment(leaf) and exponents[i] is not None]
        nodes = [leaves[i] for i in ours]
        moments = [rejoined(node, FIRST, SECOND) for node in nodes]
        gradients = _gradients([paths[i] for i in ours], updates)
        exponents = _first_exponents([exponents[i] for i in ours], lax.stop_gradient(gradients), moments)

        for i, moment in zip(ours, moments, strict=True):
            leaves[i] = moment.value()
        updated, inner_state = inner.update(updates, structure.unflatten(leaves), params, **extra_args)

        leaves, following = structure.flatten_up_to(inner_state), [None] * len(leaves)
        keys = leaf_keys(seed, state.moment_step, [paths[i] for i in ours])
        for i, node, moment, exponent, key in zip(ours, nodes, moments, exponents, keys, strict=True):
            moved, following[i] = _stored(leaves[i], moment, exponent, key, state.moment_step)
            leaves[i] = resplit(moved, node)
        stored = structure.unflatten(leaves)
        return updated, CompressedState(state.moment_step + 1, structure.unflatten(following), stored)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _stored(x, like, exponent, key, step):
    """A moment as a GridArray, and its exponents of the next step."""
    format, unset = like.format, exponent == UNSET
    exponent = jnp.where(unset, exponent_range(format)[0], exponent).astype(jnp.int8)
    x = as_real(x).astype(jnp.float32)
    # An infinite moment saturates like any large one: it may be the square of a finite gradient.
    scaled = jnp.clip(x * power_of_two(-exponent.astype(jnp.int32)), -_LARGEST, _LARGEST)
    reach = jnp.where(jnp.isnan(x), 0, magnitude(scaled))
    if not format.signed:
        # A nonzero second moment that becomes 0 would make its element move by any distance.
        scaled = jnp.where(x > 0, jnp.maximum(scaled, format.smallest_subnormal), scaled)
    index = encode(scaled, 0, format, random_words(key, x.shape))
    (index,), level = with_level([(index, index_dtype(format))], reach, exponent.shape, format)
    following = followed(exponent, level, moment_rule(format), format, step)
    moment = dataclasses.replace(like, index=index, exponent=exponent)
    return moment, jnp.where(unset & (level == EMPTY), UNSET, following).astype(jnp.int8)


def _first_exponents(exponents: list, gradients: list, moments: list[GridArray]) -> list:
    """Exponents of rows that have always been zero, from their largest gradients in the step that brings them."""
    fit = lambda *trees: [_from_gradient(*leaf) for leaf in zip(*trees, moments, strict=True)]  # noqa: E731
    some = jnp.any(jnp.array([jnp.any(exponent == UNSET) for exponent in exponents]))
    return lax.cond(some, fit, lambda exponents, _: exponents, exponents, gradients)


def _from_gradient(exponent: jax.Array, gradient: jax.Array, moment: GridArray) -> jax.Array:
    """The largest gradient bounds the first average of its row, and its square that of the squares.

    It counts as at most 4 binades above the second largest one, so that one outlier does not erase its row.
    """
    shared = [axis for axis in range(gradient.ndim) if exponent.shape[axis] == 1]
    finite = lambda x: jnp.where(jnp.abs(x) < jnp.inf, jnp.abs(x), 0)  # noqa: E731

    # A reduction of the gradient itself, because XLA:CPU would write out a function of it.
    def two_largest(a, b):
        (a, second), (b, other) = map(finite, a), map(finite, b)
        return jnp.maximum(a, b), jnp.maximum(jnp.minimum(a, b), jnp.maximum(second, other))

    pair = lax.reduce((gradient, jnp.zeros_like(gradient)), (gradient.dtype.type(0),) * 2, two_largest, shared)
    largest, second = (magnitude(as_real(x).astype(jnp.float32)).reshape(exponent.shape) for x in pair)
    largest = jnp.where(second < 1 << 23, largest, jnp.minimum(largest, second + (4 << 23)))
    bound = largest if moment.format.signed else jnp.clip(2 * (largest >> 23) - 125, 1, 254) << 23
    fit = fitted(bound, moment_rule(moment.format), moment.format).astype(jnp.int8)
    return jnp.where((exponent == UNSET) & (largest >= 1 << 23), fit, exponent)


def _initial(moment: jax.Array, format: FloatFormat) -> tuple[GridArray, jax.Array]:
    """The initial moment of an inner transformation, mostly zeros, rounded to nearest; `UNSET` for rows of zeros."""
    x = as_real(moment).astype(jnp.float32)
    rows = row_maximum(magnitude(x), row_shape(x.shape))
    exponent = fitted(rows, moment_rule(format), format).astype(jnp.int8)
    index = encode(x, exponent, format).astype(index_dtype(format))
    stored = GridArray(index, exponent, format, dtype=np.dtype(moment.dtype))
    return stored, jnp.where(rows == 0, UNSET, exponent).astype(jnp.int8)


def _moment_names(paths: list, leaves: list, params: Any, known: tuple[str, ...]) -> list[str | None]:
    """For every leaf of a state, the known field that holds it at the path of a parameter, or None."""
    param_paths, param_leaves, _ = flatten_stored(params)
    at = dict(zip(param_paths, param_leaves, strict=True))
    names = []
    for path, leaf in zip(paths, leaves, strict=True):
        if is_split(leaf):  # A momentum of on_grid.
            names.append(None)
            continue
        fields = [i for i, key in enumerate(path) if getattr(key, "name", None) in known and path[i + 1 :] in at]
        fields = [i for i in fields if jnp.shape(at[path[i + 1 :]]) == jnp.shape(leaf)]
        if fields and is_grid_array(leaf) and leaf.format == at[path[fields[0] + 1 :]].format:
            raise ValueError(
                "compress_state found moments in the format of their parameters: parameters that are stored on a grid "
                "need on_grid inside of compress_state."
            )
        names.append(path[fields[0]].name if fields and not is_grid_array(leaf) else None)
    return names


def _check_found(names: list, paths: list, params: Any, first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """Raises if there is nothing to compress, or nothing under a name that the caller gave."""
    missing = {name for name in (*first, *second) if name not in DEFAULTS} - set(names)
    # Without parameters there are no moments to find: optax.tree.map_params asks for such a state.
    if flatten_stored(params)[1] and (missing or not any(names)):
        fields = {key.name for path in paths for key in path if hasattr(key, "name")}
        raise ValueError(
            f"compress_state found no moments of the shapes of the parameters under "
            f"{sorted(missing or {*first, *second})} in the inner state, whose fields are {sorted(fields)}: name them "
            "in `first` and `second`, and compress a state once only."
        )


def _gradients(paths: list, updates: Any) -> list[jax.Array]:
    """The gradient of the parameter of each moment."""
    at = dict(jax.tree_util.tree_leaves_with_path(updates))
    return [next(at[path[i:]] for i in range(len(path) + 1) if path[i:] in at) for path in paths]


def _flatten(state: Any) -> tuple[list[tuple], list[Any], Any]:
    """Paths, leaves and structure of a state whose moments are leaves."""
    with_path, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_moment)
    return [path for path, _ in with_path], [leaf for _, leaf in with_path], structure


def _is_moment(node: Any) -> bool:
    """Whether a node of a state is a GridArray, or the mapping that flax.nnx.Optimizer makes of one."""
    return is_grid_array(node) or is_split(node)


def _check_arguments(first: Any, second: Any, seed: Any, min_size: Any) -> None:
    for argument, names in (("first", first), ("second", second)):
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{argument} must be a sequence of names of state fields, got {names!r}.")
    if set(first) & set(second):
        raise ValueError(f"first and second must not share names, got {sorted(set(first) & set(second))} in both.")
    check_number("seed", seed, "[0, 4294967295]", integer=True)
    check_static("min_size", min_size)
    check_number("min_size", min_size, "[0, inf)")
