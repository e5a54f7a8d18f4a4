"""Training loops of plain JAX, Flax linen, Flax nnx and Equinox, changed only in the three lines of the README."""

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import STORED
from flax import nnx
from flax.training.train_state import TrainState
from quick import some

import altgrad_jax as ag
import altgrad_jax.flax_support

WIDTH, STEPS = 32, 300
X = jax.random.normal(jax.random.key(0), (8192, 16))
# With noise, which models of this size hardly memorize, so that all losses end near its variance.
Y = jnp.sin(X @ jax.random.normal(jax.random.key(1), (16, 4))) + jax.random.normal(jax.random.key(2), (8192, 4)) / 2


def error(predictions):
    return jnp.mean((predictions - Y) ** 2)


def plain(store, value_and_grad, tx):
    keys = jax.random.split(jax.random.key(3), 3)
    params = {
        "in": jax.random.normal(keys[0], (16, WIDTH)) / 4,
        "table": jax.random.normal(keys[1], (8, WIDTH)),
        "out": jax.random.normal(keys[2], (WIDTH, 4)) / 6,
        "bias": jnp.zeros(4),
    }
    params = store(params)
    state = tx.init(params)

    def loss(params, x):
        hidden = jnp.tanh(x @ params["in"] + params["table"][jnp.arange(len(x)) % 8])
        return error(hidden @ params["out"] + params["bias"])

    @jax.jit
    def step(params, state):
        value, grads = value_and_grad(loss)(params, X)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(STEPS):
        params, state, value = step(params, state)
    return value


class Block(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, _):
        return x + flax.linen.Dense(WIDTH)(flax.linen.tanh(flax.linen.LayerNorm()(x))), None


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.Dense(WIDTH)(x)
        x, _ = flax.linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        return flax.linen.Dense(4)(x)


def linen(store, value_and_grad, tx):
    """A TrainState, and layers under flax.linen.scan."""
    model = Linen()
    params = store(model.init(jax.random.key(3), X)["params"])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        value, grads = value_and_grad(lambda params: error(model.apply({"params": params}, X)))(state.params)
        return state.apply_gradients(grads=grads), value

    for _ in range(STEPS):
        state, value = step(state)
    return value


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.inward = nnx.Linear(16, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)
        self.outward = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, x):
        return self.outward(self.dropout(nnx.relu(self.norm(self.inward(x)))))


def stored_nnx(store):
    model = NNX(nnx.Rngs(3))
    nnx.update(model, store(nnx.state(model, nnx.Param)))
    return model


def nnx_loss(model, x):
    return error(model(x))


def with_nnx(store, value_and_grad, tx):
    """nnx.Optimizer, and a model with running means and random numbers of its own."""
    model = stored_nnx(store)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = value_and_grad(nnx_loss)(model, X)
        optimizer.update(model, grads)
        return value

    values = [step(model, optimizer) for _ in range(STEPS)]
    return jnp.mean(jnp.stack(values[-50:]))  # Over the noise of Dropout.


def is_stored(leaf):
    return isinstance(leaf, ag.GridArray)


def split_equinox(model):
    return eqx.partition(model, lambda leaf: eqx.is_inexact_array(leaf) or is_stored(leaf), is_leaf=is_stored)


def with_equinox(store, value_and_grad, tx):
    keys = jax.random.split(jax.random.key(3), 2)
    layers = [eqx.nn.Linear(16, WIDTH, key=keys[0]), eqx.nn.LayerNorm(WIDTH), eqx.nn.Linear(WIDTH, 4, key=keys[1])]
    params, static = split_equinox(eqx.nn.Sequential([layers[0], eqx.nn.Lambda(jnp.tanh), *layers[1:]]))
    params = store(params)
    state = tx.init(params)

    def loss(params):
        return error(jax.vmap(eqx.combine(params, static, is_leaf=is_stored))(X))

    @jax.jit
    def step(params, state):
        value, grads = value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(STEPS):
        params, state, value = step(params, state)
    return value


class TestThreeLines:
    """to_grid, grid_adamw and value_and_grad in place of nothing, adamw and JAX's: 300 steps end where float32 does."""

    @pytest.mark.parametrize("loop", some([plain, linen, with_nnx, with_equinox], lambda loop: loop is plain))
    def test_reach_the_loss_of_float32(self, loop):
        float32 = jax.value_and_grad if loop is not with_nnx else nnx.value_and_grad
        expected = float(loop(lambda params: params, float32, optax.adamw(3e-3)))
        np.testing.assert_allclose(float(loop(ag.to_grid, ag.value_and_grad, ag.grid_adamw(3e-3))), expected, rtol=0.02)


