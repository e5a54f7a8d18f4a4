"""Arrays stored as integers: the positions of their elements on a grid that is scaled by powers of two."""

import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.tree_util import GetAttrKey
from jax.typing import DTypeLike

from altgrad_jax._checks import check_float_leaves, check_number, check_same_tree, fits
from altgrad_jax._floats import as_real, floor_log2, power_of_two
from altgrad_jax.codec import decode, encode, exponent_range, index_dtype, magnitude, nan_index, narrowed
from altgrad_jax.formats import FloatFormat, FormatLike, as_format, label
from altgrad_jax.scales import fitted, row_maximum, row_shape, weight_rule
from altgrad_jax.weights import reasons_against

_HARDWARE_FORMATS = (
    "float8_e4m3fn float8_e5m2 float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2fnuz"
)
_FLOAT32 = np.dtype("float32")
# How many binades the scale of a row may lie below that of the largest row of its leaf.
_BELOW = 10


# The version of what the integers mean: of the codec, the index of NaN, the exponents.
VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GridArray:
    """An array of numbers of a scaled format, stored as integers: their positions on the grid and its exponents.

    The element with index `i` is `2**exponent * value(i / 2**fraction_bits, format)`. A pytree of two integer arrays:
    `optax.apply_updates` adds whole steps, and the change of the exponents, to it. Made by `to_grid`. Arrays of other
    dtypes or shapes than these fields can have, such as indices that were scaled or averaged, raise where they are made
    into a GridArray. Key paths name version, format and fraction bits, as in `kernel.index_v1_float8_e3m4+8`, so that
    no checkpoint is restored into another format.

    For reading, it is an array of `dtype`: `jnp` functions, `np.asarray`, `@`, comparisons, indexing, `T` and Flax
    layers take it as it is and decode what they read; functions of `lax`, some of `jax.nn`, such as `softmax`, and
    ufuncs of NumPy need `value()`. `+ - * /` raise a TypeError, because an update is a GridArray too, of whole steps;
    but JAX decodes the right operand of `array + update` without an error. Functions that map over leaves get the
    integers: norms, averages (`optax.incremental_update`) and casts need `from_grid(params)`.

    Attributes:
        index: Signed positions in steps of `2**-fraction_bits`, shape `[...]`: the smallest of int8, int16 and int32
            (unsigned for a format without a sign). The most negative one (unsigned: the largest) is NaN.
        exponent: log2 of the scale, int8, in each dimension as long as the index or 1; from `to_grid` one per row. The
            largest number and the smallest step that it gives are normal float32 numbers.
        format: The format of the grid.
        fraction_bits: Bits of every position after the point.
        dtype: Dtype in which the numbers are read, and of their gradients.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> ag.to_grid(jnp.ones((2, 8)), "float8_e4m3fn")
        GridArray(float8_e4m3fn, shape=(2, 8), int8 + int8[2,1])
    """

    index: Array
    exponent: Array
    format: FloatFormat
    fraction_bits: int = 0
    dtype: np.dtype = _FLOAT32

    __array_ufunc__ = None  # NumPy leaves operators to the other operand.

    def __post_init__(self):
        _check_fields(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.index.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.index.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.index.size

    @property
    def nbytes(self) -> int:
        """Bytes stored, exponents included."""
        return sum(x.size * x.dtype.itemsize for x in (self.index, self.exponent))

    @property
    def grid(self) -> FloatFormat:
        """The grid whose indices are stored: that of the format, with the fraction bits in its mantissa."""
        return self.format.refined(self.fraction_bits)

    @property
    def scale(self) -> Array:
        """2**exponent, float32, of the shape of the exponents."""
        return power_of_two(self.exponent)

    def value(self, dtype: DTypeLike | None = None, *, full: bool = False) -> Array:
        """The numbers, as `from_grid` gives them; in the array's own dtype by default."""
        if isinstance(self.index, jax.ShapeDtypeStruct):
            described: Any = jax.ShapeDtypeStruct(self.shape, self.dtype if dtype is None else dtype)
            return described
        dtype = np.dtype(self.dtype if dtype is None else dtype)
        return _numbers(self.index, self.exponent, self.format, self.fraction_bits, dtype, full)

    def astype(self, dtype: DTypeLike) -> Array:
        """`value(dtype)`."""
        return self.value(dtype)

    def __jax_array__(self) -> Array:
        return self.value()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the numbers of a GridArray are decoded into a new array: leave out copy=False.")
        return np.array(self.value(), dtype)

    def __len__(self) -> int:
        return len(self.index)

    def __bool__(self) -> bool:
        return bool(self.value())

    def __iter__(self) -> Iterator[Array]:
        return iter(self.value())

    def __getitem__(self, key: Any) -> Array:
        return self._taken(key).value()

    def _taken(self, key: Any) -> "GridArray":
        """The part that a key of NumPy indexing takes, stored."""
        mask = getattr(key, "dtype", None) == np.dtype(bool) and np.ndim(key) > 1
        rows = self.shape if mask or isinstance(key, tuple) else self.shape[:1] + self.exponent.shape[1:]
        return dataclasses.replace(self, index=self.index[key], exponent=jnp.broadcast_to(self.exponent, rows)[key])

    @property
    def T(self) -> Array:  # noqa: N802
        """The numbers, transposed."""
        return self.value().T

    def reshape(self, *shape: Any) -> Array:
        """The numbers in another shape."""
        return self.value().reshape(*shape)

    def transpose(self, *axes: Any) -> Array:
        """The numbers, their axes permuted."""
        return self.value().transpose(*axes)

    def __matmul__(self, other: Any) -> Array:
        return self.value() @ other

    def __rmatmul__(self, other: Any) -> Array:
        return other @ self.value()

    def fp8(self) -> tuple[Array, Array]:
        """The numbers in their hardware dtype, without a scale, and the scale, float32, for a quantized matmul.

        Fraction bits are rounded to nearest-even first. The product of `x` and a kernel with a scale per row is
        `(x * scale[:, 0]) @ codes`. A TypeError if the format is not an 8-bit hardware dtype.
        """
        if self.format.dtype is None or self.format.name not in _HARDWARE_FORMATS.split():
            raise TypeError(f"fp8() needs one of the formats {_HARDWARE_FORMATS}, got {self.format.name}.")
        index = _whole_index(self.index, self.fraction_bits)
        code = jnp.abs(index) | jnp.where(index < 0, 0x80, 0)
        numbers = lax.bitcast_convert_type(code.astype(jnp.uint8), self.format.dtype)
        return jnp.where(_is_nan(self.index, self.grid), jnp.array(jnp.nan, self.format.dtype), numbers), self.scale

    def __repr__(self) -> str:
        bits = f" + {self.fraction_bits} bits" if self.fraction_bits else ""
        name = f"GridArray({self.format.name}{bits}"
        try:
            exponents = f"{self.exponent.dtype}[{','.join(map(str, self.exponent.shape))}]"
            return f"{name}, shape={self.shape}, {self.index.dtype} + {exponents})"
        except AttributeError:  # Leaves that are not arrays, as in a tree of shardings.
            return f"{name}, index={self.index!r}, exponent={self.exponent!r})"


def _check_fields(param: GridArray) -> None:
    """Raises if the fields of a GridArray contradict each other, also where a transformation makes one.

    JAX puts more than arrays into trees, and bools and float0.
    """
    if not isinstance(param.format, FloatFormat):
        raise TypeError(f"format must be a FloatFormat, got {param.format!r}: convert it with as_format.")
    wanted = _dtypes(param.format, param.fraction_bits)
    if tuple(getattr(x, "dtype", None) for x in (param.index, param.exponent)) != wanted:
        for name, array, dtype in zip(("index", "exponent"), (param.index, param.exponent), wanted, strict=True):
            if not isinstance(array, jax.Array | np.ndarray) or array.dtype in (dtype, bool, jax.dtypes.float0):
                continue
            raise TypeError(
                f"the {name} of a GridArray of {param.grid.name} must be of dtype {dtype}, got {array.dtype}: "
                "something scaled, averaged, summed or cast its integers. What changes updates, such as optax.scale, "
                "optax.lookahead or optax.contrib.schedule_free, belongs inside of on_grid; norms, averages and casts "
                "of parameters need from_grid(params)."
            )
        return
    given, shape = (getattr(x, "shape", None) for x in (param.exponent, param.index))
    if given is None or shape is None:  # A description of an array.
        return
    if len(given) != len(shape) or any(have not in (1, full) for have, full in zip(given, shape, strict=True)):
        raise ValueError(
            "the exponent of a GridArray must in each dimension be as long as its index or 1, got shapes "
            f"{given} and {shape}."
        )


@functools.cache
def _dtypes(format: FloatFormat, fraction_bits: int) -> tuple[np.dtype, np.dtype]:
    """Those of indices and exponents."""
    return index_dtype(format.refined(fraction_bits)), np.dtype("int8")


@functools.cache
def _keys(format: FloatFormat, fraction_bits: int) -> tuple[GetAttrKey, GetAttrKey]:
    """Names of the two arrays of a GridArray in key paths, which checkpoints take for names."""
    return GetAttrKey(f"index_v{VERSION}_{label(format)}+{fraction_bits}"), GetAttrKey("exponent")


def _flatten(param: GridArray) -> tuple[tuple, tuple]:
    return (param.index, param.exponent), (param.format, param.fraction_bits, param.dtype)


def _flatten_with_keys(param: GridArray) -> tuple[tuple, tuple]:
    children, fields = _flatten(param)
    return tuple(zip(_keys(*fields[:2]), children, strict=True)), fields


jax.tree_util.register_pytree_with_keys(
    GridArray, _flatten_with_keys, lambda fields, children: GridArray(*children, *fields), _flatten
)


def _refused(name: str) -> Callable:
    def method(self: GridArray, *_: Any) -> Any:
        raise TypeError(
            f"a GridArray has no {name}, because an update is a GridArray of whole steps too: take value() of a "
            "parameter, and put transformations that scale updates, such as optax.adamw, inside of on_grid: "
            "on_grid(optax.adamw(1e-3)), or grid_adamw(1e-3)."
        )

    return method


def _compared(operation: Callable) -> Callable:
    def method(self: GridArray, other: Any) -> Any:
        if not isinstance(other, GridArray | jax.Array | np.ndarray | np.generic | int | float):
            return NotImplemented
        return operation(self.value(), other)

    return method


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(GridArray, f"__{_name}__", _compared(getattr(operator, _name)))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _side in ("", "r", "i"):
        setattr(GridArray, f"__{_side}{_name}__", _refused(f"__{_side}{_name}__"))
for _name in ("__neg__", "__pos__", "__abs__"):
    setattr(GridArray, _name, _refused(_name))


def is_grid_array(leaf: Any) -> bool:
    """Whether a node of a tree is a GridArray."""
    return isinstance(leaf, GridArray)


def flatten_stored(tree: Any) -> tuple[list[tuple], list[Any], Any]:
    """Paths, leaves and structure of a tree whose GridArrays are leaves."""
    with_path, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_grid_array)
    return [path for path, _ in with_path], [leaf for _, leaf in with_path], structure


