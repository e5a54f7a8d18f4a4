"""Which leaves of a tree of parameters are weights, and which are biases and norms."""

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

# Of Flax, Haiku, Keras and Equinox, for what is added to or multiplied with an activation; and running statistics.
_NAMES = frozenset(["b", "beta", "bias", "bias_n", "gain", "gamma", "mean", "offset", "scale", "shift", "var"])


def reasons_against(paths: Sequence[tuple], leaves: Sequence[Any]) -> list[str | None]:
    """Why each leaf is no weight: its dtype, its dimensions, its name, or a bias of its shape beside it; or None.

    The name is the last component of the path, whole: `up/scale` is a scale and `upscale/kernel` is not. By shape alone
    the scale of a norm and the bias of a head would be weights as soon as layers are stacked. Norms whose scale has
    another name (`weight` in Equinox) are known by their bias.
    """
    names = [_components(path) for path in paths]
    shapes = {name: np.shape(leaf) for name, leaf in zip(names, leaves, strict=True)}
    return [_reason(name, leaf, shapes) for name, leaf in zip(names, leaves, strict=True)]


def _reason(name: tuple[str, ...], leaf: Any, shapes: dict[tuple[str, ...], tuple[int, ...]]) -> str | None:
    dtype, shape = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf), np.shape(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"of dtype {dtype}"
    if len(shape) < 2:
        return f"of {len(shape)} dimensions"
    if name and name[-1] in _NAMES:
        return f"named {name[-1]}"
    return "of the shape of its bias" if name and shapes.get((*name[:-1], "bias")) == shape else None


def _components(path: tuple) -> tuple[str, ...]:
    """Names on the way to a leaf, those of flattened dictionaries taken apart; empty for the places in a sequence."""
    found = []
    for key in path:
        parts = getattr(key, "key", getattr(key, "name", ""))
        for part in parts if isinstance(parts, tuple) else (parts,):
            found += re.split(r"[/.]", part) if isinstance(part, str) else [""]
    # Flax nnx keeps the array of a variable in its field `value`.
    nnx = getattr(path[-1], "name", None) == "value" if path else False
    return tuple(found[:-1] if nnx else found)