class TestNnx:
    """value_and_grad of functions of models."""

    def test_is_that_of_the_numbers(self):
        model, twin = stored_nnx(ag.to_grid), stored_nnx(lambda params: ag.from_grid(ag.to_grid(params)))
        value, grads = ag.value_and_grad(nnx_loss)(model, X)
        expected, expected_grads = nnx.value_and_grad(nnx_loss)(twin, X)
        assert float(value) == float(expected)
        assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
        jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)
        # What the function changed in other variables is changed.
        np.testing.assert_array_equal(model.norm.mean[...], twin.norm.mean[...])
        assert float(jnp.abs(model.norm.mean[...]).max()) > 0
        assert int(model.dropout.rngs.count[...]) == int(twin.dropout.rngs.count[...]) == 1

    def test_leaves_parameters_stored(self):
        model = stored_nnx(ag.to_grid)
        before = jax.tree.map(lambda x: x, nnx.state(model, nnx.Param))
        ag.value_and_grad(nnx_loss)(model, X)
        assert type(model.inward.kernel.get_value()) is ag.GridArray
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), before)

    def test_of_several_arguments_with_an_auxiliary_value(self):
        model, scale = stored_nnx(ag.to_grid), ag.to_grid(jnp.ones((4, 4)))

        def fun(x, model, scale):
            y = model(x) @ scale
            return error(y), y

        (value, y), grads = ag.value_and_grad(fun, argnums=(2, 1), has_aux=True, dtype=jnp.bfloat16)(X, model, scale)
        assert float(value) == float(error(y))
        assert grads[0].dtype == grads[1]["inward"]["kernel"].get_value().dtype == jnp.bfloat16

    def test_of_a_plain_model_is_that_of_nnx(self):
        model, twin = NNX(nnx.Rngs(3)), NNX(nnx.Rngs(3))
        ours, expected = ag.value_and_grad(nnx_loss)(model, X), nnx.value_and_grad(nnx_loss)(twin, X)
        jax.tree.map(np.testing.assert_array_equal, ours, expected)

    @pytest.mark.parametrize("name", some([*STORED, "compressed"], ["grid_adamw, 8bit"].__contains__))
    def test_keeps_the_structure_of_its_state(self, name):
        """From the first state on, under nnx.Optimizer and without it: a step is compiled once, and may be scanned."""
        compressed = lambda: ag.compress_state(ag.on_grid(optax.adamw(1e-2)), min_size=1)  # noqa: E731
        make = (STORED | {"compressed": compressed})[name]
        model = stored_nnx(lambda params: ag.to_grid(params, fraction_bits=8))
        optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
        before, traces = jax.tree.structure(nnx.state((model, optimizer))), []

        @nnx.jit
        def step(model, optimizer):
            traces.append(1)
            optimizer.update(model, ag.value_and_grad(nnx_loss)(model, X)[1])

        for _ in range(3):
            step(model, optimizer)
        assert jax.tree.structure(nnx.state((model, optimizer))) == before
        assert len(traces) == 1
        tx, params = make(), nnx.state(model, nnx.Param)
        state = tx.init(params)
        _, after = jax.eval_shape(tx.update, ag.from_grid(params), state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)

    def test_gives_back_what_is_stored(self):
        model = stored_nnx(ag.to_grid)
        model.kept = nnx.Variable(model.inward.kernel.get_value())

        def fun(model, x):
            model.kept.set_value(model.inward.kernel.get_value())
            return error(model(x)), model.inward.kernel.get_value()

        (_, aux), _ = ag.value_and_grad(fun, has_aux=True)(model, X)
        assert type(aux) is type(model.kept.get_value()) is ag.GridArray

    def test_of_models_in_containers_and_by_keyword_are_errors(self):
        model = stored_nnx(ag.to_grid)
        with pytest.raises(ValueError, match="positional arguments"):
            ag.value_and_grad(lambda models, x: nnx_loss(models["a"], x))({"a": model}, X)
        with pytest.raises(ValueError, match="positional arguments"):
            ag.value_and_grad(lambda scale, model: scale * nnx_loss(model, X))(jnp.ones(()), model=model)

    def test_of_models_that_share_parameters_is_an_error(self):
        model, other = stored_nnx(ag.to_grid), stored_nnx(ag.to_grid)
        other.inward = model.inward
        with pytest.raises(ValueError, match="share Params"):
            ag.value_and_grad(lambda a, b: nnx_loss(a, X) + nnx_loss(b, X), argnums=(0, 1))(model, other)

    def test_needs_flax_support(self, monkeypatch):
        monkeypatch.setattr(altgrad_jax.gradients, "STATEFUL", {})
        with pytest.raises(ValueError, match=r"import altgrad_jax\.flax_support"):
            ag.value_and_grad(nnx_loss)(stored_nnx(ag.to_grid), X)


class TestEquinox:
    """Its own filter takes only floating arrays."""

    def test_filter_of_inexact_arrays_freezes_stored_ones(self):
        layer = eqx.nn.Linear(16, 8, key=jax.random.key(0))
        stored = eqx.combine(
            ag.to_grid(eqx.filter(layer, eqx.is_array)), layer, is_leaf=lambda leaf: isinstance(leaf, ag.GridArray)
        )
        assert len(jax.tree.leaves(eqx.filter(stored, eqx.is_inexact_array))) == 1  # The bias.
        params, static = split_equinox(stored)
        assert len(jax.tree.leaves(params)) == 3
        assert not jax.tree.leaves(static)

    def test_tree_of_where_may_be_a_module(self):
        """A module is callable, like a rule."""
        layer = eqx.nn.Linear(16, 8, key=jax.random.key(0))
        where = jax.tree.map(lambda leaf: leaf.ndim == 2, layer)
        stored = ag.to_grid(layer, where=where)
        assert type(stored.weight) is ag.GridArray
        assert stored.bias is layer.bias