def map_stored(f: Callable, tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` of a tree whose GridArrays are leaves, over others that have its structure at least."""
    _, leaves, structure = flatten_stored(tree)
    return structure.unflatten(map(f, leaves, *map(structure.flatten_up_to, rest)))


def one_each(choices: Any) -> Any:
    """Masks with one choice per array, also if they were mapped over stored parameters, where each array has two."""
    return map_stored(lambda choice: choice.index if is_grid_array(choice) else choice, choices)


def to_grid(
    params: Any,
    format: FormatLike = "float8_e3m4",
    *,
    fraction_bits: int = 0,
    where: Callable[[tuple, Array], bool] | Any | None = None,
    scale: Any | None = None,
) -> Any:
    """Stores parameters on a grid: every chosen leaf becomes a GridArray of its nearest numbers.

    Args:
        params: A tree of arrays, or of their shapes (`jax.ShapeDtypeStruct`). GridArrays in it are encoded again, from
            all of their bits.
        format: Anything that `as_format` accepts, up to 16 bits. The default has finer steps than `float8_e4m3fn` and
            `float8_e5m2`; only these two, or their fnuz twins, are multiplied by the tensor cores of GPUs.
        fraction_bits: Bits of each position after the point: 8-bit formats take 1 byte per element with 0, 2 with up
            to 8.
        where: Which leaves to store: a function of key path and leaf, or a tree of booleans like params. Default:
            GridArrays, and floating leaves with two or more dimensions, except those whose name (the last component of
            their path) is beta, bias, bias_n, gain, gamma, mean, offset, scale, shift, var, or b beside a leaf of more
            dimensions, those in a module whose name ends with norm or ln, and those that have a bias of their own shape
            beside them.
            `diagnostics.storage` shows what became of each.
        scale: Powers of two by which the format is multiplied: a number for all leaves, or a tree like params of
            numbers and arrays that broadcast against the leaves. Default: for every row (along the last axis; the last
            two if that has fewer than 8 elements) the smallest scale for which its largest number is below half of
            the largest number (seven eighths in a uniform format), but at least 2**-10 of the scale of the largest row.
            Rows of zeros get the scale of the largest row, arrays of zeros that of an array of 1/4. A GridArray of the
            format keeps its own.

    Returns:
        The tree with GridArrays, which keep the dtypes of their leaves, or with their shapes. Warns of rows that
        became 0.

    Raises:
        ValueError: If an index would need more than 2**24 steps, a scale is not a power of two that is legal for the
            format or does not broadcast, an element is not finite or would saturate, or nothing was chosen.
        TypeError: If a chosen leaf is not of a floating dtype, or `fraction_bits` is not a number.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[0.5, -1.06]]), "bias": jnp.zeros(2)}
        >>> stored = ag.to_grid(params, "float8_e4m3fn")
        >>> stored["kernel"], ag.from_grid(stored)["kernel"]
        (GridArray(float8_e4m3fn, shape=(1, 2), int8 + int8[1,1]), Array([[ 0.5, -1. ]], dtype=float32))
    """
    format = as_format(format)
    if format.bits > 16:
        raise ValueError(f"to_grid stores formats of up to 16 bits, got {format.name}.")
    fraction_bits = _fraction_bits(format, fraction_bits)
    grid = format.refined(fraction_bits)

    def leaf(path, x, choice, given):
        if not isinstance(choice, bool | np.bool):
            raise TypeError(f"where must be a bool at params{jax.tree_util.keystr(path)}, got {choice!r}.")
        if not choice:
            return x
        dtype = np.dtype(x.dtype if hasattr(x, "dtype") else jnp.result_type(x))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"to_grid stores leaves of a floating dtype, got {dtype} at params{jax.tree_util.keystr(path)}: "
                "leave it out with `where`."
            )
        if any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(x)):
            return jax.eval_shape(lambda x: leaf(path, x, choice, given), x)
        if is_grid_array(x):
            given = x.exponent if given is None and x.format == format else given
        shape = None if given is None else _exponent_shape(path, given, np.shape(x))
        index, exponent, fits, lost = _encoded(x, given, format, fraction_bits, shape)
        _check_stored(path, fits, lost, grid, chosen=given is None)
        return GridArray(index, exponent, format, fraction_bits, dtype)

    paths, leaves, structure = flatten_stored(params)
    choices, exponents = map(structure.flatten_up_to, (_chosen(params, where), _exponents(params, scale, grid)))
    return structure.unflatten(map(leaf, paths, leaves, choices, exponents))


def from_grid(params: Any, dtype: DTypeLike = jnp.float32, *, full: bool = False) -> Any:
    """The numbers that a tree of parameters stands for: gradients are taken with respect to them.

    Args:
        params: A tree of arrays and GridArrays, or of their shapes.
        dtype: Dtype of the arrays that come from GridArrays; bfloat16 and wider hold every 8-bit format exactly, except
            for scales near the end of its range. Other leaves are untouched.
        full: False gives the numbers of the format, True those with the fraction bits.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp
        >>> stored = ag.to_grid(jnp.array([[1.0, 1.05]]), "float8_e4m3fn", fraction_bits=2)
        >>> ag.from_grid(stored), ag.from_grid(stored, full=True)
        (Array([[1., 1.]], dtype=float32), Array([[1.     , 1.0625]], dtype=float32))
    """
    return map_stored(lambda leaf: leaf.value(dtype, full=full) if is_grid_array(leaf) else leaf, params)


def shardings(params: Any, sharding: Any) -> Any:
    """Shardings of stored parameters, from those of the numbers that they stand for.

    The exponents are sharded as the indices are, except in dimensions in which they have one element.

    Args:
        params: A tree of arrays and GridArrays, or of their shapes.
        sharding: A `jax.sharding.NamedSharding` or a `PartitionSpec`, or a tree of them like `from_grid(params)`, or a
            prefix of one. Any other sharding goes to indices and exponents as it is.

    Returns:
        A tree like params, with GridArrays of shardings, for `jax.device_put`, `in_shardings` of `jax.jit` and, if
        they are PartitionSpecs, `in_specs` of `jax.shard_map`.

    Example:
        >>> import altgrad_jax as ag, jax, jax.numpy as jnp
        >>> stored = ag.to_grid({"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)})
        >>> specs = ag.shardings(stored, {"kernel": jax.P(None, "x"), "bias": jax.P("x")})
        >>> specs["kernel"].index, specs["kernel"].exponent
        (P(None, 'x'), P(None, None))
    """

    def leaf(sharding, param):
        if not is_grid_array(param):
            return sharding
        spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
        if isinstance(spec, PartitionSpec):
            if len(spec) > param.ndim:
                raise ValueError(f"a spec must have at most {param.ndim} axes for shape {param.shape}, got {spec}.")
            axes = zip(spec, param.exponent.shape, strict=False)  # A spec may be shorter.
            spec = PartitionSpec(*(None if length == 1 else axis for axis, length in axes))
        of_exponent = sharding.update(spec=spec) if isinstance(sharding, NamedSharding) else spec
        return dataclasses.replace(param, index=sharding, exponent=of_exponent)

    def is_sharding(node):
        return isinstance(node, Sharding | PartitionSpec)

    return jax.tree.map(
        lambda sharding, part: map_stored(functools.partial(leaf, sharding), part),
        sharding,
        params,
        is_leaf=is_sharding,
    )


# `flax_support` enters one, which gives a new state the structure that it has after an update by Flax nnx.
STARTS: list[Callable[[Any], Any]] = []


def started(params: Any, state: Any) -> Any:
    """A new state, with all leaves on the mesh of the parameters, if those are on one: counters start on one device.

    So it is a target into which a checkpoint of any mesh can be restored.
    """
    for change in STARTS:
        state = change(state)

    def is_concrete(leaf):
        return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)

    def is_on_mesh(leaf):
        return is_concrete(leaf) and isinstance(leaf.sharding, NamedSharding)

    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(params) if is_on_mesh(leaf)}
    if len(meshes) != 1:
        return state
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())
    moves = lambda leaf: is_concrete(leaf) and not is_on_mesh(leaf)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.device_put(leaf, everywhere) if moves(leaf) else leaf, state)


def signed_steps(updates: Any, params: Any) -> Any:
    """The whole steps by which an update of `on_grid`, which holds them modulo its range, moves the parameters.

    For GridArrays int32, in units of `2**-fraction_bits` on the grid after the update; other leaves as they are.

    Example:
        >>> import altgrad_jax as ag, jax.numpy as jnp, optax
        >>> params = ag.to_grid(jnp.array([[0.5, -1.0]]))
        >>> tx = ag.on_grid(optax.sgd(1.0), rounding="nearest")
        >>> updates, _ = tx.update(jnp.array([[-0.125, 1.0]]), tx.init(params), params)
        >>> ag.signed_steps(updates, params)
        Array([[  4, -16]], dtype=int32)
    """

    def leaf(param, update):
        if not is_grid_array(param):
            return update
        before = encode(param.value(jnp.float32, full=True), param.exponent + update.exponent, param.grid)
        return (param.index + update.index).astype(jnp.int32) - before

    return map_stored(leaf, params, updates)


def rejoined(node: Any, *formats: FloatFormat | None) -> Any:
    """The GridArray of which `flax.nnx.Optimizer` made a mapping, in the one of the formats that its names say."""
    if not isinstance(node, Mapping):
        return node
    named = ((format, [key.name for key in _keys(format, 0)]) for format in formats if format)
    format, (index, exponent) = next((format, names) for format, names in named if set(names) == set(node))
    return GridArray(node[index], node[exponent], format)


def resplit(param: GridArray, like: Any) -> Any:
    """The GridArray, as a mapping if the node before the update was one: a state keeps its structure."""
    if not isinstance(like, Mapping):
        return param
    return jax.tree.unflatten(jax.tree.structure(like), [param.exponent, param.index])  # By names, in their order.


def is_split(node: Any) -> bool:
    """Whether a node of a tree is the mapping that `flax.nnx.Optimizer` makes of a GridArray."""
    return isinstance(node, Mapping) and len(node) == 2 and any(str(key).startswith("index_v") for key in node)


def checked_values(transformation: str, updates: Any, params: Any) -> Any:
    """Returns the numbers of the parameters; raises unless some are stored and the updates are gradients."""
    if params is None:
        raise ValueError(f"{transformation} needs the parameters: call update(updates, state, params).")
    leaves = jax.tree.leaves(params, is_leaf=lambda x: is_grid_array(x) or _is_masked(x))
    if not any(map(is_grid_array, leaves)) and not any(map(_is_masked, leaves)):  # A masked group may have none.
        raise ValueError(
            f"{transformation} was given no parameter that is stored on a grid: make some with to_grid(params)."
        )
    if any(map(is_grid_array, flatten_stored(updates)[1])):
        raise ValueError(
            f"{transformation} takes gradients with respect to from_grid(params), got GridArrays: take them with "
            "altgrad_jax.value_and_grad, and put optax.MultiSteps and optax.apply_if_finite inside of on_grid."
        )
    floats = from_grid(params, full=True)
    check_same_tree(transformation, "updates", updates, floats)
    check_float_leaves(transformation, "updates", updates)
    return floats


def checked_params(params: Any) -> Any:
    """Parameters to initialise a state from: zeros for shapes. Raises if a mask split GridArrays, or out of range."""
    for path, leaf in zip(*flatten_stored(params)[:2], strict=True):
        if not is_grid_array(leaf):
            continue
        name = f"the GridArray at params{jax.tree_util.keystr(path)}"
        if _is_masked(leaf.index):
            raise ValueError(
                f"got masks or labels for the parts of {name}: make the tree of masks or labels from "
                "from_grid(params), which has one leaf for it."
            )
        check_range(leaf, name)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, params)


def check_range(param: GridArray, name: str) -> None:
    """Raises if an exponent or an index is none of the format: those of an update, or of a file. Nothing under jit."""
    if not all(isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer) for x in jax.tree.leaves(param)):
        return
    low, high = exponent_range(param.grid)
    with jax.ensure_compile_time_eval():  # The array may be a constant of a function that is being traced.
        legal = bool(_legal(param))
    if not legal:
        raise ValueError(
            f"{name} has an exponent that is not from {low} to {high}, or an index that is neither from "
            f"{-param.grid.max_index if param.grid.signed else 0} to {param.grid.max_index} nor that of NaN: it is no "
            f"array of {param.grid.name}, but maybe an update, or of another format."
        )


@jax.jit
def _legal(param: GridArray) -> Array:
    low, high = exponent_range(param.grid)
    index = param.index.astype(jnp.int32)
    legal = (jnp.abs(index) <= param.grid.max_index) | _is_nan(index, param.grid)
    return jnp.all((low <= param.exponent) & (param.exponent <= high)) & jnp.all(legal)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _whole_index(index: Array, fraction_bits: int) -> Array:
    """Rounds positions to whole ones, nearest, ties to even; int32."""
    index = index.astype(jnp.int32)
    if fraction_bits == 0:
        return index
    return (index + (2 ** (fraction_bits - 1) - 1) + ((index >> fraction_bits) & 1)) >> fraction_bits


def _fraction_bits(format: FloatFormat, fraction_bits: int) -> int:
    check_number("fraction_bits", np.asarray(fraction_bits), "[0, 24]", integer=True)
    most = min(int(math.log2(2**24 / format.max_index)), 23 - format.mantissa_bits)
    if fraction_bits > most:
        raise ValueError(
            f"an index must not exceed 2**24, up to which float32 is exact: {format.name} has {format.max_index} "
            f"numbers and takes up to {most} fraction_bits, got {fraction_bits}."
        )
    return int(fraction_bits)


def _chosen(params: Any, where: Any) -> Any:
    """A bool for every leaf."""
    paths, leaves, structure = flatten_stored(params)
    if where is None:
        reasons = reasons_against(paths, leaves)
        where = structure.unflatten(
            reason is None or is_grid_array(leaf) for reason, leaf in zip(reasons, leaves, strict=True)
        )
    elif callable(where) and jax.tree_util.all_leaves([where]):  # A tree may be callable too: a module of Equinox.
        where = structure.unflatten(map(where, paths, leaves))
    where = one_each(where)
    if not any(jax.tree.leaves(where)):
        raise ValueError(
            "to_grid was given nothing to store: no leaf is chosen by `where`, whose default takes floating leaves "
            "with two or more dimensions, except biases and the scales of norms."
        )
    return where


def _exponents(params: Any, scale: Any, grid: FloatFormat) -> Any:
    """log2 of the scale of every leaf, None for the default."""
    if scale is None or jax.tree_util.treedef_is_leaf(jax.tree.structure(scale)):
        return map_stored(lambda _: None if scale is None else _log2(scale, grid), params)
    return jax.tree.map(lambda one: _log2(one, grid), scale)


def _log2(scale: Any, grid: FloatFormat) -> Any:
    """Exponents of powers of two, int8; raises if they are known and not legal."""
    if isinstance(scale, Tracer):
        return floor_log2(scale.astype(jnp.float32)).astype(jnp.int8)
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    low, high = exponent_range(grid)
    if not np.all((mantissa == 0.5) & (exponent - 1 >= low) & (exponent - 1 <= high)):
        raise ValueError(f"scale must be a power of two from 2**{low} to 2**{high}, got {scale}.")
    return np.asarray(exponent - 1, np.int8)


@functools.partial(jax.jit, static_argnames=("format", "fraction_bits", "shape"), inline=True)
def _encoded(x: Any, exponent: Array | None, format: FloatFormat, fraction_bits: int, shape: Any) -> tuple[Array, ...]:
    """Indices and exponents of a leaf, whether all of it is finite and in range, and which rows became 0."""
    grid = format.refined(fraction_bits)
    x = x.value(jnp.float32, full=True) if is_grid_array(x) else narrowed(as_real(x))
    if exponent is None:
        exponent = _row_exponent(x, format, grid)
    else:
        exponent = jnp.asarray(exponent)
        exponent = jnp.broadcast_to(exponent.reshape((1,) * (len(shape) - exponent.ndim) + exponent.shape), shape)
    index, scale = encode(x, exponent, grid), power_of_two(exponent)
    fits = jnp.all((x <= scale * grid.max) & (x >= scale * grid.min))  # False for NaN.
    lost = (row_maximum(magnitude(x), exponent.shape) >= 1 << 23) & (row_maximum(abs(index), exponent.shape) == 0)
    return index.astype(index_dtype(grid)), exponent, fits, lost


@functools.partial(jax.jit, static_argnames=("format", "fraction_bits", "dtype", "full"), inline=True)
def _numbers(
    index: Array, exponent: Array, format: FloatFormat, fraction_bits: int, dtype: np.dtype, full: bool
) -> Array:
    """The numbers of a GridArray."""
    grid = format.refined(fraction_bits)
    if not full and fraction_bits:
        index = jnp.where(_is_nan(index, grid), nan_index(format), _whole_index(index, fraction_bits))
        grid = format
    return decode(index, exponent, grid).astype(dtype)


def _is_nan(index: Array, grid: FloatFormat) -> Array:
    # In int32, like the decoding: on a TPU a comparison in int8 takes a kernel of its own.
    return index.astype(jnp.int32) == nan_index(grid)


def _row_exponent(x: Array, format: FloatFormat, grid: FloatFormat) -> Array:
    """Per row the least under which it is not full, within `_BELOW` of that of the largest row, which zeros take."""
    rows = row_maximum(magnitude(x), row_shape(x.shape))
    largest = jnp.max(jnp.where(rows < 255 << 23, rows, 0), initial=0)
    largest = jnp.where(largest == 0, np.float32(0.25).view(np.int32), largest)
    rows = jnp.where(rows == 0, largest, jnp.maximum(rows, largest - (_BELOW << 23)))
    rule = weight_rule(format)
    exponent = fitted(rows, rule, grid)
    # Rounding may make a row full, which would grow with its first update and round its numbers again.
    stored = decode(encode(lax.bitcast_convert_type(rows, jnp.float32), exponent, grid), exponent, grid)
    return jnp.maximum(exponent, fitted(magnitude(stored), rule, grid)).astype(jnp.int8)


def _exponent_shape(path: tuple, exponent: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of given exponents with the dimensions of their array, so that both can be stacked and sliced together."""
    given = np.shape(exponent)
    if not fits(given, shape):
        raise ValueError(f"scale must broadcast to {shape}, got shape {given} at params{jax.tree_util.keystr(path)}.")
    given = (1,) * (len(shape) - len(given)) + given
    return np.broadcast_shapes(given, row_shape(shape)) if given[-1:] in ((), (1,)) else given


def _check_stored(path: tuple, fits: Array, lost: Array, grid: FloatFormat, chosen: bool) -> None:
    """Raises if an element saturated and warns of rows that became 0 under default exponents; nothing under jit."""
    if isinstance(fits, Tracer):
        return
    name = f"params{jax.tree_util.keystr(path)}"
    if not fits:
        raise ValueError(
            f"{name} is not finite or exceeds {grid.max} times its scale: clip it first, or leave the scale to to_grid."
        )
    rows = np.asarray(lost)
    if chosen and rows.any():
        first = tuple(map(int, np.unravel_index(rows.argmax(), rows.shape)))
        warnings.warn(
            f"{rows.sum()} of {rows.size} rows of {name} became 0, the first at {first}: below the step of their "
            f"scale, which is at least 2**-{_BELOW} of that of the largest row. Give a `scale`, or leave the leaf out.",
            stacklevel=4,
        )
