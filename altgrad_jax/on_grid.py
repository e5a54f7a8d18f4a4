"""Any Optax transformation, for parameters that are stored on a grid."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from altgrad_jax._checks import check_number
from altgrad_jax._floats import as_real, power_of_two, zeros_like
from altgrad_jax.codec import decode, encode, exponent_range, index_dtype, is_finite, magnitude, number_at
from altgrad_jax.formats import FloatFormat
from altgrad_jax.grid import ulp, ulp_of_number
from altgrad_jax.grid_array import (
    GridArray,
    checked_params,
    checked_values,
    flatten_stored,
    from_grid,
    is_grid_array,
    map_stored,
    rejoined,
    resplit,
    started,
)
from altgrad_jax.random_words import leaf_keys, random_words, second_word
from altgrad_jax.scales import followed, weight_rule, with_level

# How many binades lower the numbers of a momentum end than those of its weights: with b = 0.9 a row can move by a 36th.
_BELOW = 2


class OnGridState(NamedTuple):
    """State of `on_grid`."""

    grid_step: Array  # uint32, []: updates so far; 2**31 follows 2**32 - 1. It keys the random words.
    exponent: Any  # int8: the exponents that the GridArrays take in the next update; None for other leaves.
    # What each weight owes, the sum of the moves still to come: GridArrays of one byte, with the exponents of their
    # weights. Of other leaves the average of the updates, float32. Without a momentum Nones.
    momentum: Any
    inner_state: optax.OptState


def on_grid(
    inner: optax.GradientTransformation,
    *,
    rounding: str = "stochastic",
    momentum: float | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains parameters that are stored on a grid with any Optax transformation.

    Its updates become whole steps, which `optax.apply_updates` adds exactly. Belongs at the end of a chain and around
    all that changes updates: `on_grid(optax.MultiSteps(inner, 4).gradient_transformation())`, and in the same way
    `apply_if_finite`, `sam`, `schedule_free`. Outside they raise, as all that makes floats of whole steps does; but
    `scale_by_schedule`, `apply_every`, `scale_by_sign`, `keep_params_nonnegative`, and `scale`, `clip` and `trace` by
    an integer, keep integers and make wrong weights without an error. `track_ulp_position` may follow. A momentum also
    moves the weights in the steps that `MultiSteps` skips. In `optax.partition`, stored weights that stay frozen need
    `on_grid(optax.set_to_zero())`.

    Leaves that are not stored take their updates as they are: bfloat16 ones stand still at small learning rates. Store
    them too, by `to_grid(params, "bfloat16", where=...)`.

    Args:
        inner: The transformation whose updates are stored, learning rate and weight decay included.
        rounding: "stochastic", or "nearest", under which a weight stands still while its updates are below half of its
            step: at a learning rate of 1e-5 most weights, also in two bytes.
        momentum: Decay rate, in (0, 1), of a momentum in one byte per weight, which carries the error of the rounding
            (see `moved`). A weight at most a step from its target is rounded to nearest. `init` draws each target at
            random from the interval that rounds to its weight, so that small movements show in the mean. All parameters
            have the momentum, so `inner` must have none.
        seed: Seed of the random words, a function of seed, step, path of the leaf and position of the element: they
            are the same on any sharding and after any restart, and in all lanes of `jax.vmap` and `jax.shard_map` if
            the seed is not mapped.

    Returns:
        A transformation whose update takes gradients with respect to `from_grid(params)` and needs the parameters. The
        inner one gets the extra argument `grid_scale`, a tree like params, 1 for leaves that are not stored. The
        exponent of a row follows its largest element, one step behind (without a momentum two, and down by one binade
        at a time); until then the row saturates. A movement that is not finite, or 2**128 times the scale, makes its
        element NaN. A ValueError if nothing is stored, or if `value_fn` of a line search or `grid_scale` is given.

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
    takes_scale, inner = _takes_scale(inner), optax.with_extra_args_support(inner)

    def init(params):
        params = checked_params(params)
        exponent = map_stored(lambda p: jnp.array(p.exponent) if is_grid_array(p) else None, params)
        paths, leaves, structure = flatten_stored(params)
        keys = leaf_keys(seed, jnp.uint32(2**32 - 1), paths)
        carried = [None if momentum is None else _initial(*leaf) for leaf in zip(leaves, keys, strict=True)]
        try:
            inner_state = inner.init(from_grid(params, full=True))
        except ValueError as error:
            if "GridArray" in str(error):
                error.add_note("on_grid gives from_grid(params) to what is inside: make masks and labels from that.")
            raise
        return started(params, OnGridState(jnp.uint32(0), exponent, structure.unflatten(carried), inner_state))

    def update(updates, state, params=None, **extra_args):
        _check_extra(extra_args)
        floats = checked_values("on_grid", updates, params)
        if takes_scale:
            extra_args["grid_scale"] = map_stored(lambda p: p.scale if is_grid_array(p) else 1.0, params)
        moves, inner_state = inner.update(updates, state.inner_state, floats, **extra_args)

        paths, leaves, structure = flatten_stored(params)
        rest = [structure.flatten_up_to(tree) for tree in (moves, state.exponent, state.momentum)]
        keys = leaf_keys(seed, state.grid_step, paths) if rounding == "stochastic" else [None] * len(paths)
        rates = (0, 0, 0) if momentum is None else _rates(momentum, state.grid_step)
        results = [_moved_leaf(rates, *arguments) for arguments in zip(leaves, *rest, keys, strict=True)]
        columns = zip(*results, strict=True) if results else ((), (), ())  # A masked group may be empty.
        steps, exponent, carried = map(structure.unflatten, columns)
        # The second half of the range repeats, because the first steps have a bias correction.
        following = jnp.where(state.grid_step == np.uint32(2**32 - 1), np.uint32(2**31), state.grid_step + 1)
        return steps, OnGridState(following, exponent, carried, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def momentum_format(format: FloatFormat) -> FloatFormat | None:
    """Format of the momentum: E3M4, a quarter of the weights' range; None for bfloat16, whose exponents are fixed."""
    if len(set(exponent_range(format))) == 1:
        return None
    top = format.maxexp - 1 - _BELOW
    return FloatFormat("momentum", exponent_bits=3, mantissa_bits=4, bias=7 - top, max=31 / 16 * 2.0**top)


