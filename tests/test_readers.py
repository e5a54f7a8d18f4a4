"""A GridArray is an array to what reads it, and no number to arithmetic."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from quick import some

import altgrad_jax as ag

X = jax.random.normal(jax.random.key(1), (4, 16))
IDS = jnp.array([3, 3, 0])
KERNEL = ag.to_grid(jax.random.normal(jax.random.key(0), (16, 8)))
SMALL = ag.to_grid(jax.random.normal(jax.random.key(0), (16, 4)), fraction_bits=8)  # One exponent for all.
STACK = ag.to_grid(jax.random.normal(jax.random.key(0), (3, 16, 8)))


def nnx_linear(kernel, x):
    layer = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(kernel)
    return layer(x)


def nnx_embed(table, ids):
    layer = nnx.Embed(*table.shape, rngs=nnx.Rngs(0))
    layer.embedding.set_value(table)
    return layer(ids)


READERS = {
    "matmul": lambda q: X @ q,
    "matmul from the left": lambda q: q @ X.T[: q.shape[-1]],
    "of numpy": lambda q: np.asarray(X) @ q,
    "asarray": jnp.asarray,
    "array in bfloat16": lambda q: jnp.array(q, jnp.bfloat16),
    "np.asarray": np.asarray,
    "np.asarray in float64": lambda q: np.asarray(q, np.float64),
    "np.array": np.array,
    "astype": lambda q: q.astype(jnp.bfloat16),
    "einsum": lambda q: jnp.einsum("bi,io->bo", X, q),
    "take": lambda q: jnp.take(q, IDS, axis=0),
    "where": lambda q: jnp.where(True, q, 0.0),
    "concatenate": lambda q: jnp.concatenate([q, q]),
    "sum": jnp.sum,
    "T": lambda q: q.T,
    "reshape": lambda q: q.reshape((1, -1)) + q.reshape(-1),
    "transpose": lambda q: q.transpose() + q.transpose(*reversed(range(q.ndim))),
    "index": lambda q: q[2],
    "negative index": lambda q: q[-1],
    "indices": lambda q: q[IDS],
    "table of indices": lambda q: q[jnp.array([[1, 2], [3, 4]])],
    "slice": lambda q: q[1:3],
    "tuple": lambda q: q[1:3, 2],
    "column": lambda q: q[:, 1],
    "ellipsis": lambda q: q[..., 0],
    "all": lambda q: q[...],
    "new axis": lambda q: q[None],
    "mask": lambda q: q[np.arange(q.shape[0]) > 1],
    "mask of elements": lambda q: q[np.arange(q.size).reshape(q.shape) % 3 == 0],
    "equality": lambda q: q == 0,
    "inequality": lambda q: q != jnp.zeros(q.shape),
    "order": lambda q: (q < 0.5) | (q >= np.float32(1)),
    "order from the left": lambda q: np.float32(0.5) < q,
    "iteration": lambda q: jnp.stack(list(q)),
    "length": len,
    "linen Dense": lambda q: flax.linen.Dense(q.shape[1], use_bias=False).apply({"params": {"kernel": q}}, X),
    "linen Dense in bfloat16": lambda q: flax.linen.Dense(q.shape[1], use_bias=False, dtype=jnp.bfloat16).apply(
        {"params": {"kernel": q}}, X
    ),
    "linen Embed": lambda q: flax.linen.Embed(*q.shape).apply({"params": {"embedding": q}}, IDS),
    "nnx Linear": lambda q: nnx_linear(q, X),
    "nnx Embed": lambda q: nnx_embed(q, IDS),
}


class TestReaders:
    """They get the numbers, in the dtype of the array."""

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    @pytest.mark.parametrize("param", [KERNEL, SMALL], ids=["int8", "int16"])
    @pytest.mark.parametrize("name", some(READERS, lambda name: list(READERS).index(name) % 3 == 0))
    def test_take_a_stored_matrix(self, name, param, transform):
        if transform is jax.jit and name.startswith("np"):
            pytest.skip("NumPy reads no tracer.")
        read = transform(READERS[name])
        ours, expected = read(param), read(jnp.asarray(param.value()))
        np.testing.assert_array_equal(ours, expected)
        assert getattr(ours, "dtype", int) == getattr(expected, "dtype", int)

    @pytest.mark.parametrize("key", [0, slice(1, 3), IDS % 3, (0, 1), (slice(None), IDS), (..., 2), (None, 1)])
    def test_index_a_stack(self, key):
        np.testing.assert_array_equal(STACK[key], STACK.value()[key])

    def test_index_under_one_exponent_for_all(self):
        one = ag.GridArray(KERNEL.index, jnp.zeros((1, 1), jnp.int8), KERNEL.format)
        np.testing.assert_array_equal(one[IDS], one.value()[IDS])

    def test_decode_what_they_take_alone(self):
        """The program of an embedding has no array of float32 in the shape of the table."""
        table = ag.to_grid(jax.random.normal(jax.random.key(0), (512, 32)))
        program = str(jax.make_jaxpr(lambda table: table[IDS])(table))
        assert "f32[512,32]" not in program
        assert program.count("i8[512,32]") == 1  # The table itself: no exponent for each element.

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_see_the_dtype_of_the_array(self, dtype):
        q = ag.to_grid(jnp.ones((8, 8), dtype))
        assert q.dtype == jnp.asarray(q).dtype == np.asarray(q).dtype == q.T.dtype == q[0].dtype == dtype

    def test_copy_on_demand(self):
        np.array(KERNEL)[0] = 1  # Writable.
        with pytest.raises(ValueError, match="copy=False"):
            np.array(KERNEL, copy=False)

    def test_have_a_truth_value_of_one_element_alone(self):
        assert bool(ag.to_grid(jnp.ones((1, 1))))
        with pytest.raises(ValueError, match="truth value"):
            bool(KERNEL)
        assert (KERNEL == None) is False  # noqa: E711

    def test_of_lax_need_the_value(self):
        dimensions = (((1,), (0,)), ((), ()))
        with pytest.raises(ValueError, match="__jax_array__"):
            jax.lax.dot_general(X, KERNEL, dimensions)
        np.testing.assert_array_equal(jax.lax.dot_general(X, KERNEL.value(), dimensions), X @ KERNEL)


class TestArithmetic:
    """Is refused, because an update is a GridArray too."""

    @pytest.mark.parametrize(
        "operation",
        [
            lambda q: q * 2,
            lambda q: 2 * q,
            lambda q: np.float32(2) * q,
            lambda q: np.ones((16, 8)) * q,
            lambda q: q * jnp.ones((16, 8)),
            lambda q: q + q,
            lambda q: 1 + q,
            lambda q: q - q,
            lambda q: np.ones((16, 8)) - q,
            lambda q: q / 2,
            lambda q: 2 / q,
            lambda q: q // 2,
            lambda q: q**2,
            lambda q: -q,
            lambda q: abs(q),
        ],
    )
    def test_names_the_remedy(self, operation):
        with pytest.raises(TypeError, match=r"GridArray has no __\w+__.*value\(\).*inside of on_grid.*grid_adamw"):
            operation(KERNEL)

    def test_in_place(self):
        q = KERNEL
        with pytest.raises(TypeError, match="GridArray has no __imul__"):
            q *= 2


class TestShapes:
    """Parameters that are mere shapes make stored shapes, and states as Optax makes them."""

    shapes = {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16), "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}  # noqa: RUF012

    def test_of_to_grid(self):
        stored = ag.to_grid(self.shapes)
        kernel, real = stored["kernel"], ag.to_grid(jnp.zeros((16, 8), jnp.bfloat16))
        assert jax.tree.structure(kernel) == jax.tree.structure(real)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(kernel)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(real)
        ]
        assert kernel.nbytes == real.nbytes == 16 * 8 + 16
        assert stored["bias"] is self.shapes["bias"]

    def test_of_from_grid(self):
        floats = ag.from_grid(ag.to_grid(self.shapes))
        assert floats["kernel"] == jax.ShapeDtypeStruct((16, 8), jnp.float32)
        assert ag.to_grid(self.shapes)["kernel"].value() == self.shapes["kernel"]

    def test_of_stored_shapes_again(self):
        stored = ag.to_grid(ag.to_grid(self.shapes), fraction_bits=8)
        assert stored["kernel"].index == jax.ShapeDtypeStruct((16, 8), jnp.int16)

    @pytest.mark.parametrize(
        "tx",
        [
            ag.grid_adamw(1e-3),
            ag.grid_adamw(1e-3, second_moment="8bit"),
            ag.grid_sgd(1.0),
            ag.compress_state(ag.on_grid(optax.lion(1e-3)), min_size=1),
        ],
    )
    def test_of_init(self, tx):
        state = tx.init(ag.to_grid(self.shapes))
        expected = jax.eval_shape(
            lambda: tx.init(ag.to_grid(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), self.shapes)))
        )
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        for ours, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
            assert isinstance(ours, jax.Array)


class TestShardings:
    """Exponents go where their rows are."""

    mesh = property(lambda self: jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)))
    params = {"kernel": KERNEL, "stack": STACK, "bias": jnp.ones(8)}  # noqa: RUF012

    @pytest.mark.parametrize("spec", [jax.P(), jax.P("x"), jax.P(None, "x"), jax.P(None, None), jax.P(("x",), None)])
    def test_place_a_matrix(self, spec):
        placed = jax.device_put(KERNEL, ag.shardings(KERNEL, jax.NamedSharding(self.mesh, spec)))
        assert placed.index.sharding.spec == spec
        np.testing.assert_array_equal(placed.value(), KERNEL.value())
        rows = tuple(axis if length > 1 else None for axis, length in zip(spec, KERNEL.exponent.shape, strict=False))
        assert placed.exponent.sharding.spec == jax.P(*rows)

    def test_of_a_tree_and_of_its_prefix(self):
        sharding = jax.NamedSharding(self.mesh, jax.P("x"))
        tree = {"kernel": sharding, "stack": jax.NamedSharding(self.mesh, jax.P(None, None, "x")), "bias": sharding}
        placed = jax.jit(lambda p: p, out_shardings=ag.shardings(self.params, tree))(self.params)
        assert placed["stack"].index.sharding.spec == jax.P(None, None, "x")
        assert placed["stack"].exponent.sharding.is_fully_replicated
        prefix = ag.shardings({"a": {"kernel": KERNEL, "bias": jnp.ones(8)}}, {"a": sharding})
        assert prefix["a"]["bias"] is sharding
        assert prefix["a"]["kernel"].index is sharding

    def test_of_shapes(self):
        shapes = jax.eval_shape(lambda p: p, self.params)
        assert ag.shardings(shapes, jax.P("x"))["kernel"].index == jax.P("x")

    def test_of_one_device(self):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
        assert jax.device_put(KERNEL, ag.shardings(KERNEL, sharding)).exponent.devices() == {jax.devices()[1]}
