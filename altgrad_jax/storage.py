"""Any Optax transformation, for parameters that are stored on a grid."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax._checks import check_number
from altgrad_jax.grid import as_real
from altgrad_jax.grid_array import (
    GridArray,
    checked_values,
    decoded,
    from_grid,
    is_grid_array,
    nan_index,
    rescale_due,
    with_nan,
)
from altgrad_jax.rounding import leaf_words, nearest_index, random_bits, round_nearest, stochastic_index


class OnGridState(NamedTuple):
    """State of `on_grid`."""

    grid_step: jax.Array  # uint32, []: updates so far, modulo 2**32. It keys the random bits.
    rescale_rounded: jax.Array  # uint32, []: elements that lost their last bit to a rescale, modulo 2**32.
    saturated: jax.Array  # uint32, []: elements found at the largest number when looked at, modulo 2**32.
    momentum: optax.Params  # float32, shapes of the parameters; (), without feedback.
    inner_state: optax.OptState


def on_grid(
    inner: optax.GradientTransformation,
    *,
    rounding: str = "stochastic",
    feedback: str | None = None,
    momentum: float | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains parameters that are stored on a grid with any Optax transformation.

    The inner transformation sees the numbers that the GridArrays stand for, fraction bits included, and its updates
    become whole steps: what comes out has the structure of the parameters and `optax.apply_updates` adds it exactly.

    With `feedback="momentum"` the error of the rounding goes back into a momentum that is kept in units of the update,
    behind the normalisation of the inner transformation, so that no schedule can amplify it:

        M <- b M + (1 - b) u;  target = w + M / c;  w' = round(target);  M <- M + (1 / b - 1) c (target - w')

    where u is the update of the inner transformation, b the momentum and c = 1 - b**t its bias correction. Parameters
    that are not stored on a grid have the same momentum. The inner transformation then brings none of its own. Of the
    errors of the first steps, whose c is still small, a part is not given back: with b = 0.9 78 % of the first one's,
    2 % of the 30th's.

    With `rounding="nearest"` a weight is stored as the number that is nearest to where its momentum leads in the end:

        M <- b M + (1 - b) u;  w' = nearest(w + M / (1 - b));  M <- M + (1 / b - 1) (M - (w' - w))

    After it w' + b M / (1 - b) is the start plus the sum of all updates, as a float32 copy of the weight would be, but
    for what saturates, and w' is the nearest number to it: no dead zone, and no error that takes time to return. The
    momentum of what is stored holds the rest, and smooths nothing. In one byte (`compress_state`) it holds about four
    bits of it, rounded stochastically. See the README for what either costs.

    Belongs at the end of a chain: what follows it, but for `track_ulp_position`, would scale whole steps.

    Args:
        inner: The transformation whose updates are stored, learning rate and weight decay included.
        rounding: "stochastic" (unbiased) or "nearest".
        feedback: None, or "momentum".
        momentum: Decay rate of the momentum, in (0, 1). Default with feedback: 0.9; without feedback there is none.
        seed: Of the random bits, which are a function of the seed, the number of the step, the path of the leaf and
            the position of the element alone: any sharding and any restart draws the same ones. (Whether inner
            transformation and momentum are the same on every sharding to the last float32 bit is up to XLA, which
            may contract products and sums differently.)

    Returns:
        A transformation whose update takes gradients with respect to `from_grid(params)` and needs the parameters.
        It hands the extra argument `grid_scale` to the inner one: a tree like params, the scale of every GridArray
        and 1 for other leaves. `optax.MultiSteps` and `optax.apply_if_finite` belong inside of it, with the momentum
        of stochastic feedback still moving the parameters on steps that they skip; line searches (`optax.lbfgs`) are
        refused, as the losses they compare lie between the numbers of the grid.

        At the start, after 1, 2, 4, 8, 16 and 32 steps and then every 64 steps, the scale of a row is doubled where an
        element is beyond half of the largest number, and multiplied by 4 where one has reached it: until then it
        saturates, which `saturated` counts at these looks. Growth moves no element but those which lose their last
        bits, to nearest-even if nothing else moves them, and `rescale_rounded` counts those.

        A movement that is not finite makes its element NaN, as in any other parameter.

        Under `jax.vmap` all lanes draw the same bits unless the seed is mapped too; under `jax.shard_map` all shards
        do: use `jax.jit` with sharded arrays instead.

    Raises:
        ValueError: If an argument is out of bounds, if `momentum` comes without feedback, or, in the update, if no
            parameter is stored on a grid, gradients and parameters do not go together or the argument `value_fn` of
            a line search, or `grid_scale`, is given.

    Example:
        >>> import altgrad_jax as ag, jax, jax.numpy as jnp, optax
        >>> params = ag.to_grid(jnp.array([[0.5, -1.0]]))
        >>> tx = ag.on_grid(optax.sgd(1.0), rounding="nearest")
        >>> updates, state = tx.update(jnp.array([[-0.125, 1.0]]), tx.init(params), params)
        >>> ag.from_grid(optax.apply_updates(params, updates))
        Array([[ 0.625, -2.   ]], dtype=float32)
    """
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"rounding must be 'stochastic' or 'nearest', got {rounding!r}.")
    if feedback not in (None, "momentum"):
        raise ValueError(f"feedback must be None or 'momentum', got {feedback!r}.")
    if feedback is None and momentum is not None:
        raise ValueError(f"momentum needs feedback='momentum', got momentum={momentum} without it.")
    beta = 0.9 if momentum is None else momentum
    check_number("momentum", beta, "(0, 1)")
    check_number("seed", seed, "[0, 4294967295]", integer=True)
    inner = optax.with_extra_args_support(inner)
    # Nearest numbers are taken of where a momentum leads to in the end.
    ahead = 1 / (1 - beta) if feedback and rounding == "nearest" else None

    def init(params):
        floats = from_grid(params, full=True)
        carried = optax.tree.zeros_like(floats, dtype=jnp.float32) if feedback else ()
        return OnGridState(jnp.uint32(0), jnp.uint32(0), jnp.uint32(0), carried, inner.init(floats))

    def update(updates, state, params=None, **extra_args):
        if "value_fn" in extra_args:
            raise ValueError(
                "on_grid cannot store the steps of a line search, got value_fn: the losses it compares lie between the "
                "numbers of the grid. Use an optimizer that takes its step from the gradient."
            )
        if "grid_scale" in extra_args:
            raise ValueError("on_grid knows the scales of its parameters, got grid_scale: leave it out.")
        floats = checked_values("on_grid", updates, params)
        scales = jax.tree.map(lambda p: p.scale if is_grid_array(p) else 1.0, params, is_leaf=is_grid_array)
        moves, inner_state = inner.update(updates, state.inner_state, floats, grid_scale=scales, **extra_args)
        carried, correction = (), 1 - beta ** (state.grid_step.astype(jnp.float32) + 1)
        if feedback:
            carried = jax.tree.map(
                lambda m, u: (beta * m + (1 - beta) * u.astype(m.dtype)).astype(m.dtype), state.momentum, moves
            )
            dtypes = jax.tree.map(lambda u: u.dtype, moves)
            moves = jax.tree.map(
                lambda p, m: m if ahead and is_grid_array(p) else (m / correction).astype(m.dtype),
                *(params, carried),
                is_leaf=is_grid_array,
            )

        with_path, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_grid_array)
        steps, errors = tree.flatten_up_to(moves), [0.0] * len(with_path)
        rounded, saturated = state.rescale_rounded, state.saturated
        for i, (path, param) in enumerate(with_path):
            if is_grid_array(param):
                words = leaf_words(seed, path, state.grid_step) if rounding == "stochastic" else None
                steps[i], errors[i], counts = stored(param, steps[i], words, rescale_due(state.grid_step), ahead)
                rounded, saturated = rounded + counts[0], saturated + counts[1]
            elif feedback:
                steps[i] = steps[i].astype(tree.flatten_up_to(dtypes)[i])
        if feedback:
            gain = (1 / beta - 1) * (1.0 if ahead else correction)
            carried = jax.tree.map(lambda m, e: (m + gain * e).astype(m.dtype), carried, tree.unflatten(errors))
        state = OnGridState(state.grid_step + 1, rounded, saturated, carried, inner_state)
        return tree.unflatten(steps), state

    return optax.GradientTransformationExtraArgs(init, update)