def moved(
    w: Array, u: Array, owed: Array, ulp: Array, rounded: Callable[[Array, Array], Array], take: Array, share: Array
) -> tuple[Array, Array, Array]:
    """One step of a stored leaf with a momentum, kept as what each weight owes: the sum of the moves still to come.

        move = share owed + take u;  owed = move / share
        target = w + owed if that is at most a step, else w + move
        w' = round(target);  owed <- owed - (w' - w)

    With `take = share = 1 - b`, the limits of `_rates`, a move is the average of the updates with decay b, and
    `w + owed` gains exactly u, however the weight is rounded. An element that owes at most a step goes to the number
    nearest to its target and rests there, at most half a step away. One that owes more is rounded stochastically.

    Weights w, updates u, owed and steps of the grid, `ulp`, are float32 in units of one scale, `[...]`; take and share
    are scalars; `rounded` takes targets and whether to round them to nearest. Returns targets, and what is owed after
    an exact move and after the rounded one.
    """
    move = share * owed + take * u
    # Not a product, with which a TPU takes one more kernel beside 8-bit second moments, 17 bytes instead of 8, and not
    # `move / share`, which a CPU writes out, 8 temporary bytes instead of 4.
    owed = move + move / (share / (1 - share))
    near = jnp.abs(owed) <= ulp
    target = w + jnp.where(near, owed, move)
    # Minus the movement, because the sum has lost what is below its own float32 ULP.
    return target, owed - move, owed - (rounded(target, near) - w)


@functools.partial(jax.jit, inline=True)
def _rates(b: jax.typing.ArrayLike, steps: Array) -> tuple[Array, Array, Array]:
    """After a number of steps: b_t and 1 - b_t of the average, and the share of the next move in all moves owed.

    `b_t = b (1 - b**(t - 1)) / (1 - b**t)` makes the average unbiased.
    """
    b, t = jnp.asarray(b, jnp.float32), steps.astype(jnp.float32) + 1
    power = b**t
    take = (1 - b) / (1 - power)
    # 1 / share is the sum of b**k (1 - b**t) / (1 - b**(t + k)) over k >= 0: from the ninth on as an integral.
    x = b ** (t + 7.5)
    rest = b**8 / (1 - b) * jnp.where(x < 1e-6, 1, -jnp.log1p(-x) / x)
    moves = sum((b**k / (1 - power * b**k) for k in range(8)), rest) * (1 - power)
    return 1 - take, take, 1 / moves


def _moved_leaf(rates, param, u, exponent, carried, key):
    """Update, next exponent and momentum of a leaf."""
    if not is_grid_array(param):
        keep, take, _ = rates
        carried = None if carried is None else keep * carried + take * u.astype(carried.dtype)
        return u if carried is None else carried.astype(u.dtype), None, carried
    if carried is None:
        return *_without_momentum(param, u, exponent, key), None
    whole = rejoined(carried, momentum_format(param.format))
    update, exponent, owed = _with_momentum(*rates, param, u, exponent, whole, key)
    return update, exponent, resplit(owed, carried)


