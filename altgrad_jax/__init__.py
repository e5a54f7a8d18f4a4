"""Optax transformations for training on low-precision grids."""

from altgrad_jax import diagnostics
from altgrad_jax.compress_state import CompressedState, compress_state
from altgrad_jax.formats import FloatFormat, as_format
from altgrad_jax.gradients import value_and_grad
from altgrad_jax.grid import nextafter, position, spacing, value
from altgrad_jax.grid_array import GridArray, from_grid, shardings, signed_steps, to_grid
from altgrad_jax.grid_steps import GridStepsState, scale_by_grid_steps
from altgrad_jax.layerwise import layerwise_update
from altgrad_jax.on_grid import OnGridState, on_grid
from altgrad_jax.optimizers import grid_adamw, grid_sgd, manifold_adamw
from altgrad_jax.rounding import fake_quantize, round_nearest, round_stochastic
from altgrad_jax.scales import power_of_two_scale
from altgrad_jax.stiffness import UlpPositionState, stiffness_precondition, track_ulp_position

__all__ = [
    "CompressedState",
    "FloatFormat",
    "GridArray",
    "GridStepsState",
    "OnGridState",
    "UlpPositionState",
    "as_format",
    "compress_state",
    "diagnostics",
    "fake_quantize",
    "from_grid",
    "grid_adamw",
    "grid_sgd",
    "layerwise_update",
    "manifold_adamw",
    "nextafter",
    "on_grid",
    "position",
    "power_of_two_scale",
    "round_nearest",
    "round_stochastic",
    "scale_by_grid_steps",
    "shardings",
    "signed_steps",
    "spacing",
    "stiffness_precondition",
    "to_grid",
    "track_ulp_position",
    "value",
    "value_and_grad",
]
