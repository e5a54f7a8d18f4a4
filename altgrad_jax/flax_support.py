"""What Flax needs to know of a GridArray: import this module for `flax.serialization` to store and restore them.

A GridArray is restored into one of the same format, fraction bits, shape and dtype; another target is refused.

Example:
    >>> import altgrad_jax as ag, altgrad_jax.flax_support, flax, jax.numpy as jnp
    >>> params = ag.to_grid({"kernel": jnp.array([[0.5, -1.0]])})
    >>> blob = flax.serialization.to_bytes(params)
    >>> flax.serialization.from_bytes(params, blob)["kernel"]
    GridArray(float8_e3m4, shape=(1, 2), int8 + int8[1,1])
"""

import dataclasses
from typing import Any

from flax import serialization

from altgrad_jax.grid_array import GridArray


def _described(param: GridArray) -> dict[str, Any]:
    return {"format": param.format.name, "fraction_bits": param.fraction_bits, "dtype": str(param.dtype)}


def _to_state_dict(param: GridArray) -> dict[str, Any]:
    return {"index": param.index, "exponent": param.exponent, **_described(param)}


def _from_state_dict(target: GridArray, state: dict[str, Any]) -> GridArray:
    if not isinstance(state, dict) or "exponent" not in state:
        raise ValueError(
            "what is stored is no GridArray: restore it into an array; parameters then become one by to_grid."
        )
    for field, wanted in _described(target).items():
        if state[field] != wanted:
            raise ValueError(
                f"the stored {field} is {state[field]!r} but that of the target {wanted!r}: make it match."
            )
    for field in ("index", "exponent"):
        stored, wanted = state[field], getattr(target, field)
        if (stored.shape, stored.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"the stored {field} is {stored.dtype}{stored.shape} but that of the target "
                f"{wanted.dtype}{wanted.shape}: make it match."
            )
    return dataclasses.replace(target, index=state["index"], exponent=state["exponent"])


serialization.register_serialization_state(GridArray, _to_state_dict, _from_state_dict)