@jax.jit
def _with_momentum(_, take, share, param, u, exponent, carried, key):
    before, u = _in_units(param, u, exponent)
    word, stored = random_words(key, param.shape), is_grid_array(carried)
    owed = carried
    if stored:  # Bounded, because the two exponents may be unrelated.
        change = jnp.clip(carried.exponent.astype(jnp.int32) - exponent.astype(jnp.int32), -126, 90)
        owed = decode(carried.index, change, carried.format)
    index = jnp.zeros(param.shape, jnp.int32)

    def rounded(target, near):
        nonlocal index
        # From a little above a half: an element that owes half a step rests, and does not go to and fro.
        index = encode(target, 0, param.grid, jnp.where(near, jnp.uint32((1 << 31) - (1 << 10)), word))
        return number_at(index, param.grid)  # What is owed is not finite where the target is not.

    target, expected, owed = moved(before, u, owed, ulp_of_number(before, param.grid), rounded, take, share)
    reach = jnp.maximum(magnitude(target), magnitude(expected * 2.0**_BELOW))
    reach = jnp.where(is_finite(target), reach, 0)
    indices = [(index, param.index.dtype)]
    if stored:
        indices += [(encode(owed, 0, carried.format, second_word(word)), carried.index.dtype)]
    (index, *kept), level = with_level(indices, reach, exponent.shape, param.format)
    owed = dataclasses.replace(carried, index=kept[0], exponent=exponent) if stored else owed
    # At most so far that the momentum, whose numbers end `_BELOW` binades lower, still holds a step of its weights.
    shrinkage = max(1, param.grid.maxexp - 1 - param.grid.minexp + param.grid.mantissa_bits - _BELOW)
    return *_update(param, index, exponent, level, shrinkage), owed


@jax.jit
def _without_momentum(param, u, exponent, key):
    before, u = _in_units(param, u, exponent)
    index = encode(before + u, 0, param.grid, None if key is None else random_words(key, param.shape))
    # From the stored numbers, not the new ones: on a TPU a maximum of the new ones beside float32 moments takes a
    # second kernel, 31 bytes per weight instead of 22. A row that saturates grows by two binades per step.
    saturated = jnp.abs(param.index.astype(jnp.int32)) == param.grid.max_index
    reach = magnitude(before) + jnp.where(saturated, 2 << 23, 0)
    reach = jnp.where(is_finite(before), reach, 0)
    (index,), level = with_level([(index, param.index.dtype)], reach, exponent.shape, param.format)
    # By one binade at a time: a row that leaves zero doubles with its second movement, and would saturate.
    return _update(param, index, exponent, level, shrinkage=1)


def _in_units(param: GridArray, u: Array, exponent: Array) -> tuple[Array, Array]:
    """Weights and updates in units of the scales of this step, float32.

    In these units a step has only constants: a TPU kernel takes few operands, and every scale per row is one.
    """
    unit = power_of_two(-exponent.astype(jnp.int32))
    return param.value(jnp.float32, full=True) * unit, as_real(u).astype(jnp.float32) * unit


def _update(param: GridArray, index: Array, exponent: Array, level: Array, shrinkage: int) -> tuple[GridArray, Array]:
    """What `optax.apply_updates` adds to a GridArray, and the exponents of the next step."""
    # In the dtype of the index, modulo its range: through int32 the sum would take a kernel of its own on TPUs.
    update = dataclasses.replace(param, index=index - param.index, exponent=exponent - param.exponent)
    return update, followed(exponent, level, weight_rule(param.format, shrinkage), param.grid, jnp.uint32(0))


@functools.partial(jax.jit, keep_unused=True)  # Zeros, too, are on the devices of their parameters.
def _initial(param: Any, key: Array) -> Any:
    """What is owed before the first step: nothing by floats and zeros, by others a random part of half a step.

    A stored number stands for all that round to it. If each weight were in the middle of that interval, movements below
    half a step would not show; from a random place they show in a share of the weights, and in their mean.
    """
    if not is_grid_array(param):
        return zeros_like(param, jnp.float32)
    format, w = momentum_format(param.format), decode(param.index, 0, param.grid)
    part = ((random_words(key, param.shape) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23 - 0.5
    # Below a power of two the steps are half as wide.
    step = ulp(jnp.where(part * w < 0, w * (1 - 2.0**-24), w), param.grid)
    # A float32 momentum, which is not on a grid itself, keeps clear of the half.
    owed = jnp.where(jnp.abs(w) > 0, part * step * (1 if format else 0.99), 0)  # 0 for NaN too.
    index = jnp.zeros(param.shape, jnp.int32)
    if format is not None:
        index = encode(owed, 0, format, index.astype(jnp.uint32))  # Rounded towards 0.
        owed = decode(index, 0, format)
    # In the finest grids the sum may round to half a step: nothing moves before an update does.
    stays = encode(w + owed, 0, param.grid) == param.index.astype(jnp.int32)
    if format is None:
        return jnp.where(stays, owed * param.scale, 0)
    return GridArray(jnp.where(stays, index, 0).astype(index_dtype(format)), jnp.array(param.exponent), format)


def _takes_scale(inner: optax.GradientTransformation) -> bool:
    """Whether the update takes the extra argument `grid_scale`. Some take only their own, such as `sam`."""
    parameters = inspect.signature(inner.update).parameters.values()
    return any(p.name == "grid_scale" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_extra(extra_args: dict[str, Any]) -> None:
    if "value_fn" in extra_args:
        raise ValueError(
            "on_grid cannot store the steps of a line search, got value_fn: the losses that it compares lie between "
            "numbers of the grid. Use an optimizer that takes its step from the gradient."
        )
    if "grid_scale" in extra_args:
        raise ValueError("on_grid knows the scales of its parameters, got grid_scale: leave it out.")
