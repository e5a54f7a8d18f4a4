"""Any Optax transformation, for parameters that are stored on a grid."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax._checks import check_number
from altgrad_jax._floats import as_real, power_of_two
from altgrad_jax.codec import decode, encode, exponent_range, index_dtype, scaled_magnitude
from altgrad_jax.formats import FloatFormat
from altgrad_jax.grid import ulp
from altgrad_jax.grid_array import (
    GridArray,
    checked_values,
    flatten_stored,
    from_grid,
    is_grid_array,
    map_stored,
    rejoined,
)
from altgrad_jax.random_words import leaf_keys, random_words, second_word
from altgrad_jax.scales import followed, weight_rule, with_level

# By so many binades the numbers of a momentum are below those of its weights: moves of a 16th of a row still fit.
_BELOW = 5


class OnGridState(NamedTuple):
    """State of `on_grid`."""

    grid_step: jax.Array  # uint32, []: updates so far, modulo 2**32. It keys the random words.
    exponent: Any  # int8: the exponents that the GridArrays take in the next update; None for other leaves.
    momentum: Any  # GridArrays of one byte per weight with the exponents of their weights; float32 for other leaves.
    inner_state: optax.OptState


def on_grid(
    inner: optax.GradientTransformation,
    *,
    rounding: str = "stochastic",
    momentum: float | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains parameters that are stored on a grid with any Optax transformation.

    The inner transformation sees the numbers that the GridArrays stand for, fraction bits included. Its updates become
    whole steps, which `optax.apply_updates` adds exactly. Belongs at the end of a chain: what follows it, except
    `track_ulp_position`, would scale whole steps. `optax.MultiSteps` and `optax.apply_if_finite` belong inside.

    With a momentum, which the inner transformation then must not have, what rounding loses is carried in it: see
    `moved`, whose recurrence it is. Parameters that are not stored have the same momentum. It moves them on steps
    that `optax.MultiSteps` skips, too: accumulate gradients outside of the optimizer instead.

    Args:
        inner: The transformation whose updates are stored, learning rate and weight decay included.
        rounding: "stochastic", or "nearest", under which a weight stands still while its updates are below half of its
            step: at a learning rate of 1e-5 most weights, in two bytes too.
        momentum: Decay rate of a momentum that is stored in one byte per weight, in (0, 1); stochastic only.
        seed: Of the random words, which are a function of seed, number of the step, path of the leaf and position of
            the element: the same on any sharding and after any restart. Lanes of `jax.vmap` and shards of
            `jax.shard_map` draw the same ones unless the seed is mapped.

    Returns:
        A transformation whose update takes gradients with respect to `from_grid(params)` and needs the parameters. It
        hands the inner one the extra argument `grid_scale`: a tree like params, 1 for leaves that are not stored. The
        exponent of a row follows its largest element, one step behind (without a momentum two); until then the row
        saturates. A movement that is not finite makes its element NaN.

    Raises:
        ValueError: If an argument is out of bounds, or, in the update, if no parameter is stored, gradients and
            parameters do not go together, or `value_fn` of a line search, or `grid_scale`, is given.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> params = ag.to_grid(jnp.array([[0.5, -1.0]]))
        >>> tx = ag.on_grid(optax.sgd(1.0), rounding="nearest")
        >>> updates, state = tx.update(jnp.array([[-0.125, 1.0]]), tx.init(params), params)
        >>> ag.from_grid(optax.apply_updates(params, updates))
        Array([[ 0.625, -2.   ]], dtype=float32)
    """
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"rounding must be 'stochastic' or 'nearest', got {rounding!r}.")
    if momentum is not None:
        check_number("momentum", momentum, "(0, 1)")
        if rounding == "nearest":
            raise ValueError(
                "momentum carries the error of stochastic rounding, got rounding='nearest': store the weights with "
                "fraction_bits=8 and leave out the momentum, which takes as many bytes."
            )
    check_number("seed", seed, "[0, 4294967295]", integer=True)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        floats = from_grid(params, full=True)
        exponent = map_stored(lambda p: jnp.array(p.exponent) if is_grid_array(p) else None, params)
        carried = () if momentum is None else map_stored(_initial, params, floats)
        return OnGridState(jnp.uint32(0), exponent, carried, inner.init(floats))

    def update(updates, state, params=None, **extra_args):
        _check_extra(extra_args)
        floats = checked_values("on_grid", updates, params)
        scales = map_stored(lambda p: p.scale if is_grid_array(p) else 1.0, params)
        moves, inner_state = inner.update(updates, state.inner_state, floats, grid_scale=scales, **extra_args)

        paths, leaves, structure = flatten_stored(params)
        keys = leaf_keys(seed, state.grid_step, paths) if rounding == "stochastic" else [None] * len(paths)
        rest = [structure.flatten_up_to(tree) for tree in (moves, state.exponent)]
        if momentum is None:
            results = [_without_momentum(*arguments) for arguments in zip(leaves, *rest, keys, strict=True)]
            trees = [structure.unflatten(column) for column in zip(*results, strict=True)]
            return trees[0], OnGridState(state.grid_step + 1, trees[1], (), inner_state)
        carried = structure.flatten_up_to(state.momentum)
        b, t = jnp.asarray(momentum, jnp.float32), state.grid_step.astype(jnp.float32)
        rates = b * (1 - b**t) / (1 - b ** (t + 1)), 1 / b - 1
        results = [_with_momentum(*rates, *a) for a in zip(leaves, *rest, keys, carried, strict=True)]
        trees = [structure.unflatten(column) for column in zip(*results, strict=True)]
        return trees[0], OnGridState(state.grid_step + 1, trees[1], trees[2], inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def momentum_format(format: FloatFormat) -> FloatFormat | None:
    """The format of the momentum of weights: three exponent bits, four mantissa bits, 1/32 of their range.

    Of a format whose exponent cannot follow the weights, bfloat16, None.
    """
    if len(set(exponent_range(format))) == 1:
        return None
    top = format.maxexp - 1 - _BELOW
    return FloatFormat("momentum", exponent_bits=3, mantissa_bits=4, bias=7 - top, max=31 / 16 * 2.0**top)


def moved(
    before: jax.Array,
    update: jax.Array,
    carried: jax.Array,
    ulp: jax.Array,
    rounded: Callable[[jax.Array], jax.Array],
    b: jax.Array,
    gain: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of a stored leaf with a momentum that carries the error of the rounding.

        M <- b_t M + (1 - b_t) u;  target = w + M;  w' = round(target);  M <- M + (1 / b - 1) (target - w')

    with `b_t = b (1 - b**(t - 1)) / (1 - b**t)`, under which M is an average without a bias. As soon as b_t is b,
    `w + b M / (1 - b)` gains exactly u, however w is rounded: the second term is what an element still owes. An element
    whose u is 0 and which owes at most half of its step rests: weight and momentum stay.

    Args:
        before: Weights, float32, shape `[...]`.
        update: Updates u of the inner transformation, float32, `[...]`.
        carried: The momentum M, float32, `[...]`.
        ulp: Steps of the grid at the weights, float32, `[...]`.
        rounded: Function of targets to what is stored of them.
        b: Decay rate of the momentum at this step, b_t, [].
        gain: 1 / b - 1, [].

    Returns:
        Targets, the momentum before the error is added, and after it.
    """
    rests = (update == 0) & (jnp.abs(carried) <= ulp * (gain / 2))
    move = b * carried + (1 - b) * update
    # What rests is all error, so that its momentum stays b M + (1 / b - 1) b M = M.
    target = before + jnp.where(rests, 0, move)
    # Of the movement, as the sum has lost what is below its own float32 ULP.
    error = move - (rounded(target) - before)
    return target, move, move + gain * error


def _with_momentum(b, gain, param, u, exponent, key, carried):
    """Update, next exponent and momentum of a leaf."""
    if not is_grid_array(param):
        carried = (b * carried + (1 - b) * u.astype(carried.dtype)).astype(carried.dtype)
        return carried.astype(u.dtype), None, carried
    return _stored_with_momentum(b, gain, param, u, exponent, key, rejoined(carried, _initial(param, u)))


@jax.jit
def _stored_with_momentum(b, gain, param, u, exponent, key, carried):
    before, u = _in_units(param, u, exponent)
    word, stored = random_words(key, param.shape), is_grid_array(carried)
    m = _momentum_in_units(carried, exponent) if stored else carried
    index = jnp.zeros(param.shape, jnp.int32)

    def rounded(target):
        nonlocal index
        index = encode(target, 0, param.grid, word)
        return decode(index, 0, param.grid)

    target, early, m = moved(before, u, m, ulp(before, param.grid), rounded, b, gain)
    reach = jnp.maximum(scaled_magnitude(target, 0), scaled_magnitude(early * 2.0**_BELOW, 0))
    reach = jnp.where(jnp.isfinite(target), reach, 0)
    indices = [(index, param.index.dtype)]
    if stored:
        indices += [(encode(m, 0, carried.format, second_word(word)), carried.index.dtype)]
    (index, *kept), level = with_level(indices, reach, exponent.shape, param.format)
    m = dataclasses.replace(carried, index=kept[0], exponent=exponent) if stored else m
    return *_update(param, index, exponent, level), m


def _without_momentum(param, u, exponent, key):
    """Update and next exponent of a leaf."""
    return _stored_without_momentum(param, u, exponent, key) if is_grid_array(param) else (u, None)


@jax.jit
def _stored_without_momentum(param, u, exponent, key):
    before, u = _in_units(param, u, exponent)
    word = None if key is None else random_words(key, param.shape)
    index = encode(before + u, 0, param.grid, word)
    # Of what is stored, not of what is about to be: on a TPU a maximum of the latter beside float32 moments takes a
    # second kernel, 31 bytes per weight instead of 22. A row that saturates grows by two binades per step.
    saturated = jnp.abs(param.index.astype(jnp.int32)) == param.grid.max_index
    reach = scaled_magnitude(before, 0) + jnp.where(saturated, 2 << 23, 0)
    reach = jnp.where(jnp.isfinite(before), reach, 0)
    (index,), level = with_level([(index, param.index.dtype)], reach, exponent.shape, param.format)
    return _update(param, index, exponent, level)


def _in_units(param: GridArray, u: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and updates in units of the scales of this step, float32.

    In these a step has constants alone: a TPU kernel takes few operands, and every scale of a row is one.
    """
    unit = power_of_two(-exponent.astype(jnp.int32), jnp.float32)
    u = as_real(u).astype(jnp.float32)
    # So far beyond the largest number any movement saturates, and sums of such stay finite.
    far = min(2.0**32 * param.format.max, float(jnp.finfo(jnp.float32).max))
    inside = jnp.where(jnp.isfinite(u), jnp.clip(u * unit, -far, far), jnp.nan)
    return param.value(jnp.float32, full=True) * unit, inside


def _momentum_in_units(carried: GridArray, exponent: jax.Array) -> jax.Array:
    """A momentum in the same units; bounded where the two have nothing to do with each other."""
    change = jnp.clip(carried.exponent.astype(jnp.int32) - exponent.astype(jnp.int32), -126, 90)
    return decode(carried.index, 0, carried.format) * power_of_two(change, jnp.float32)


def _update(param: GridArray, index: jax.Array, exponent: jax.Array, level: jax.Array) -> tuple[GridArray, jax.Array]:
    """What `optax.apply_updates` adds to a GridArray, and the exponents of the step after."""
    # In the dtype of the index, modulo its range: through int32 the sum would take a kernel of its own on TPUs.
    update = dataclasses.replace(param, index=index - param.index, exponent=exponent - param.exponent)
    return update, followed(exponent, level, weight_rule(param.format), param.grid, jnp.uint32(0))


def _initial(param: Any, like: jax.Array) -> Any:
    """A momentum of zeros."""
    format = momentum_format(param.format) if is_grid_array(param) else None
    if format is None:
        return jnp.zeros(like.shape, jnp.float32)
    return GridArray(jnp.zeros(param.shape, index_dtype(format)), jnp.array(param.exponent), format)


def _check_extra(extra_args: dict[str, Any]) -> None:
    if "value_fn" in extra_args:
        raise ValueError(
            "on_grid cannot store the steps of a line search, got value_fn: the losses it compares lie between the "
            "numbers of the grid. Use an optimizer that takes its step from the gradient."
        )
    if "grid_scale" in extra_args:
        raise ValueError("on_grid knows the scales of its parameters, got grid_scale: leave it out.")
