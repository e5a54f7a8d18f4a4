"""Named chains, and gradients of stored parameters, in the strict modes of JAX."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import some

import altgrad_jax as ag

FLOATS = {"kernel": jax.random.normal(jax.random.key(0), (16, 32)), "bias": jnp.zeros(32)}
X = jax.random.normal(jax.random.key(1), (8, 16))
CHAINS = {
    "manifold_adamw": (ag.manifold_adamw(1e-2), lambda params: params),
    "manifold_adamw of a format": (ag.manifold_adamw(1e-2, format="float8_e4m3fn"), lambda params: params),
    "grid_adamw": (ag.grid_adamw(1e-2), ag.to_grid),
    "grid_adamw without a momentum": (ag.grid_adamw(1e-2, b1=0), lambda params: ag.to_grid(params, fraction_bits=8)),
    "grid_adamw, 8bit": (ag.grid_adamw(1e-2, second_moment="8bit"), ag.to_grid),
    "grid_adamw, float32": (ag.grid_adamw(1e-2, second_moment="float32"), ag.to_grid),
    "grid_sgd": (ag.grid_sgd(1e-2), ag.to_grid),
    "on_grid": (ag.compress_state(ag.on_grid(optax.lion(1e-3)), min_size=1), ag.to_grid),
}
MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "no tracer leaks": jax.checking_leaks,
}


def loss(params, x):
    hidden = jnp.tanh(x @ params["kernel"].astype(jnp.float32) + params["bias"][None])
    return jnp.sum(hidden * hidden)


def trained(name, floats=FLOATS, x=X):
    tx, store = CHAINS[name]
    params = store(floats)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        _, grads = ag.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    return jax.tree.map(np.asarray, (params, state))


def assert_near(ours, expected):
    """Sums in another order change the last bits, and now and then how a weight is rounded."""
    np.testing.assert_allclose(ours["bias"], expected["bias"], rtol=1e-3, atol=1e-5)
    kernels = [ag.from_grid(params["kernel"]) for params in (ours, expected)]
    np.testing.assert_allclose(*kernels, atol=2e-2)
    assert float(jnp.mean(kernels[0] == kernels[1])) > 0.98 or ours["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("name", some(CHAINS, "grid_adamw".__eq__))
class TestModes:
    """Nothing raises, and nothing changes."""

    @pytest.mark.parametrize("mode", MODES)
    def test_same_bits(self, name, mode):
        if mode == "strict promotion" and ("manifold" in name or name.endswith(("8bit", "float32"))):
            with jax.numpy_dtype_promotion("strict"), pytest.raises(jax.dtypes.TypePromotionError):
                optax.scale_by_adam().update(FLOATS, optax.scale_by_adam().init(FLOATS))
            pytest.skip("Optax's own bias correction promotes.")
        expected = trained(name)
        with MODES[mode]():
            ours = trained(name)
        jax.tree.map(np.testing.assert_array_equal, ours, expected)

    def test_x64(self, name):
        """With float32 parameters dtypes stay what they are."""
        expected = trained(name)
        with jax.enable_x64(True):
            ours = trained(name)
        assert [x.dtype for x in jax.tree.leaves(ours[0])] == [x.dtype for x in jax.tree.leaves(expected[0])]
        assert_near(ours[0], expected[0])

    @pytest.mark.parametrize("spec", some([jax.P("x"), jax.P(None, "x")], lambda spec: len(spec) > 1))
    @pytest.mark.parametrize("context", some([jax.set_mesh, contextlib.nullcontext], lambda c: c is not jax.set_mesh))
    def test_explicit_mesh(self, name, spec, context):
        """As jax.make_mesh makes it, also where nobody sets it."""
        expected = trained(name)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
        with context(mesh):
            floats = {
                "kernel": jax.device_put(FLOATS["kernel"], jax.NamedSharding(mesh, spec)),
                "bias": jax.device_put(FLOATS["bias"], jax.NamedSharding(mesh, jax.P())),
            }
            x = jax.device_put(X, jax.NamedSharding(mesh, jax.P()))
            ours = trained(name, floats, x)
        assert_near(ours[0], expected[0])
