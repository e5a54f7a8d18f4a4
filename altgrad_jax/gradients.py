"""Gradients of functions of stored parameters, in floating point."""

import contextlib
import dataclasses
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from altgrad_jax._floats import zeros_like
from altgrad_jax.formats import FloatFormat
from altgrad_jax.grid_array import GridArray, is_grid_array, map_stored


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "exponent", "slot"],
    meta_fields=["format", "fraction_bits", "dtype", "levels"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Differentiable(GridArray):
    """A GridArray whose numbers have the gradient of `slot`: zeros in the gradient's dtype that are never added."""

    slot: Any = None  # [...], of the dtype of the gradient.
    # The depth and the dtype of each call of value_and_grad that differentiates it, the innermost last.
    levels: tuple[tuple[int, Any], ...] = ()

    def value(self, dtype: DTypeLike | None = None, *, full: bool = False) -> Array:
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        decoding = _Decoding(self.format, self.fraction_bits, dtype, full, self.slot.dtype)
        return _numbers(decoding, self.index, self.exponent, self.slot)

    def fp8(self) -> tuple[Array, Array]:
        raise TypeError(
            "no gradient goes through the codes of fp8(): use value() where a function is differentiated, or write the "
            "product as a jax.custom_vjp that takes value() and, as an argument that is not differentiated, the array."
        )

    def _taken(self, key: Any) -> GridArray:
        return _differentiable(super()._taken(key), self.slot[key], self.levels)

    def __repr__(self) -> str:
        return f"Differentiable{super().__repr__()}"


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """The static part of a GridArray and its gradient."""

    format: FloatFormat
    fraction_bits: int
    dtype: jnp.dtype
    full: bool
    gradient: jnp.dtype


# Not a custom_jvp: jax 0.10 loses its rule in the partial evaluation of a scan, and gradient penalties get gradient 0.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _numbers(decoding: _Decoding, index: Array, exponent: Array, slot: Array) -> Array:
    del slot
    return GridArray(index, exponent, decoding.format, decoding.fraction_bits).value(decoding.dtype, full=decoding.full)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a gradient belongs: on explicit axes indices may be gathered before they are decoded."""

    sharding: Any


def _forward(decoding, index, exponent, slot):
    return _numbers(decoding, index, exponent, slot), _Place(jax.typeof(slot).sharding)


def _backward(decoding, place, gradient):
    if jax.sharding.AxisType.Explicit in place.sharding.mesh.axis_types:
        gradient = jax.sharding.reshard(gradient, place.sharding)
    return None, None, gradient.astype(decoding.gradient)


_numbers.defvjp(_forward, _backward)


# A value_and_grad for each type of model that changes while its function runs: `flax_support` enters one.
STATEFUL: dict[type, Callable[..., Callable]] = {}


def value_and_grad(
    fun: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *, dtype: DTypeLike | None = None
) -> Callable:
    """`jax.value_and_grad` for arguments that hold GridArrays, each with the gradient of its numbers.

    The function gets GridArrays and decodes them where it uses them: by `x @ kernel`, a Flax layer, `value(dtype)`, or
    `from_grid(layer)` inside of a `lax.scan` over layers. So no decoded weight lives longer than its use. Functions
    that map over leaves see integers, without an error: take a penalty on all weights from `from_grid(params)`. Import
    `altgrad_jax.flax_support` for models of Flax nnx; their other variables are updated as by `nnx.value_and_grad`.

    Args:
        fun, argnums, has_aux: As in `jax.value_and_grad`.
        dtype: Dtype of the gradients of GridArrays; None for the dtype of each. If an array is used twice, its
            gradients are summed in it.

    Returns:
        A function of the same arguments that gives the value and the gradients, in the structure of `from_grid` of the
        arguments. Rounding has a derivative of 1. A TypeError if dtype is not floating, or if the function calls
        `fp8()`, through which no gradient goes.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> params = ag.to_grid({"kernel": jnp.array([[0.5, -1.0]]), "bias": jnp.zeros(2)})
        >>> loss = lambda params, x: jnp.sum(x @ params["kernel"] + params["bias"])
        >>> ag.value_and_grad(loss, dtype=jnp.bfloat16)(params, jnp.ones((3, 1)))
        (Array(-1.5, dtype=float32),
         {'bias': Array([3., 3.], dtype=float32), 'kernel': Array([[3, 3]], dtype=bfloat16)})
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, because it is that of gradients, got {dtype}.")

    @functools.wraps(fun)
    def value_and_gradients(*args, **kwargs):
        _check_support((args, kwargs))
        for kind, transformed in STATEFUL.items():
            if any(isinstance(node, kind) for node in jax.tree.leaves((args, kwargs), is_leaf=_is_a(kind))):
                return transformed(fun, argnums, has_aux, dtype)(*args, **kwargs)

        def of_slots(*slots):
            with deeper() as depth:
                changed = dict(zip(chosen, slots, strict=True))
                given = [with_slots(arg, changed[i], depth) if i in changed else arg for i, arg in enumerate(args)]
                return without_slots(fun(*given, **kwargs), depth)

        one, chosen = places(argnums, args)
        slots = [slots_of(args[i], dtype) for i in chosen]
        return jax.value_and_grad(of_slots, 0 if one else range(len(slots)), has_aux)(*slots)

    return value_and_gradients


class _Depth(threading.local):
    """How many calls of value_and_grad are computing their functions."""

    now = 0


_depth = _Depth()


@contextlib.contextmanager
def deeper() -> Iterator[int]:
    """Counts a call while its function is computed, and gives its depth."""
    _depth.now += 1
    try:
        yield _depth.now
    finally:
        _depth.now -= 1


def places(argnums: int | Sequence[int], args: Sequence[Any]) -> tuple[bool, list[int]]:
    """Whether argnums is a single number, and the chosen places, counted from 0."""
    one = not isinstance(argnums, Sequence)
    chosen = [operator.index(i) for i in ([argnums] if one else argnums)]
    if not all(-len(args) <= i < len(args) for i in chosen):
        raise ValueError(f"argnums must be places of positional arguments, got {argnums} for {len(args)} of them.")
    chosen = [i % len(args) for i in chosen]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"argnums must name each argument once, got {argnums}.")
    return one, chosen


