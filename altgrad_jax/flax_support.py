"""GridArrays in Flax: import this module to store and restore them, and for models of Flax nnx.

`flax.serialization` restores a GridArray into one of the same format, fraction bits, shape and dtype; another target,
and numbers that the format does not have, are refused. `altgrad_jax.value_and_grad` of a function of `nnx` models
differentiates with respect to their `nnx.Param`s, stored or not, and gives a State, as `nnx.value_and_grad` does. What
the function changes in other variables stays changed; Params are put back. Models must be positional arguments.

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

from altgrad_jax.formats import label
from altgrad_jax.gradients import STATEFUL, deeper, places, slots_of, with_slots, without_slots
from altgrad_jax.grid_array import STARTS, VERSION, GridArray, check_range


def _described(param: GridArray) -> dict[str, Any]:
    fields = {"version": VERSION, "format": label(param.format), "fraction_bits": param.fraction_bits}
    return fields | {"dtype": str(param.dtype)}


def _to_state_dict(param: GridArray) -> dict[str, Any]:
    return {"index": param.index, "exponent": param.exponent, **_described(param)}


def _from_state_dict(target: GridArray, state: dict[str, Any]) -> GridArray:
    if not isinstance(state, dict) or "exponent" not in state:
        raise ValueError("the stored object is not a GridArray: restore it into an array and store that with to_grid.")
    for field, wanted in _described(target).items():
        if state.get(field) != wanted:
            raise ValueError(
                f"the stored {field} is {state.get(field)!r} but that of the target {wanted!r}: make it match."
            )
    for field in ("index", "exponent"):
        stored, wanted = state[field], getattr(target, field)
        if (stored.shape, stored.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"the stored {field} is {stored.dtype}{stored.shape} but that of the target "
                f"{wanted.dtype}{wanted.shape}: make it match."
            )
    restored = dataclasses.replace(target, index=state["index"], exponent=state["exponent"])
    check_range(restored, "the stored GridArray")
    return restored


def _value_and_grad(fun: Callable, argnums: int | Sequence[int], has_aux: bool, dtype: Any) -> Callable:
    """`nnx.value_and_grad` with respect to slots, which are in the Params while the function is computed."""

    def transformed(*args, **kwargs):
        one, chosen = places(argnums, args)
        _check_models(args, kwargs, chosen)

        def of_slots(slots, *args):
            with deeper() as depth:
                args, models = list(args), {}
                for i, structure, leaves in zip(chosen, structures, slots, strict=True):
                    params, changed = _params(args[i]), structure.unflatten(leaves)
                    if isinstance(args[i], nnx.Pytree):
                        models[i] = params
                        nnx.update(args[i], with_slots(params, changed, depth))
                    else:
                        args[i] = with_slots(params, changed, depth)
                value = without_slots(fun(*args, **kwargs), depth)
                for i, params in models.items():
                    others = nnx.state(args[i], nnx.Not(nnx.Param))
                    nnx.update(args[i], params, without_slots(others, depth))
                return value

        slots, structures = zip(*(jax.tree.flatten(slots_of(_params(args[i]), dtype)) for i in chosen), strict=True)
        value, gradients = nnx.value_and_grad(of_slots, has_aux=has_aux)(slots, *args)
        gradients = tuple(structure.unflatten(leaves) for structure, leaves in zip(structures, gradients, strict=True))
        return value, gradients[0] if one else gradients

    return transformed


def _params(arg: Any) -> Any:
    """A copy of the Params of a model; another argument as it is."""
    return jax.tree.map(lambda x: x, nnx.state(arg, nnx.Param)) if isinstance(arg, nnx.Pytree) else arg


def _check_models(args: Sequence[Any], kwargs: dict[str, Any], chosen: Sequence[int]) -> None:
    """Raises unless models are arguments themselves and those to be differentiated share no Param."""
    is_model = lambda node: isinstance(node, nnx.Pytree)  # noqa: E731
    within = [arg for arg in args if not is_model(arg)]
    if any(map(is_model, jax.tree.leaves((within, kwargs), is_leaf=is_model))):
        raise ValueError(
            "value_and_grad takes models of Flax nnx as positional arguments, got one inside of a container or by "
            "keyword: make one model of several, or give each as an argument."
        )
    models = [args[i] for i in chosen if is_model(args[i])]
    params = [{id(node) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)} for model in models]
    if sum(map(len, params)) > len(set().union(*params)):
        raise ValueError("value_and_grad got models that share Params: differentiate with respect to one of them.")


def _as_after_an_update(state: Any) -> Any:
    """The state with the mapping that `nnx.Optimizer` makes of each GridArray within a variable."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731

    def leaf(node):
        stored = is_variable(node) and isinstance(node.get_value(), GridArray)
        return node.replace(nnx.state(node.get_value())) if stored else node

    return jax.tree.map(leaf, state, is_leaf=is_variable)


STATEFUL[nnx.Pytree] = _value_and_grad
STARTS.append(_as_after_an_update)
serialization.register_serialization_state(GridArray, _to_state_dict, _from_state_dict)
