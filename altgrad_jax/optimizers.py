"""Named chains."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from altgrad_jax._checks import check_number
from altgrad_jax.compress_state import compress_state
from altgrad_jax.factored import scale_by_factored_rms
from altgrad_jax.formats import FormatLike
from altgrad_jax.grid_array import one_each
from altgrad_jax.grid_steps import on_values, scale_by_grid_steps
from altgrad_jax.on_grid import on_grid
from altgrad_jax.stiffness import stiffness_precondition, track_ulp_position


def manifold_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    manifold_aware: bool = True,
    mantissa_bits: int | None = None,
    format: FormatLike | None = None,
    max_stiffness: float = 1e6,
    zero_stiffness: float | None = None,
    mu_dtype: Any = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on gradients scaled by the stiffness of the grid, with a count of the ULPs moved: AltGrad's ManifoldAdamW.

    The chain `stiffness_precondition -> optax.scale_by_adam -> optax.add_decayed_weights ->
    optax.scale_by_learning_rate -> track_ulp_position`. Adam divides out constant factors: while no weight crosses a
    power of two this is AdamW with the eps of each weight divided by its stiffness. Under `optax.inject_hyperparams`
    give a format as a string or a `FloatFormat` (a dtype class is callable, which Optax takes for a schedule), and name
    `mu_dtype` and `mask` in `static_args`, as with `optax.adamw`; float16 parameters also need
    `hyperparam_dtype=jnp.float32`, as 1e6 exceeds float16.

    Args:
        learning_rate: A number >= 0 or a schedule.
        b1, b2: Decay rates of the first and the second moment, in [0, 1).
        eps: Added to the root of the second moment, >= 0. It competes with gradients times stiffness: for a fine grid,
            such as that of a 16-bit format, reduce it in proportion to the spacing. float16 parameters need 1e-4 or
            more: in float16 the default is 0, and Optax's Adam divides by it.
        weight_decay: Decoupled (Loshchilov, Hutter 2019, arXiv 1711.05101), >= 0, multiplied by the learning rate.
        manifold_aware: False makes it plain AdamW with the same tracker; the stiffness's arguments are only checked.
        mantissa_bits, max_stiffness, zero_stiffness: As in `stiffness_precondition`, with the same defaults.
        format: The grid, as in `stiffness_precondition` and in `track_ulp_position`, with the default of each.
        mu_dtype, mask: As in `optax.adamw`: the dtype of the first moment, and which leaves decay.

    Returns:
        A transformation whose update needs the parameters; `optax.tree.get(state, "ulp_position")` finds the count.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> tx, params = ag.manifold_adamw(0.01, mantissa_bits=3), {"w": jnp.array([1.0, -0.3])}
        >>> updates, state = tx.update({"w": jnp.array([0.2, -0.1])}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'w': Array([ 0.98990005, -0.2899701 ], dtype=float32)}
    """
    _check_numbers(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    _check_mask(mask)
    if not isinstance(manifold_aware, bool):
        raise TypeError(f"manifold_aware must be True or False, got {manifold_aware!r}.")
    precondition = stiffness_precondition(
        mantissa_bits, format=format, max_stiffness=max_stiffness, zero_stiffness=zero_stiffness
    )
    return optax.chain(
        precondition if manifold_aware else optax.identity(),
        optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        track_ulp_position(format),
    )


def grid_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    second_moment: str = "factored",
    seed: int = 0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW for parameters stored on a grid, without a float32 copy: one byte of state per weight, the momentum.

    It is `on_grid(chain(second moment, add_decayed_weights, scale_by_learning_rate), momentum=b1)`: AdamW with
    the momentum after the division by the root of the second moment (LaProp: Ziyin, Wang, Ueda 2020, arXiv
    2002.04839), the weight decay and the learning rate, where it carries the error of the rounding. Give
    `optax.inject_hyperparams` `hyperparam_dtype=jnp.float32`: in the dtype of the first leaf 0.999 may be 0 or 1.
    Wrappers of steps raise around it, and belong inside of `on_grid`, as in
    `on_grid(optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation())`.

    Args:
        learning_rate, weight_decay, mask: As in `manifold_adamw`.
        b1: Decay rate of the momentum, in [0, 1). 0 leaves it out, and its byte: for weights with fraction bits.
        b2: Decay rate of the second moment, in [0, 1).
        eps: Added to the root of the second moment, >= 0; its square to the means of a factored one.
        second_moment: "factored" keeps the means of the squares over rows and over columns (Adafactor: Shazeer, Stern
            2018, arXiv 1804.04235), float32: n + m numbers for a kernel `[n, m]`, as many for each matrix of a stack,
            every square for a leaf with fewer dimensions. Squares and updates are bounded: a gradient far larger than
            all others, even an infinite one, leaves other rows and columns as they are, and an update is at most
            1 / sqrt(1 - b2) learning rates, as under Adam, or 5.7. Sums over a sharded axis differ in their last bits.
            "8bit" takes a byte per weight, by `compress_state`, and "float32" four.
        seed: Seed of the random words, as in `on_grid`.

    Returns:
        A transformation whose update takes gradients with respect to `from_grid(params)` and needs the parameters.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> params, tx = ag.to_grid({"kernel": jnp.array([[0.5, -1.0]])}), ag.grid_adamw(0.1)
        >>> grads = {"kernel": jnp.array([[1.0, -1.0]])}   # with respect to ag.from_grid(params)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> ag.from_grid(optax.apply_updates(params, updates))["kernel"].shape
        (1, 2)
    """
    if second_moment not in ("factored", "8bit", "float32"):
        raise ValueError(f"second_moment must be 'factored', '8bit' or 'float32', got {second_moment!r}.")
    _check_numbers(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    _check_mask(mask)
    mask = mask if callable(mask) else one_each(mask)
    whole = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    inner = optax.chain(
        scale_by_factored_rms(b2, eps) if second_moment == "factored" else whole,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    without = not isinstance(b1, jax.Array) and b1 == 0
    tx = on_grid(inner, momentum=None if without else b1, seed=seed)
    return compress_state(tx, seed=seed) if second_moment == "8bit" else tx


def grid_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    *,
    max_steps: int = 10,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Momentum that moves weights by whole grid steps, whatever their size: AltGrad's GridOptim, corrected.

    The chain `optax.add_decayed_weights -> optax.trace -> optax.scale_by_learning_rate -> scale_by_grid_steps`.
    Parameters that are not GridArrays are trained by the same chain without its last part, which is SGD.

    Args:
        learning_rate: Grid steps per unit of momentum, a number >= 0 or a schedule.
        momentum: Decay rate of the sum of the gradients, in [0, 1).
        weight_decay: A multiple of the weights, in real units, that is added to the gradients; >= 0.
        max_steps, seed: As in `scale_by_grid_steps`: the bound of the steps of one update, and the seed.

    Returns:
        As from `grid_adamw`.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> params, tx = ag.to_grid(jnp.array([[1.0, -0.5, 0.25, 2.0]])), ag.grid_sgd(1.0)
        >>> updates, state = tx.update(jnp.array([[2.0, -3.0, 0.0, 20.0]]), tx.init(params), params)
        >>> ag.from_grid(optax.apply_updates(params, updates))
        Array([[ 0.9375  , -0.453125,  0.25    ,  1.375   ]], dtype=float32)
    """
    _check_numbers(learning_rate, momentum=momentum, weight_decay=weight_decay)
    sgd = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.trace(momentum), optax.scale_by_learning_rate(learning_rate)
    )
    return optax.chain(on_values(sgd), scale_by_grid_steps(max_steps, seed=seed))


def _check_numbers(learning_rate: optax.ScalarOrSchedule, **numbers: float) -> None:
    """Raises unless learning rate, eps and weight decay are >= 0 and all others, which are decay rates, in [0, 1)."""
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, "[0, inf)")
    for name, number in numbers.items():
        check_number(name, number, "[0, inf)" if name in ("eps", "weight_decay") else "[0, 1)")


def _check_mask(mask: Any) -> None:
    """Raises if nothing would decay: optax.inject_hyperparams makes that of a function, which it calls with a count."""
    if mask is False:
        raise TypeError(
            "mask must be a tree of bools or a function, got False: name it in the static_args of inject_hyperparams, "
            "which takes a function for a schedule, or give weight_decay=0."
        )
