"""Any Optax transformation, for parameters that are stored on a grid."""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax._checks import check_float_leaves, check_number, check_same_tree
from altgrad_jax.grid import as_real
from altgrad_jax.grid_array import GridArray, from_grid, is_grid_array
from altgrad_jax.rounding import mix, nearest_index, random_bits, round_nearest, stochastic_index

# Between two looks at the largest index of every scale: one byte per weight and look.
RESCALE_PERIOD = 64


class OnGridState(NamedTuple):
    """State of `on_grid`."""

    grid_step: jax.Array  # uint32, []: updates so far, modulo 2**32. It keys the random bits.
    rescale_rounded: jax.Array  # uint32, []: elements that a rescale had to round, modulo 2**32.
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

    With `feedback="momentum"` the error of every rounding goes back into a momentum that is kept in units of the
    update, behind the normalisation of the inner transformation, so that no schedule can amplify it:

        M <- b M + (1 - b) u;  target = w + M / c;  w' = round(target);  M <- M + (1 / b - 1) c (target - w')

    where u is the update of the inner transformation, b the momentum and c = 1 - b**t its bias correction. Parameters
    that are not stored on a grid have the same momentum. The inner transformation then brings none of its own.

    Args:
        inner: The transformation whose updates are stored, learning rate and weight decay included.
        rounding: "stochastic" (unbiased) or "nearest".
        feedback: None, or "momentum".
        momentum: Decay rate of the momentum, in (0, 1). Default with feedback: 0.9; without feedback there is none.
        seed: Of the random bits, which are a function of the seed, the number of the step, the path of the leaf and
            the position of the element alone: any sharding and any restart draws the same ones. (Whether the inner
            transformation computes the same movement on every sharding, to the last bit, is up to XLA.)

    Returns:
        A transformation whose update takes gradients with respect to `from_grid(params)` and needs the parameters.
        It hands the extra argument `grid_scale` to the inner one: a tree like params, the scale of every GridArray
        and 1 for other leaves. `optax.MultiSteps` and `optax.apply_if_finite` belong inside of it; line searches
        (`optax.lbfgs`) are refused, as the losses they compare lie between the numbers of the grid.

        When an element of a row comes within a factor of two of the largest number, the row's scale is doubled; it is
        looked at every 64 steps. That moves no element but those which lose their last bit, rounded to nearest-even
        and counted in `rescale_rounded`.

    Raises:
        ValueError: If an argument is out of bounds, if `momentum` comes without feedback, or, in the update, if no
            parameter is stored on a grid, gradients and parameters do not go together or the argument `value_fn` of
            a line search is given.

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

    def init(params):
        floats = from_grid(params, full=True)
        carried = optax.tree.zeros_like(floats, dtype=jnp.float32) if feedback else ()
        return OnGridState(jnp.uint32(0), jnp.uint32(0), carried, inner.init(floats))

    def update(updates, state, params=None, **extra_args):
        if "value_fn" in extra_args:
            raise ValueError(
                "on_grid cannot store the steps of a line search, got value_fn: the losses it compares lie between the "
                "numbers of the grid. Use an optimizer that takes its step from the gradient."
            )
        floats = _check_update(updates, params)
        scales = jax.tree.map(lambda p: p.scale if is_grid_array(p) else 1.0, params, is_leaf=is_grid_array)
        moves, inner_state = inner.update(updates, state.inner_state, floats, **(extra_args | {"grid_scale": scales}))
        carried, correction = (), 1 - beta ** (state.grid_step.astype(jnp.float32) + 1)
        if feedback:
            carried = jax.tree.map(lambda m, u: beta * m + (1 - beta) * u, state.momentum, moves)
            moves = jax.tree.map(lambda m, u: (m / correction).astype(u.dtype), carried, moves)

        with_path, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_grid_array)
        steps, errors, rounded = tree.flatten_up_to(moves), [0.0] * len(with_path), state.rescale_rounded
        for i, (path, param) in enumerate(with_path):
            if is_grid_array(param):
                words = _words(seed, path, state.grid_step) if rounding == "stochastic" else None
                steps[i], errors[i], count = stored(param, steps[i], words, state.grid_step % RESCALE_PERIOD == 0)
                rounded += count
        if feedback:
            gain = (1 / beta - 1) * correction
            carried = jax.tree.map(lambda m, error: m + gain * error, carried, tree.unflatten(errors))
        return tree.unflatten(steps), OnGridState(state.grid_step + 1, rounded, carried, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def stored(
    param: GridArray, move: jax.Array, words: jax.Array | None, look: jax.Array
) -> tuple[GridArray, jax.Array, jax.Array]:
    """Rounds a movement of a GridArray to whole steps.

    Args:
        param: The array before.
        move: Intended movement in real units, float32, shape of the array.
        words: Key of the random bits, uint32 of shape `[2]`; None rounds to nearest-even.
        look: bool, []. Whether to double the scales that have too little headroom left.

    Returns:
        The update to add; the error, intended minus stored, float32, shape of the array; and how many elements the
        doubling rounded, uint32.
    """
    grid, before, move = param.grid, param.value(full=True), as_real(move).astype(jnp.float32)
    grow, rounded = jax.lax.cond(
        look, _headroom, lambda param: (jnp.zeros(param.scale.shape, bool), jnp.uint32(0)), param
    )
    scale = jnp.where(grow, 2 * param.scale, param.scale)
    target = before + move
    index = nearest_index(target / scale, grid)
    if words is not None:
        # Where nothing is to move, only a doubled scale can leave a rest: nearest-even, not at random.
        chance = stochastic_index(target / scale, random_bits(words, target.shape), grid)
        index = jnp.where(move == 0, index, chance)
    error = target - dataclasses.replace(param, index=index, scale=scale).value(full=True)
    # In the dtype of the index, modulo its range: through int32 the sum would take a kernel of its own on TPUs.
    step = index.astype(param.index.dtype) - param.index
    return dataclasses.replace(param, index=step, scale=scale - param.scale), error, rounded


def _headroom(param: GridArray) -> tuple[jax.Array, jax.Array]:
    """Which scales to double, as an element is beyond half of the largest number; and what that has to round."""
    shared = [axis for axis in range(param.ndim) if param.scale.ndim == 0 or param.scale.shape[axis] == 1]
    # In int32, as -128 has no magnitude in int8; no index is -128, but a sum of wrong updates may be.
    magnitude = jnp.abs(param.index.astype(jnp.int32))
    limit = nearest_index(jnp.float32(param.format.max / 2), param.grid)
    grow = jnp.max(magnitude, axis=shared, keepdims=param.scale.ndim > 0, initial=0) > limit
    halved = 0.5 * dataclasses.replace(param, scale=jnp.float32(1)).value(full=True)
    return grow, jnp.sum(grow & (round_nearest(halved, param.grid) != halved), dtype=jnp.uint32)


def _words(seed: jax.typing.ArrayLike, path: tuple, step: jax.Array) -> jax.Array:
    """Two words that key the random bits of a leaf at a step."""
    # Not Python's hash, which differs from process to process.
    leaf = jnp.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return jnp.stack([mix(mix(jnp.asarray(seed, jnp.uint32)) ^ leaf), mix(mix(step + leaf) ^ jnp.uint32(0x9E3779B9))])


def _check_update(updates: Any, params: Any) -> Any:
    """Returns the numbers of the parameters; raises unless gradients with respect to them were given."""
    if params is None:
        raise ValueError("on_grid needs the parameters: call update(updates, state, params).")
    if not any(map(is_grid_array, jax.tree.leaves(params, is_leaf=is_grid_array))):
        raise ValueError("on_grid was given no parameter that is stored on a grid: make some with to_grid(params).")
    if any(map(is_grid_array, jax.tree.leaves(updates, is_leaf=is_grid_array))):
        raise ValueError(
            "on_grid takes gradients with respect to from_grid(params), got GridArrays: differentiate a function of "
            "from_grid(params), and put optax.MultiSteps and optax.apply_if_finite inside of on_grid."
        )
    floats = from_grid(params, full=True)
    check_same_tree("on_grid", "updates", updates, floats)
    check_float_leaves("on_grid", "updates", updates)
    return floats
