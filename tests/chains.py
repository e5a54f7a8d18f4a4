"""Chains for parameters stored on a grid, by the names that tests show."""

import optax

import altgrad_jax as ag

STORED = {
    "grid_adamw": lambda: ag.grid_adamw(1e-2),
    "grid_adamw, no momentum": lambda: ag.grid_adamw(1e-2, b1=0),
    "grid_adamw, 8bit": lambda: ag.grid_adamw(1e-2, second_moment="8bit"),
    "grid_adamw, float32": lambda: ag.grid_adamw(1e-2, second_moment="float32"),
    "grid_sgd": lambda: ag.grid_sgd(1.0),
    "on_grid(adamw)": lambda: ag.on_grid(optax.adamw(1e-2)),
}
