"""Optax transformations for training on low-precision grids."""

from altgrad_jax.formats import FloatFormat, as_format
from altgrad_jax.grid import nextafter, position, spacing, value
from altgrad_jax.optimizers import manifold_adamw
from altgrad_jax.rounding import fake_quantize, power_of_two_scale, round_nearest, round_stochastic
from altgrad_jax.stiffness import UlpPositionState, stiffness_precondition, track_ulp_position

__all__ = [
    "FloatFormat",
    "UlpPositionState",
    "as_format",
    "fake_quantize",
    "manifold_adamw",
    "nextafter",
    "position",
    "power_of_two_scale",
    "round_nearest",
    "round_stochastic",
    "spacing",
    "stiffness_precondition",
    "track_ulp_position",
    "value",
]