def slots_of(tree: Any, dtype: DTypeLike | None) -> Any:
    """The structure of `from_grid(tree)`, with zeros of the dtype of the gradients for GridArrays."""

    def slot(param):
        if not is_grid_array(param):
            return param
        if isinstance(param, _Differentiable):  # An outer value_and_grad differentiates it too.
            return param.slot.astype(dtype or param.slot.dtype)
        return zeros_like(param.index, dtype or param.dtype)

    return map_stored(slot, tree)


def with_slots(tree: Any, slots: Any, depth: int) -> Any:
    """The tree with GridArrays whose numbers have the gradients of the slots, and with the slots for other leaves."""

    def leaf(param, slot):
        if not is_grid_array(param):
            return slot
        outer = param.levels if isinstance(param, _Differentiable) else ()
        return _differentiable(param, slot, (*outer, (depth, slot.dtype)))

    return map_stored(leaf, tree, slots)


def without_slots(tree: Any, depth: int) -> Any:
    """The tree with GridArrays as they were before `with_slots` of this depth: those of outer calls keep their own."""

    def leaf(param):
        if not isinstance(param, _Differentiable) or param.levels[-1][0] != depth:
            return param
        *outer, _ = param.levels
        if outer:
            return _differentiable(param, param.slot.astype(outer[-1][1]), tuple(outer))
        return GridArray(param.index, param.exponent, param.format, param.fraction_bits, param.dtype)

    return map_stored(leaf, tree)


def _differentiable(param: GridArray, slot: Any, levels: tuple) -> _Differentiable:
    return _Differentiable(param.index, param.exponent, param.format, param.fraction_bits, param.dtype, slot, levels)


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, kind)


def _check_support(arguments: Any) -> None:
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or STATEFUL:
        return
    if any(isinstance(node, nnx.Pytree) for node in jax.tree.leaves(arguments, is_leaf=_is_a(nnx.Pytree))):
        raise ValueError(
            "value_and_grad of a function of a Flax nnx model needs `import altgrad_jax.flax_support`, without which "
            "the state of its other variables, such as BatchNorm's, would be lost."
        )