def stored(
    param: GridArray,
    move: jax.Array,
    words: jax.Array | None,
    look: jax.Array,
    ahead: float | None = None,
) -> tuple[GridArray, jax.Array, tuple[jax.Array, jax.Array]]:
    """Rounds a movement of a GridArray to whole steps.

    Args:
        param: The array before.
        move: Intended movement in real units, float32, shape of the array.
        words: Key of the random bits, uint32 of shape `[2]`; None rounds to nearest-even.
        look: bool, []. Whether to grow the scales that have too little headroom left.
        ahead: How many times the movement is to be made in the end; its number is stored at once. None: once.

    Returns:
        The update to add; the error, intended minus stored, float32, shape of the array; and how many elements the
        growth rounded and how many were found saturated, uint32.
    """
    grid, before, move = param.grid, param.value(full=True), as_real(move).astype(jnp.float32)
    grow, counts = jax.lax.cond(look, _headroom, _no_look, param)
    scale = grow * param.scale
    target = before + (move if ahead is None else ahead * move)
    index = nearest_index(target / scale, grid)
    if words is not None:
        # Where nothing is to move, only a grown scale can leave a rest: nearest-even, not at random.
        chance = stochastic_index(target / scale, random_bits(words, target.shape), grid)
        index = jnp.where(move == 0, index, chance)
    after = decoded(index, grid) * scale
    # Of the movement, as the sum has lost what is below its own float32 ULP; without what saturates, as a momentum
    # that carried it would wind up and overshoot; of a movement that is stored ahead nothing is left to make.
    beyond = 0 * move if ahead is None else (1 - ahead) * move
    error = jnp.where(jnp.abs(target) <= grid.max * scale, move - (after - before), beyond)
    # In the dtype of the index, modulo its range: through int32 the sum would take a kernel of its own on TPUs.
    step = with_nan(index, target, param.index.dtype) - param.index
    return dataclasses.replace(param, index=step, scale=scale - param.scale), error, counts


