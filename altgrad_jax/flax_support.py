"""What Flax needs to know of a GridArray: import this module to store and restore them, and for models of Flax nnx.

`flax.serialization` restores a GridArray into one of the same format, fraction bits, shape and dtype; another target is
refused. `altgrad_jax.value_and_grad` of a function of `nnx` models differentiates with respect to their `nnx.Param`s,
stored or not, and gives a State, as `nnx.value_and_grad` does; what the function changes in other variables stays
changed.

Example:
    >>> import altgrad_jax as ag, altgrad_jax.flax_support, flax, jax.numpy as jnp
    >>> params = ag.to_grid({"kernel": jnp.array([[0.5, -1.0]])})
    >>> blob = flax.serialization.to_bytes(params)
    >>> flax.serialization.from_bytes(params, blob)["kernel"]
    GridArray(float8_e3m4, shape=(1, 2), int8 + int8[1,1])
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx, serialization

from altgrad_jax.gradients import STATEFUL, places, slots_of, with_slots
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


def _value_and_grad(fun: Callable, argnums: int | Sequence[int], has_aux: bool, dtype: Any) -> Callable:
    """`nnx.value_and_grad` with respect to slots, which are in the Params while the function is computed."""

    def transformed(*args, **kwargs):
        one, chosen = places(argnums, args)

        def of_slots(slots, *args):
            args, models = list(args), {}
            for i, structure, leaves in zip(chosen, structures, slots, strict=True):
                params, changed = _params(args[i]), structure.unflatten(leaves)
                if isinstance(args[i], nnx.Pytree):
                    models[i] = params
                    nnx.update(args[i], with_slots(params, changed))
                else:
                    args[i] = with_slots(params, changed)
            value = fun(*args, **kwargs)
            for i, params in models.items():
                nnx.update(args[i], params)
            return value

        slots, structures = zip(*(jax.tree.flatten(slots_of(_params(args[i]), dtype)) for i in chosen), strict=True)
        value, gradients = nnx.value_and_grad(of_slots, has_aux=has_aux)(slots, *args)
        gradients = tuple(structure.unflatten(leaves) for structure, leaves in zip(structures, gradients, strict=True))
        return value, gradients[0] if one else gradients

    return transformed


def _params(arg: Any) -> Any:
    """A copy of the Params of a model; another argument as it is."""
    return jax.tree.map(lambda x: x, nnx.state(arg, nnx.Param)) if isinstance(arg, nnx.Pytree) else arg


STATEFUL[nnx.Pytree] = _value_and_grad
serialization.register_serialization_state(GridArray, _to_state_dict, _from_state_dict)
