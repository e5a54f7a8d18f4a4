"""value_and_grad: the gradients of the numbers that stored parameters stand for."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import some

import altgrad_jax as ag

WIDTH, LAYERS = 16, 3
BFLOAT16 = jnp.bfloat16


def stored(fraction_bits=0):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "layers": {
            "kernel": jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)) / 4,
            "bias": jnp.full((LAYERS, WIDTH), 0.1),
        },
        "head": jax.random.normal(keys[1], (WIDTH, 4)),
    }
    return ag.to_grid(params, fraction_bits=fraction_bits)


X = jax.random.normal(jax.random.key(1), (8, WIDTH))


def layer_of(x, layer):
    return jnp.tanh(x @ layer["kernel"].astype(jnp.float32) + layer["bias"])


def scanned(params, x, wrap=lambda f: f):
    x, _ = jax.lax.scan(wrap(lambda x, layer: (layer_of(x, layer), None)), x, params["layers"])
    return jnp.mean((x @ params["head"].astype(jnp.float32)) ** 2)


def unrolled(params, x):
    for i in range(LAYERS):
        x = layer_of(x, jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]))  # Of indices and exponents.
    return jnp.mean((x @ params["head"].astype(jnp.float32)) ** 2)


def tied(params, x):
    """The head twice, once transposed."""
    x = x @ params["head"].astype(jnp.float32)
    return jnp.mean((x @ params["head"].T) ** 2) + jnp.sum(params["layers"]["bias"] ** 2)


def mixed(params, x):
    """Every way to read a stored array."""
    head = params["head"]
    read = [jnp.asarray(head), head[jnp.array([1, 1, 5])], head[2:4, 1], jnp.take(head, 3, axis=0), head.T, head[None]]
    return sum(jnp.sum(jnp.sin(x[0, 0] + part)) for part in read) + jnp.einsum("bi,io->", x, head)


FUNCTIONS = {
    "scanned": scanned,
    "rematerialised": functools.partial(scanned, wrap=jax.checkpoint),
    "unrolled": unrolled,
    "tied": tied,
    "mixed": mixed,
}


def assert_same(ours, expected):
    chex.assert_trees_all_equal(ours, expected)
    chex.assert_trees_all_equal_dtypes(ours, expected)


class TestValueAndGrad:
    """Value and gradients are those of a function of from_grid(params), bit for bit."""

    @pytest.mark.parametrize(
        ("name", "mode"),
        some(itertools.product(FUNCTIONS, ("eager", "jit")), lambda case: case[1] == "jit" or case[0] == "tied"),
    )
    def test_is_that_of_the_numbers(self, name, mode):
        params, fun = stored(), FUNCTIONS[name]
        transform = jax.jit if mode == "jit" else lambda fun: fun
        ours = transform(ag.value_and_grad(fun))(params, X)
        assert_same(ours, transform(jax.value_and_grad(fun))(ag.from_grid(params), X))

    @pytest.mark.parametrize("fraction_bits", [0, 8])
    @pytest.mark.parametrize("full", [False, True])
    def test_passes_straight_through_rounding(self, fraction_bits, full):
        params = stored(fraction_bits)["head"]
        weights = jnp.arange(64.0).reshape(WIDTH, 4)
        value, gradient = ag.value_and_grad(lambda q: jnp.sum(q.value(full=full) * weights))(params)
        assert_same((value, gradient), (jnp.sum(params.value(full=full) * weights), weights))

    @pytest.mark.parametrize("name", ["scanned", "rematerialised", "unrolled"])
    def test_gives_gradients_in_a_dtype(self, name):
        params = stored()
        ours = ag.value_and_grad(FUNCTIONS[name], dtype=BFLOAT16)(params, X)
        assert_same(ours, jax.value_and_grad(FUNCTIONS[name])(ag.from_grid(params, BFLOAT16), X))
        assert ours[1]["head"].dtype == BFLOAT16
        assert ours[1]["layers"]["bias"].dtype == jnp.float32

    def test_takes_the_dtype_of_each_array(self):
        params = ag.to_grid({"a": jnp.ones((4, 4), BFLOAT16), "b": jnp.ones((4, 4))})
        gradients = ag.value_and_grad(lambda p: jnp.sum(p["a"] @ p["b"]))(params)[1]
        assert (gradients["a"].dtype, gradients["b"].dtype) == (BFLOAT16, jnp.float32)

    def test_under_vmap(self):
        params, x = stored(), jnp.stack([X, 2 * X, -X])
        both = jax.vmap(ag.value_and_grad(scanned), in_axes=(None, 0))(params, x)
        expected = jax.vmap(jax.value_and_grad(scanned), in_axes=(None, 0))(ag.from_grid(params), x)
        assert_same(both, expected)
        many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
        assert_same(jax.vmap(ag.value_and_grad(scanned))(many, x), both)

    def test_inside_of_shard_map(self):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        head, spec = stored()["head"], jax.P("x")

        def loss(head, x):
            return jax.lax.psum(jnp.sum(jnp.tanh(x @ head.astype(jnp.float32))), "x")

        def step(transform, head):
            specs = (ag.shardings(head, spec), jax.P(None, "x"))
            run = jax.shard_map(transform(loss), mesh=mesh, in_specs=specs, out_specs=(jax.P(), spec))
            return jax.jit(run)(head, X)

        assert_same(step(ag.value_and_grad, head), step(jax.value_and_grad, head.value()))

    def test_around_shard_map(self):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        head = stored()["head"]

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("x")), out_specs=jax.P())
        def loss(head, x):
            return jax.lax.pmean(jnp.mean(jnp.tanh(x @ head.astype(jnp.float32))), "x")

        assert_same(jax.jit(ag.value_and_grad(loss))(head, X), jax.jit(jax.value_and_grad(loss))(head.value(), X))

    @pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
    def test_of_integers_that_were_gathered(self, axis_type):
        """They travel in one byte, and the gradients are sharded as the weights are."""
        mesh, head = jax.make_mesh((2,), ("x",), axis_types=(axis_type,)), stored()["head"]
        explicit = axis_type == jax.sharding.AxisType.Explicit
        gather = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint

        def loss(head, x):
            whole = lambda leaf: gather(leaf, jax.NamedSharding(mesh, jax.P()))  # noqa: E731
            head = dataclasses.replace(head, index=whole(head.index), exponent=whole(head.exponent))
            return jnp.sum(jnp.tanh(x @ head.astype(jnp.float32)))

        rows = jax.NamedSharding(mesh, jax.P("x"))
        placed = jax.device_put(head, ag.shardings(head, rows)), jax.device_put(X, rows)
        program = jax.jit(ag.value_and_grad(loss))
        gathers = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather", program.lower(*placed).compile().as_text())
        assert set(gathers) == {"s8"}
        value, gradient = program(*placed)
        assert not explicit or gradient.sharding.spec[0] == "x"
        expected = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(X @ w.astype(jnp.float32))))(head.value())
        assert value == pytest.approx(float(expected[0]), rel=1e-4)  # A sum of bfloat16 numbers, in two parts.
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), np.asarray(expected[1], np.float32), rtol=2e-2, atol=1e-2
        )

    def test_of_several_arguments(self):
        params, other = stored(), stored()["head"]

        def fun(x, params, other, *, factor):
            return factor * scanned(params, x) + jnp.sum(other @ other.T), {"params": params, "x": x}

        (value, aux), gradients = ag.value_and_grad(fun, argnums=(2, -2), has_aux=True)(X, params, other, factor=2.0)
        expected = jax.value_and_grad(lambda other, params: fun(X, params, other, factor=2.0)[0], argnums=(0, 1))
        assert_same((value, gradients), expected(other.value(), ag.from_grid(params)))
        assert_same(aux, {"params": params, "x": X})
        assert type(aux["params"]["head"]) is ag.GridArray

    def test_of_plain_trees_is_that_of_jax(self):
        params = ag.from_grid(stored())
        assert_same(ag.value_and_grad(scanned, dtype=BFLOAT16)(params, X), jax.value_and_grad(scanned)(params, X))

    def test_traces_a_jitted_function_once(self):
        """Consecutive calls have the same depth, also after an error."""
        traces = []

        @jax.jit
        def fun(params, x):
            traces.append(1)
            return tied(params, x)

        params = stored()
        for _ in range(3):
            ag.value_and_grad(fun)(params, X)
            with pytest.raises(TypeError):
                ag.value_and_grad(lambda params: params["head"] + 1)(params)
        assert len(traces) == 1

    def test_keeps_name_and_documentation(self):
        assert ag.value_and_grad(tied).__doc__ == tied.__doc__


class TestSecondOrder:
    """Gradients of functions of gradients."""

    @pytest.mark.parametrize("name", ["scanned", "rematerialised", "unrolled"])
    def test_penalty_of_the_gradient_of_the_input(self, name):
        def penalty(params, x):
            return jnp.sum(jax.grad(FUNCTIONS[name], argnums=1)(params, x) ** 2)

        params = stored()
        assert_same(ag.value_and_grad(penalty)(params, X), jax.value_and_grad(penalty)(ag.from_grid(params), X))

    @pytest.mark.parametrize("name", ["scanned", "rematerialised", "unrolled"])
    def test_of_the_gradient_of_the_parameters(self, name):
        def norm(value_and_grad, params, x):
            return optax.tree.norm(value_and_grad(FUNCTIONS[name])(params, x)[1])

        params = stored()
        ours = ag.value_and_grad(functools.partial(norm, ag.value_and_grad))(params, X)
        expected = jax.value_and_grad(functools.partial(norm, jax.value_and_grad))(ag.from_grid(params), X)
        assert_same(ours, expected)

    def test_goes_through_an_auxiliary_value(self):
        """The array that an inner call differentiates, and one that it does not, given back by it."""

        def outer(value_and_grad, w):
            (_, inner), _ = value_and_grad(lambda x: (jnp.sum(x), w), has_aux=True)(X)
            (_, chosen), _ = value_and_grad(lambda w: (jnp.sum(jnp.tanh(w @ X[:4])), w), has_aux=True)(w)
            return jnp.sum(jnp.asarray(inner) ** 2) + jnp.sum(jnp.sin(chosen[...]))

        head = stored()["head"]
        ours = ag.value_and_grad(functools.partial(outer, ag.value_and_grad))(head)
        assert_same(ours, jax.value_and_grad(functools.partial(outer, jax.value_and_grad))(head.value()))


class TestCodes:
    """A product of fp8 codes, whose gradient is that of the numbers."""

    def test_as_a_custom_vjp(self):
        @jax.custom_vjp
        def product(x, numbers, stored):
            codes, scale = stored.fp8()
            return (x * scale[:, 0]) @ codes.astype(jnp.float32)

        def forward(x, numbers, stored):
            return product(x, numbers, stored), (x, numbers)

        def backward(kept, gradient):
            x, numbers = kept
            return gradient @ numbers.T, x.T @ gradient, None

        product.defvjp(forward, backward)
        params = ag.to_grid(jax.random.normal(jax.random.key(0), (16, 32)), "float8_e4m3fn")
        ours = ag.value_and_grad(lambda p, stored: jnp.sum(jnp.sin(product(X, p.value(), stored))))(params, params)
        expected = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(X @ w)))(params.value())
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, expected)


class TestErrors:
    """What has no gradient says so."""

    def test_codes(self):
        params = ag.to_grid(jnp.ones((4, 4)), "float8_e4m3fn")
        with pytest.raises(TypeError, match=r"fp8\(\).*value\(\)"):
            ag.value_and_grad(lambda q: jnp.sum(q.fp8()[0].astype(jnp.float32)))(params)

    def test_dtype(self):
        with pytest.raises(TypeError, match=r"dtype must be a floating dtype.*int8"):
            ag.value_and_grad(tied, dtype=jnp.int8)

    def test_argnums(self):
        with pytest.raises(ValueError, match=r"argnums.*got 2 for 2"):
            ag.value_and_grad(tied, argnums=2)(stored(), X)
        with pytest.raises(ValueError, match=r"each argument once, got \(0, -2\)"):
            ag.value_and_grad(tied, argnums=(0, -2))(stored(), X)
        assert_same(ag.value_and_grad(tied, argnums=np.int64(0))(stored(), X), ag.value_and_grad(tied)(stored(), X))

    def test_grid_arrays_as_gradients_name_the_remedy(self):
        params, tx = stored(), ag.grid_adamw(1e-3)
        with pytest.raises(ValueError, match=r"altgrad_jax\.value_and_grad"):
            tx.update(params, tx.init(params), params)
