"""The stiffness of the grid in an optimizer: gradients scaled by it, movements measured in it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from altgrad_jax._checks import check_float_leaves, check_number, check_same_tree
from altgrad_jax._floats import as_real, compiled, floor_log2, power_of_two
from altgrad_jax.formats import FloatFormat, FormatLike, as_format, own_format
from altgrad_jax.grid import scaled_ulp, ulp_exponent
from altgrad_jax.grid_array import flatten_stored, from_grid, is_grid_array, map_stored, signed_steps
from altgrad_jax.rounding import round_nearest


def stiffness_precondition(
    mantissa_bits: int | None = None,
    *,
    format: FormatLike | None = None,
    max_stiffness: float = 1e6,
    zero_stiffness: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the stiffness of the grid at each parameter, as in AltGrad's ManifoldAdamW.

    The stiffness is the derivative of the value with respect to the position on the grid, so the product is, by the
    chain rule, the gradient with respect to the position. Belongs before `optax.scale_by_adam`, where AltGrad has it,
    or after it. Before it, Adam divides the stiffness out again, except for its eps and weights that cross a power of
    two; after it, every weight moves by a number of ULPs that does not depend on its size.

    Args:
        mantissa_bits: An integer in [0, 23], default 2: without a format the stiffness is that of an unbounded
            floating-point grid, `2 ** (floor(log2(abs(w))) - mantissa_bits)`. Excludes `format`.
        format: Anything that `as_format` accepts: the stiffness is then `spacing(w, format)`.
        max_stiffness: Upper bound of the stiffness, in (0, inf].
        zero_stiffness: Stiffness of the unbounded grid at parameters of 0, in [0, inf), default 1. Excludes `format`.

    Returns:
        A stateless transformation that needs the parameters, in float32, bfloat16, float16 or float64 (else a
        TypeError). It forms the product in float32 (float64 for float64 parameters) and keeps the updates' dtype. With
        a format it takes the extra argument `grid_scale`, a tree like the parameters, of arrays that broadcast against
        them: real units per unit of the format (1: unscaled). The stiffness is `grid_scale * spacing(w / grid_scale)`.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> tx = optax.chain(ag.stiffness_precondition(3), optax.scale_by_adam(), optax.scale_by_learning_rate(0.1))
        >>> ag.stiffness_precondition(3).update(jnp.ones(3), optax.EmptyState(), jnp.array([1.0, -5.0, 0.0]))[0]
        Array([0.125, 0.5  , 1.   ], dtype=float32)
    """
    check_number("max_stiffness", max_stiffness, "(0, inf]")
    if format is None:
        mantissa_bits = 2 if mantissa_bits is None else mantissa_bits
        zero_stiffness = 1.0 if zero_stiffness is None else zero_stiffness
        check_number("mantissa_bits", mantissa_bits, "[0, 23]", integer=True)
        check_number("zero_stiffness", zero_stiffness, "[0, inf)")
    else:
        format = as_format(format)
        for name, argument in (("mantissa_bits", mantissa_bits), ("zero_stiffness", zero_stiffness)):
            if argument is not None:
                raise ValueError(
                    f"{name} belongs to the unbounded grid and excludes a format, got {name}={argument} and "
                    f"format={format.name}: leave out one."
                )

    def init(params):
        if any(map(is_grid_array, flatten_stored(params)[1])):
            raise ValueError("stiffness_precondition of GridArrays belongs inside of on_grid, got GridArrays.")
        check_float_leaves("stiffness_precondition", "params", params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, grid_scale=None, **extra_args):
        del extra_args  # Those of other transformations of the chain.
        grid_scale = _check_update("stiffness_precondition", updates, params, grid_scale)

        def leaf(g, w, scale):
            if format is None:  # The unbounded grid scaled by a power of two is itself.
                return stiffened(g, w, mantissa_bits, zero_stiffness, max_stiffness)
            stiffness = jnp.minimum(scaled_ulp(as_real(w), format, scale), max_stiffness)
            return (g * stiffness).astype(jnp.result_type(g))

        return jax.tree.map(leaf, updates, params, grid_scale), state

    return optax.GradientTransformationExtraArgs(init, update)


class UlpPositionState(NamedTuple):
    """State of `track_ulp_position`."""

    ulp_position: optax.Params  # float32, shapes of the parameters.


