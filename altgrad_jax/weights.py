"""Which leaves of a tree of parameters are weights, and which are biases and norms."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Terms and factors of activations in Flax, Haiku, Keras and Equinox, and running statistics.
_NAMES = ("b", "beta", "bias", "bias_n", "gain", "gamma", "mean", "offset", "scale", "shift", "var")
_NORM = re.compile(r".*(norm|ln)[_\d]*")


def reasons_against(paths: Sequence[tuple], leaves: Sequence[Any]) -> list[str | None]:
    """Why each leaf is not a weight: its dtype, its dimensions, its name, its norm, or a bias of its shape; or None.

    By shape alone the scale of a norm and the bias of a head would be weights as soon as layers are stacked. The name
    is the whole last component of the path: `up/scale` is a scale and `upscale/kernel` is not. A `b` beside which no
    leaf has more dimensions is a matrix, as in LoRA. A leaf in a module whose name ends with norm or ln belongs to a
    norm (`weight` in Equinox), and so does a leaf with a bias of its own shape beside it.
    """
    names = [_components(path) for path in paths]
    beside = {}
    for (*module, name), leaf in zip(names, leaves, strict=True):
        beside.setdefault(tuple(module), {})[name] = np.shape(leaf) if hasattr(leaf, "shape") else ()
    return [_reason(name, leaf, beside[tuple(name[:-1])]) for name, leaf in zip(names, leaves, strict=True)]


def _reason(path: tuple[str, ...], leaf: Any, beside: dict[str, tuple[int, ...]]) -> str | None:
    module, name = (path[-2] if len(path) > 1 else ""), path[-1]
    shape = beside[name]
    if len(shape) < 2:
        return f"of {len(shape)} dimensions"
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"of dtype {dtype}"
    if name in _NAMES and (name != "b" or max(map(len, beside.values())) > len(shape)):
        return f"named {name}"
    if _NORM.fullmatch(module.lower()):
        return f"in {module}"
    return "of the shape of its bias" if name != "bias" and beside.get("bias") == shape else None


def _components(path: tuple) -> tuple[str, ...]:
    """Names on the path to a leaf, split where a dictionary was flattened, and indices in brackets."""
    found = [""]
    for key in path:
        parts = getattr(key, "key", getattr(key, "name", None))
        for part in parts if isinstance(parts, tuple) else (parts,):
            found += re.split(r"[/.]", part) if isinstance(part, str) else [jax.tree_util.keystr((key,))]
    # Flax nnx keeps the array of a variable in its field `value`.
    return tuple(found[:-1] if path and getattr(path[-1], "name", None) == "value" else found)
