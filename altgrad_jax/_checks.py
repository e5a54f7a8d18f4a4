"""Clear errors for bad input, raised at the first place that can know."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_number(name: str, value: Any, interval: str, *, integer: bool = False) -> None:
    """Raises unless a hyperparameter is a real number in an interval, such as "[0, 1)"."""
    if isinstance(value, jax.Array):  # Maybe a tracer, as under optax.inject_hyperparams.
        if not integer and jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(
                f"{name} must be a floating number, got an array of {value.dtype}: give optax.inject_hyperparams "
                "hyperparam_dtype=jnp.float32, because its default is that of the first leaf, here an integer dtype."
            )
        return
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()  # A bfloat16 of NumPy is no numbers.Real.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in {interval}, got {value!r}.")
    number, (low, high) = float(value), map(float, interval[1:-1].split(","))
    inside_low = number >= low if interval[0] == "[" else number > low
    inside_high = number <= high if interval[-1] == "]" else number < high
    if not (inside_low and inside_high):
        raise ValueError(f"{name} must be in {interval}, got {value}.")
    if integer and number != int(number):
        raise ValueError(f"{name} must be an integer, got {value}.")


def check_static(name: str, value: Any) -> None:
    """Raises if an argument that shapes the program is an array, as under optax.inject_hyperparams."""
    if isinstance(value, jax.Array):
        raise TypeError(f"{name} must be no array, got {value}: name it in the static_args of inject_hyperparams.")


def check_float_leaves(transformation: str, name: str, tree: Any) -> None:
    """Raises TypeError unless every leaf of params or updates is of a floating dtype that Optax computes in."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
            raise TypeError(
                f"{transformation} needs {name} in float32, bfloat16, float16 or float64, got {dtype} at "
                f"{name}{jax.tree_util.keystr(path)}: cast it, or leave it out with optax.masked or optax.partition."
            )


def check_same_tree(transformation: str, name: str, tree: Any, params: Any, *, broadcast: bool = False) -> None:
    """Raises ValueError without params, or unless a tree has their structure and shapes (or broadcasts to them)."""
    if params is None:
        raise ValueError(f"{transformation} needs the parameters: call update(updates, state, params).")
    if jax.tree.structure(params) != jax.tree.structure(tree):
        raise ValueError(
            f"{transformation} needs {name} and params of one tree structure, got {name} {jax.tree.structure(tree)} "
            f"and params {jax.tree.structure(params)}."
        )
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, param), leaf in zip(paths, jax.tree.leaves(tree), strict=True):
        if not (fits(jnp.shape(leaf), jnp.shape(param)) if broadcast else jnp.shape(leaf) == jnp.shape(param)):
            raise ValueError(
                f"{transformation} needs {name} {'that broadcast to' if broadcast else 'of'} the shapes of the "
                f"params, got {jnp.shape(leaf)} for {jnp.shape(param)} at params{jax.tree_util.keystr(path)}."
            )


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an array of a shape broadcasts to a wanted shape."""
    try:
        return np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        return False
