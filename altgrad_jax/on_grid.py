"""Any Optax transformation, for parameters that are stored on a grid."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from altgrad_jax._checks import check_number
from altgrad_jax._floats import as_real, power_of_two
from altgrad_jax.codec import decode, encode, exponent_range, index_dtype, magnitude
from altgrad_jax.formats import FloatFormat
from altgrad_jax.grid import ulp
from altgrad_jax.grid_array import (
    GridArray,
    checked_params,
    checked_values,
    flatten_stored,
    from_grid,
    is_grid_array,
    map_stored,
    rejoined,
)
from altgrad_jax.random_words import leaf_keys, random_words, second_word
from altgrad_jax.scales import followed, weight_rule, with_level

# How many binades the numbers of a momentum lie below those of its weights: moves of a 16th of a row still fit.
_BELOW = 5


class OnGridState(NamedTuple):
    """State of `on_grid`."""

    grid_step: Array  # uint32, []: updates so far, modulo 2**32. It keys the random words.
    exponent: Any  # int8: the exponents that the GridArrays take in the next update; None for other leaves.
    momentum: Any  # GridArrays of one byte, with the exponents of their weights; float32 for other leaves; or Nones.
    inner_state: optax.OptState


def on_grid(
    inner: optax.GradientTransformation,
    *,
    rounding: str = "stochastic",
    momentum: float | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains parameters that are stored on a grid with any Optax transformation.

    Its updates become whole steps, which `optax.apply_updates` adds exactly. Belongs at the end of a chain:
    anything after it, except `track_ulp_position`, would scale whole steps. `optax.apply_if_finite` and
    `optax.MultiSteps` belong inside; a momentum also moves the weights in the steps that `MultiSteps` skips. In
    `optax.partition`, stored weights that stay frozen need `on_grid(optax.set_to_zero())`.

    Args:
        inner: The transformation whose updates are stored, learning rate and weight decay included.
        rounding: "stochastic", or "nearest", under which a weight stands still while its updates are below half of its
            step: at a learning rate of 1e-5 most weights, also in two bytes.
        momentum: Decay rate, in (0, 1), of a momentum in one byte per weight, which carries the error of the rounding
            (see `moved`). A weight at most a step from its target is rounded to nearest. All parameters have the
            momentum, so `inner` must have none.
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
    inner = optax.with_extra_args_support(inner)

    def init(params):
        params = checked_params(params)
        exponent = map_stored(lambda p: jnp.array(p.exponent) if is_grid_array(p) else None, params)
        carried = map_stored(lambda p: None if momentum is None else _initial(p), params)
        try:
            inner_state = inner.init(from_grid(params, full=True))
        except ValueError as error:
            if "GridArray" in str(error):
                error.add_note("on_grid gives from_grid(params) to what is inside: make masks and labels from that.")
            raise
        return OnGridState(jnp.uint32(0), exponent, carried, inner_state)

    def update(updates, state, params=None, **extra_args):
        _check_extra(extra_args)
        floats = checked_values("on_grid", updates, params)
        scales = map_stored(lambda p: p.scale if is_grid_array(p) else 1.0, params)
        moves, inner_state = inner.update(updates, state.inner_state, floats, grid_scale=scales, **extra_args)

        paths, leaves, structure = flatten_stored(params)
        rest = [structure.flatten_up_to(tree) for tree in (moves, state.exponent, state.momentum)]
        keys = leaf_keys(seed, state.grid_step, paths) if rounding == "stochastic" else [None] * len(paths)
        rates = (0, 0) if momentum is None else _rates(momentum, state.grid_step)
        results = [_moved_leaf(rates, *arguments) for arguments in zip(leaves, *rest, keys, strict=True)]
        steps, exponent, carried = (structure.unflatten(column) for column in zip(*results, strict=True))
        return steps, OnGridState(state.grid_step + 1, exponent, carried, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def momentum_format(format: FloatFormat) -> FloatFormat | None:
    """The format of the momentum of weights: E3M4, 1/32 of their range; None for bfloat16: its exponents are fixed."""
    if len(set(exponent_range(format))) == 1:
        return None
    top = format.maxexp - 1 - _BELOW
    return FloatFormat("momentum", exponent_bits=3, mantissa_bits=4, bias=7 - top, max=31 / 16 * 2.0**top)


def moved(
    w: Array, u: Array, m: Array, ulp: Array, rounded: Callable[[Array, Array], Array], b: Array, gain: Array
) -> tuple[Array, Array, Array]:
    """One step of a stored leaf with a momentum that carries the error of the rounding.

        M <- b_t M + (1 - b_t) u;  owed = M + M / gain;  target = w + owed if that is at most a step, else w + M;
        w' = round(target);  M <- M + gain (w + M - w')

    with `b_t = b (1 - b**(t - 1)) / (1 - b**t)`, which makes M an average without a bias. M / gain is the sum of the
    moves that M will make after this one. No rounding changes `w + M / gain`, which gains exactly u as soon as b_t is b
    and the gain is 1 / b - 1. So an element that owes at most a step goes to the number nearest to its target and rests
    there, at most half a step away. One that owes more moves by its momentum and is rounded stochastically.

    Weights w, updates u, momentum M and steps of the grid, `ulp`, are float32 in units of one scale, `[...]`; b_t and
    the gain are scalars; `rounded` takes targets and whether to round them to nearest. Returns targets, and the
    momentum before and after it carries the error.
    """
    move = b * m + (1 - b) * u
    # A division, because on a TPU a product would take one more kernel beside 8-bit second moments: 17 bytes, not 8.
    owed = move + move / gain
    near = jnp.abs(owed) <= ulp
    target = w + jnp.where(near, owed, move)
    # Error of the movement, because the sum has lost what is below its own float32 ULP.
    error = move - (rounded(target, near) - w)
    return target, move, move + gain * error


def _rates(b: jax.typing.ArrayLike, steps: Array) -> tuple[Array, Array]:
    """b_t and the gain of the next step, after a number of steps."""
    b, t = jnp.asarray(b, jnp.float32), steps.astype(jnp.float32) + 1
    # 1 / gain is the sum of b**k (1 - b**t) / (1 - b**(t + k)) over k > 0: here as an integral, within 2 %.
    x = b ** (t + 0.5)
    return b * (1 - b ** (t - 1)) / (1 - b**t), (1 / b - 1) / (1 - b**t) * jnp.where(x < 1e-6, 1, -x / jnp.log1p(-x))


def _moved_leaf(rates, param, u, exponent, carried, key):
    """Update, next exponent and momentum of a leaf."""
    if not is_grid_array(param):
        carried = None if carried is None else rates[0] * carried + (1 - rates[0]) * u.astype(carried.dtype)
        return u if carried is None else carried.astype(u.dtype), None, carried
    if carried is None:
        return *_without_momentum(param, u, exponent, key), None
    return _with_momentum(*rates, param, u, exponent, rejoined(carried, momentum_format(param.format)), key)


@jax.jit
def _with_momentum(b, gain, param, u, exponent, carried, key):
    before, u = _in_units(param, u, exponent)
    word, stored = random_words(key, param.shape), is_grid_array(carried)
    m = carried
    if stored:  # Bounded, because the two exponents may be unrelated.
        change = jnp.clip(carried.exponent.astype(jnp.int32) - exponent.astype(jnp.int32), -126, 90)
        m = decode(carried.index, 0, carried.format) * power_of_two(change)
    index = jnp.zeros(param.shape, jnp.int32)

    def rounded(target, near):
        nonlocal index
        index = encode(target, 0, param.grid, jnp.where(near, jnp.uint32(1 << 31), word))
        return decode(index, 0, param.grid)

    target, early, m = moved(before, u, m, ulp(before, param.grid), rounded, b, gain)
    reach = jnp.maximum(magnitude(target), magnitude(early * 2.0**_BELOW))
    reach = jnp.where(jnp.isfinite(target), reach, 0)
    indices = [(index, param.index.dtype)]
    if stored:
        indices += [(encode(m, 0, carried.format, second_word(word)), carried.index.dtype)]
    (index, *kept), level = with_level(indices, reach, exponent.shape, param.format)
    m = dataclasses.replace(carried, index=kept[0], exponent=exponent) if stored else m
    # At most so far that the momentum, whose numbers end `_BELOW` binades lower, still holds a step of its weights.
    shrinkage = max(1, param.grid.maxexp - 1 - param.grid.minexp + param.grid.mantissa_bits - _BELOW)
    return *_update(param, index, exponent, level, shrinkage), m


@jax.jit
def _without_momentum(param, u, exponent, key):
    before, u = _in_units(param, u, exponent)
    index = encode(before + u, 0, param.grid, None if key is None else random_words(key, param.shape))
    # From the stored numbers, not the new ones: on a TPU a maximum of the new ones beside float32 moments takes a
    # second kernel, 31 bytes per weight instead of 22. A row that saturates grows by two binades per step.
    saturated = jnp.abs(param.index.astype(jnp.int32)) == param.grid.max_index
    reach = magnitude(before) + jnp.where(saturated, 2 << 23, 0)
    reach = jnp.where(jnp.isfinite(before), reach, 0)
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


def _initial(param: Any) -> Any:
    """A momentum of zeros."""
    format = momentum_format(param.format) if is_grid_array(param) else None
    if format is None:
        return jnp.zeros(np.shape(param), jnp.float32)
    return GridArray(jnp.zeros(param.shape, index_dtype(format)), jnp.array(param.exponent), format)


def _check_extra(extra_args: dict[str, Any]) -> None:
    if "value_fn" in extra_args:
        raise ValueError(
            "on_grid cannot store the steps of a line search, got value_fn: the losses that it compares lie between "
            "numbers of the grid. Use an optimizer that takes its step from the gradient."
        )
    if "grid_scale" in extra_args:
        raise ValueError("on_grid knows the scales of its parameters, got grid_scale: leave it out.")
