"""Updates that are whole numbers of grid steps from the start: the part of AltGrad's GridOptim that is its own."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax._checks import check_number
from altgrad_jax.formats import FloatFormat
from altgrad_jax.grid import as_real
from altgrad_jax.grid_array import GridArray, checked_values, from_grid, is_grid_array, nan_index
from altgrad_jax.rounding import leaf_words, random_bits, stochastic_index


class GridStepsState(NamedTuple):
    """State of `scale_by_grid_steps`; the counts are those of the last update, over all GridArrays."""

    grid_step: jax.Array  # uint32, []: updates so far, modulo 2**32. It keys the random bits.
    moved: jax.Array  # uint32, []: elements with an update that is neither zero nor NaN.
    flips: jax.Array  # uint32, []: elements that became another number.
    saturated: jax.Array  # uint32, []: elements that would have passed the largest number, and stay there.
    not_finite: jax.Array  # uint32, []: elements whose update is NaN, and that stay where they are.


def scale_by_grid_steps(max_steps: int = 10, *, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Takes updates as numbers of grid steps: rounds them stochastically to whole ones and bounds them.

    An update of 1.0 moves a weight that is stored on a grid to the next number above it, whatever the spacing there;
    with fraction bits, to the next stored position. The mean of the rounded steps is the update, up to the bound. An
    update of zero moves nothing, NaN leaves the weight where it is and is counted, infinities are `max_steps`.

    Needs the parameters. Belongs at the end of a chain, in the place of `on_grid`: the learning rate says how many
    steps a unit of the updates is. Parameters that are no GridArrays take their updates as they are.

    Args:
        max_steps: Bound of the steps of one update, in [1, 2**20].
        seed: Of the random bits, which are a function of the seed, the number of the step, the path of the leaf and
            the position of the element alone.

    Returns:
        A transformation whose update takes real updates, of the shapes of `from_grid(params)`, and returns what
        `optax.apply_updates` adds to params. The largest number is not passed: scales stay as they are.

    Raises:
        ValueError: If an argument is out of bounds, or, in the update, if no parameter is stored on a grid or updates
            and parameters do not go together.

    References:
        The AltGrad project, GridOptim, whose rounding is biased upwards and which sends NaN to the largest number.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> params = ag.to_grid(jnp.array([[0.5, -1.0, 0.25]]))
        >>> tx = ag.scale_by_grid_steps()
        >>> updates, state = tx.update(jnp.array([[-2.0, 300.0, 0.0]]), tx.init(params), params)
        >>> ag.from_grid(optax.apply_updates(params, updates))
        Array([[ 0.4375, -0.4375,  0.25  ]], dtype=float32)
    """
    check_number("max_steps", max_steps, "[1, 1048576]", integer=True)
    check_number("seed", seed, "[0, 4294967295]", integer=True)
    whole = whole_steps(int(max_steps))

    def init(params):
        del params  # Only the update knows whether they are on a grid: optax.tree.map_params has none here.
        return GridStepsState(*[jnp.uint32(0)] * 5)

    def update(updates, state, params=None, **extra_args):
        del extra_args  # Those of other transformations of the chain.
        checked_values("scale_by_grid_steps", updates, params)
        with_path, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_grid_array)
        moves, counts = tree.flatten_up_to(updates), [jnp.uint32(0)] * 4
        for i, (path, param) in enumerate(with_path):
            if is_grid_array(param):
                words = leaf_words(seed, path, state.grid_step)
                moves[i], leaf_counts = _stepped(param, as_real(moves[i]), words, whole)
                counts = [a + b for a, b in zip(counts, leaf_counts, strict=True)]
        return tree.unflatten(moves), GridStepsState(state.grid_step + 1, *counts)

    return optax.GradientTransformationExtraArgs(init, update)


def on_values(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets a transformation see GridArrays as the numbers that they stand for, in `init` and `update`."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        return inner.update(updates, state, from_grid(params, full=True), **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(from_grid(params, full=True)), update)


def whole_steps(max_steps: int) -> FloatFormat:
    """The integers up to a largest one, as a format: rounding to it makes numbers of steps."""
    width = max_steps.bit_length()
    return FloatFormat("whole steps", exponent_bits=0, mantissa_bits=width, bias=-width, max=float(max_steps))


def _stepped(
    param: GridArray, move: jax.Array, words: jax.Array, whole: FloatFormat
) -> tuple[GridArray, tuple[jax.Array, ...]]:
    """The update of a GridArray by real numbers of steps, and the counts of `GridStepsState`."""
    undefined, index = jnp.isnan(move), param.index.astype(jnp.int32)
    steps = stochastic_index(jnp.where(undefined, 0, move), random_bits(words, move.shape), whole)
    # NaN, the most negative index, stays what it is.
    steps = jnp.where(index == nan_index(param.index.dtype), 0, steps)
    target = jnp.clip(index + steps, -param.grid.max_index, param.grid.max_index)
    target = jnp.where(steps == 0, index, target)
    counts = ((move != 0) & ~undefined, target != index, target != index + steps, undefined)
    step = target.astype(param.index.dtype) - param.index
    update: Any = dataclasses.replace(param, index=step, scale=jnp.zeros_like(param.scale))
    return update, tuple(jnp.sum(count, dtype=jnp.uint32) for count in counts)