def track_ulp_position(format: FormatLike | None = None) -> optax.GradientTransformationExtraArgs:
    """Counts the ULPs by which every parameter has moved, signed, since init; passes updates through.

    Adds `(w_after - w_before) / spacing(w_before)` at each step, where `w_after` is the parameter as
    `optax.apply_updates` will store it, rounded to its dtype. Where `w_before` is 0, or its spacing below 2**-126
    (which XLA flushes), the divisor is the largest of the spacings before and after and 2**-126. AltGrad's
    `bit_position` has half of this ULP at negative powers of two, and is infinite after a move from 0.

    Belongs at the end of a chain, after the learning rate, to see the final update. Around an `on_grid` it counts the
    steps that the stored parameters really move, in ULPs of their own format; inside, the intended movement.

    Args:
        format: The grid whose ULPs are counted, as in `spacing`; default: each parameter's own, as for GridArrays.

    Returns:
        A transformation with a `UlpPositionState` that needs the parameters, of the dtypes of `stiffness_precondition`,
        and takes its `grid_scale` with a format. Positions are finite for finite parameters and saturate at the largest
        float32; integral moves add up exactly while they stay within 2**24.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> params, tx = jnp.array([1.0, -4.0, 0]), optax.chain(optax.sgd(1.0), ag.track_ulp_position("float8_e4m3fn"))
        >>> updates, state = tx.update(jnp.array([-0.25, -0.25, 0.5]), tx.init(params), params)
        >>> optax.tree.get(state, "ulp_position")
        Array([ 2. ,  0.5, -8. ], dtype=float32)
    """
    format = None if format is None else as_format(format)

    def init(params):
        check_float_leaves("track_ulp_position", "params", _without_grid_arrays(params))
        return UlpPositionState(optax.tree.zeros_like(from_grid(params), dtype=jnp.float32))

    def update(updates, state, params=None, *, grid_scale=None, **extra_args):
        del extra_args  # Those of other transformations of the chain.
        grid_scale = _check_update("track_ulp_position", updates, params, grid_scale)

        def leaf(w, position, u, scale):
            if is_grid_array(w):
                ulps = signed_steps(u, w).astype(jnp.float32) / 2.0**w.fraction_bits
            elif format is None:
                ulps = ulps_moved(w, u, own_format(jnp.result_type(w)))
            else:
                ulps = ulps_moved(w, u, format, scale)
            return jnp.clip(position + ulps, jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max)

        positions = map_stored(leaf, params, state.ulp_position, updates, grid_scale)
        return jax.tree.map(_pinned, updates), UlpPositionState(positions)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, inline=True)
def stiffened(
    g: jax.Array, w: jax.Array, mantissa_bits: ArrayLike, zero_stiffness: ArrayLike, max_stiffness: ArrayLike
) -> jax.Array:
    """g * min(2 ** (floor(log2(abs(w))) - mantissa_bits), max_stiffness), in the dtype of g."""
    w = as_real(w)
    lowest = jnp.finfo(w.dtype).minexp
    exponent = floor_log2(w) - jnp.asarray(mantissa_bits).astype(jnp.int32)
    zero = floor_log2(w) < lowest
    stiffness = jnp.where(zero, zero_stiffness, power_of_two(jnp.maximum(exponent, lowest), w.dtype))
    # XLA flushes a stiffness below 2**-126, but its product with a large gradient is a normal number.
    rest = jnp.where(zero, 1, power_of_two(jnp.minimum(exponent - lowest, 0), w.dtype))
    return (g * jnp.minimum(stiffness, max_stiffness).astype(w.dtype) * rest).astype(jnp.result_type(g))


@compiled
def ulps_moved(w: jax.Array, update: jax.Array, format: FloatFormat, scale: ArrayLike = 1.0) -> jax.Array:
    """Signed ULPs of a scaled format, float32, by which an update moves w as it will be stored."""
    before = as_real(w)
    after = _as_stored(before + _as_stored(as_real(update), update), w).astype(before.dtype)
    exponent = ulp_exponent(before / scale, format) + floor_log2(as_real(scale))
    flushed = (before == 0) | (exponent < jnp.finfo(before.dtype).minexp)
    ulp_before, ulp_after = scaled_ulp(before, format, scale), scaled_ulp(after, format, scale)
    ulps = (after - before) / jnp.where(flushed, jnp.maximum(ulp_before, ulp_after), ulp_before)
    return ulps.astype(jnp.float32)


def _as_stored(x: jax.Array, like: jax.Array) -> jax.Array:
    """Rounds to the dtype of another array: arithmetically, because XLA may remove a cast and its inverse."""
    own = own_format(jnp.result_type(like))
    return round_nearest(x, own) if own.bits < 32 else x


def _pinned(update: Any) -> Any:
    """The update itself; if it is float16, in a form that XLA must round before it applies it."""
    # On CPUs with float16 arithmetic XLA would contract a product and the sum, and not store what is counted.
    if jnp.result_type(update) != jnp.float16:
        return update
    return jnp.where(jnp.isfinite(update), _as_stored(as_real(update), update).astype(jnp.float16), update)


def _without_grid_arrays(tree: Any) -> Any:
    return map_stored(lambda leaf: None if is_grid_array(leaf) else leaf, tree)


def _check_update(transformation: str, updates: Any, params: Any, grid_scale: Any) -> Any:
    """Returns the scale of every leaf, 1 by default; raises unless the three trees match."""
    check_same_tree(transformation, "updates", updates, params)
    check_float_leaves(transformation, "params", _without_grid_arrays(params))
    check_float_leaves(transformation, "updates", _without_grid_arrays(updates))
    if grid_scale is None:
        return map_stored(lambda w: 1.0, params)
    # optax.masked and optax.partition mask the params, but not the extra arguments.
    masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    if any(map(masked, jax.tree.leaves(params, is_leaf=masked))):
        grid_scale = jax.tree.map(lambda p, scale: p if masked(p) else scale, params, grid_scale, is_leaf=masked)
    check_same_tree(transformation, "grid_scale", grid_scale, params, broadcast=True)
    for path, scale in jax.tree_util.tree_leaves_with_path(grid_scale):
        if isinstance(scale, float | int):
            check_number(f"grid_scale{jax.tree_util.keystr(path)}", scale, "(0, inf)")
    return grid_scale