def _headroom(param: GridArray) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """By what to grow every scale: by 2 where an element is beyond half of the largest number, by 4 where it is there.

    Also counts the elements that this has to round, and those that are at the largest number.
    """
    index = param.index.astype(jnp.int32)
    # NaN, the most negative index, takes no part: its row goes on as if it were 0.
    magnitude = jnp.where(index == nan_index(param.index.dtype), 0, jnp.abs(index))
    shared = [axis for axis in range(param.ndim) if param.scale.shape[axis] == 1]
    largest = jnp.max(magnitude, axis=shared, keepdims=True, initial=0)
    half = nearest_index(jnp.float32(param.format.max / 2), param.grid)
    grow = jnp.where(largest >= param.grid.max_index, 4.0, jnp.where(largest > half, 2.0, 1.0))
    # No further than float32 reaches.
    grow = jnp.where(grow * param.scale < 2.0**126, grow, 1.0).astype(param.scale.dtype)
    shrunk = dataclasses.replace(param, scale=1 / grow).value(full=True)
    lost = jnp.abs(round_nearest(shrunk, param.grid) - shrunk) > 0  # False for NaN.
    rounded = jnp.sum(lost, dtype=jnp.uint32)
    return grow, (rounded, jnp.sum(magnitude == param.grid.max_index, dtype=jnp.uint32))


def _no_look(param: GridArray) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.ones_like(param.scale), (jnp.uint32(0), jnp.uint32(0))
