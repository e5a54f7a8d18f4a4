"""Updates in whole grid steps from the start: what is special about AltGrad's GridOptim."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax._checks import check_number, check_static
from altgrad_jax._floats import as_real
from altgrad_jax.codec import encode, nan_index, narrowed
from altgrad_jax.formats import FloatFormat
from altgrad_jax.grid_array import (
    GridArray,
    checked_params,
    checked_values,
    flatten_stored,
    from_grid,
    is_grid_array,
    started,
)
from altgrad_jax.random_words import leaf_keys, random_words


class GridStepsState(NamedTuple):
    """State of `scale_by_grid_steps`."""

    grid_step: jax.Array  # uint32, []: updates so far, modulo 2**32. It keys the random words.


def scale_by_grid_steps(max_steps: int = 10, *, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Takes updates as numbers of grid steps: rounds them stochastically to whole ones and bounds them.

    An update of 1.0 moves a weight on a grid to the next number above it, whatever the spacing; with fraction bits, to
    the next stored position. The mean of the rounded steps is the update, up to the bound. An update of 0 moves
    nothing; one that is not finite makes its element NaN. AltGrad's GridOptim is biased upwards and sends NaN to max.

    Belongs at the end of a chain, in place of `on_grid`: the learning rate is the number of steps per unit of the
    updates. Parameters that are not GridArrays take their updates as they are; without any GridArray a ValueError.

    Args:
        max_steps: Bound of the steps of one update, in [1, 2**20].
        seed: Seed of the random words, which depend only on it, the step, the path of the leaf and the position in it.

    Returns:
        A transformation that needs the parameters. It takes real updates, of the shapes of `from_grid(params)`, and
        gives what `optax.apply_updates` adds to params. Weights stop at the largest number: scales stay as they are.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> params, tx = ag.to_grid(jnp.array([[0.5, -1.0, 0.25]])), ag.scale_by_grid_steps()
        >>> updates, state = tx.update(jnp.array([[-2.0, 300.0, 0.0]]), tx.init(params), params)
        >>> ag.from_grid(optax.apply_updates(params, updates))
        Array([[ 0.46875, -0.6875 ,  0.25   ]], dtype=float32)
    """
    check_static("max_steps", max_steps)
    check_number("max_steps", max_steps, "[1, 1048576]", integer=True)
    check_number("seed", seed, "[0, 4294967295]", integer=True)
    whole = whole_steps(int(max_steps))

    def init(params):
        # Only the update knows whether they are on a grid: optax.tree.map_params has none here.
        return started(params, GridStepsState(jnp.uint32(0)))

    def update(updates, state, params=None, **extra_args):
        del extra_args  # Those of other transformations of the chain.
        checked_values("scale_by_grid_steps", updates, params)
        paths, leaves, structure = flatten_stored(params)
        keys = leaf_keys(seed, state.grid_step, paths)
        moves = [
            _stepped(param, as_real(move), key, whole) if is_grid_array(param) else move
            for param, move, key in zip(leaves, structure.flatten_up_to(updates), keys, strict=True)
        ]
        return structure.unflatten(moves), GridStepsState(state.grid_step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def on_values(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets a transformation see GridArrays as the numbers that they stand for, in `init` and `update`."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        return inner.update(updates, state, checked_values("grid_sgd", updates, params), **extra_args)

    return optax.GradientTransformationExtraArgs(
        lambda params: started(params, inner.init(from_grid(checked_params(params), full=True))), update
    )


def whole_steps(max_steps: int) -> FloatFormat:
    """The integers up to `max_steps` as a format: rounding to it makes whole steps."""
    width = max_steps.bit_length()
    return FloatFormat("whole steps", exponent_bits=0, mantissa_bits=width, bias=-width, max=float(max_steps))


def _stepped(param: GridArray, move: jax.Array, key: jax.Array, whole: FloatFormat) -> GridArray:
    """The update of a GridArray by real numbers of steps."""
    steps = encode(narrowed(move), 0, whole, random_words(key, move.shape))
    index, nan = param.index.astype(jnp.int32), nan_index(param.grid)
    target = jnp.clip(index + steps, -param.grid.max_index if param.format.signed else 0, param.grid.max_index)
    target = jnp.where((index == nan) | (steps == nan_index(whole)), nan, target)
    step = target.astype(param.index.dtype) - param.index
    return dataclasses.replace(param, index=step, exponent=jnp.zeros_like(param.exponent))
