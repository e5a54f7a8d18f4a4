"""Optax's conventions, to the letter: one table of transformations, one of promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from quick import some

import altgrad_jax as ag

TRANSFORMATIONS = {
    "stiffness": lambda eps: ag.stiffness_precondition(),
    "stiffness(format)": lambda eps: ag.stiffness_precondition(format="float8_e4m3fn"),
    "tracker": lambda eps: ag.track_ulp_position(),
    "tracker(format)": lambda eps: ag.track_ulp_position("E5M2"),
    "manifold_adamw": lambda eps: ag.manifold_adamw(1e-2, eps=eps),
    "manifold_adamw(format)": lambda eps: ag.manifold_adamw(1e-2, eps=eps, format="float8_e5m2"),
    "manifold_adamw(unaware)": lambda eps: ag.manifold_adamw(1e-2, eps=eps, manifold_aware=False),
    "compress_state(adamw)": lambda eps: ag.compress_state(optax.adamw(1e-2, eps=eps), min_size=2),
    "after adam": lambda eps: optax.chain(
        optax.scale_by_adam(eps=eps),
        ag.stiffness_precondition(3),
        optax.scale_by_learning_rate(1e-2),
        ag.track_ulp_position(),
    ),
}
EXACT = ("stiffness", "stiffness(format)", "tracker", "tracker(format)")
TRACKING = [name for name in TRANSFORMATIONS if "stiffness" not in name and "compress" not in name]


QUICK = ("stiffness(format)", "manifold_adamw")


@pytest.fixture(params=some(TRANSFORMATIONS, QUICK.__contains__))
def name(request):
    return request.param


@pytest.fixture
def tx(name):
    return TRANSFORMATIONS[name](1e-8)


def params_and_gradients(dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)  # noqa: E731
    params = {
        "dense": {"kernel": draw(4, 3), "bias": jnp.zeros(3, dtype)},
        "scalar": draw(),
        "list": [draw(2), draw(1, 1)],
    }
    return params, jax.tree.map(
        lambda p: (0.1 * jax.random.normal(jax.random.key(p.size), p.shape)).astype(dtype), params
    )


def positions(state):
    """The one ulp_position of a state, or None."""
    return optax.tree.get(state, "ulp_position")


def assert_same_description(actual, expected):
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)


class TestState:
    """The state keeps its tree, shapes and dtypes from init through every update."""

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_is_described_by_init(self, name, dtype):
        tx = TRANSFORMATIONS[name](1e-4 if dtype == jnp.float16 else 1e-8)
        params, gradients = params_and_gradients(dtype)
        state, update = tx.init(params), jax.jit(tx.update)
        # From moments that it decodes to float32 Adam makes float32 updates, as with mu_dtype.
        wide = dtype != jnp.float32 and name == "compress_state(adamw)"
        for _ in range(3):
            updates, new_state = update(gradients, state, params)
            assert_same_description(new_state, state)
            chex.assert_trees_all_equal_shapes(updates, gradients)
            assert wide or jax.tree.all(jax.tree.map(lambda u, g: u.dtype == g.dtype, updates, gradients))
            chex.assert_tree_all_finite((updates, new_state))
            params, state = optax.apply_updates(params, updates), new_state
            assert_same_description(params, gradients)

    def test_init_works_on_shapes_alone(self, tx):
        params, _ = params_and_gradients()
        shapes = jax.eval_shape(lambda: params)
        assert_same_description(jax.eval_shape(tx.init, shapes), jax.eval_shape(lambda: tx.init(params)))

    @pytest.mark.parametrize("name", TRACKING)
    def test_has_exactly_one_ulp_position(self, tx):
        params, gradients = params_and_gradients(jnp.bfloat16)
        _, state = tx.update(gradients, tx.init(params), params)
        counted = positions(state)  # Raises if there are several.
        chex.assert_trees_all_equal_shapes(counted, params)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(counted))

    def test_is_mapped_by_map_params(self, tx, name):
        params, _ = params_and_gradients()
        state = tx.init(params)
        marked = optax.tree.map_params(tx, lambda leaf: leaf + 1, state, transform_non_params=lambda leaf: leaf)
        assert_same_description(marked, state)
        if name in TRACKING:
            chex.assert_trees_all_equal(optax.tree.get(marked, "ulp_position"), jax.tree.map(jnp.ones_like, params))

    def test_keeps_the_sharding_of_the_parameters(self, tx, name):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.NamedSharding(mesh, jax.P("d"))
        params = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (4, 3)), sharding)}
        state = tx.init(params)
        sharded = jax.jit(tx.update)(params, state, params)
        local = jax.jit(tx.update)(*jax.device_put((params, state, params), jax.devices()[0]))
        chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (sharded, local)))
        if name in TRACKING:
            assert positions(sharded[1])["w"].sharding.is_equivalent_to(sharding, 2)


class TestCompilation:
    """One trace for many steps, and the numbers of eager mode."""

    def test_traces_once(self, tx):
        params, gradients = params_and_gradients()
        chex.clear_trace_counter()

        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(gradients, state, params):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(4):
            params, state = step(gradients, state, params)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_jit_equals_eager(self, tx, name, dtype):
        params, gradients = params_and_gradients(dtype)
        _, state = tx.update(gradients, tx.init(params), params)
        eager, jitted = tx.update(gradients, state, params), jax.jit(tx.update)(gradients, state, params)
        if name == "compress_state(adamw)":  # A moment that differs in its last bit may round the other way.
            chex.assert_trees_all_close(eager[0], jitted[0], rtol=2e-2, atol=1e-5)
            steps = lambda a, b: np.abs(np.int32(a) - np.int32(b)).max() <= 1  # noqa: E731
            assert jax.tree.all(jax.tree.map(steps, eager[1], jitted[1]))
            return
        if name in EXACT:
            chex.assert_trees_all_equal(eager, jitted)
            return
        # XLA may contract a product and a sum: 2 ULP of the largest term, of which lr * 1.1 is the largest here. In
        # bfloat16 it also keeps float32 where Optax's eager operations round, about four times in a row.
        rounding = float(jnp.finfo(dtype).eps) * (2 if dtype == jnp.float32 else 8)
        move = rounding * 1e-2 * 1.1
        chex.assert_trees_all_close(eager[0], jitted[0], atol=move, rtol=0)
        for moment in ("mu", "nu"):
            pair = [optax.tree.get(state, moment) for _, state in (eager, jitted)]
            chex.assert_trees_all_close(*pair, rtol=rounding, atol=1e-12)

        def close(eager, jitted, param):
            ulp = np.asarray(ag.spacing(param, "float8_e5m2" if "format" in name else dtype))
            counted = np.asarray(param) != 0
            allowed = np.maximum(move / ulp, 1.0 if dtype == jnp.bfloat16 else 0.0) + 2e-6 * np.abs(eager)
            assert (np.abs(np.asarray(eager) - jitted) <= allowed)[counted].all()

        jax.tree.map(close, positions(eager[1]), positions(jitted[1]), params)

    @pytest.mark.parametrize("name", EXACT)
    def test_vmap_equals_eager(self, tx):
        params, gradients = params_and_gradients()
        stacked = jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *[jax.tree.map(lambda p, k=k: k * p, (gradients, params)) for k in (1, 3)],
        )
        state = jax.vmap(tx.init)(stacked[1])
        batched = jax.vmap(tx.update)(stacked[0], state, stacked[1])
        for i, k in enumerate((1, 3)):
            g, p = jax.tree.map(lambda leaf, k=k: k * leaf, (gradients, params))
            chex.assert_trees_all_equal(jax.tree.map(lambda leaf, i=i: leaf[i], batched), tx.update(g, tx.init(p), p))

    def test_runs_inside_scan(self, tx):
        params, gradients = params_and_gradients()

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        scanned, _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
        looped = (params, tx.init(params))
        for _ in range(3):
            looped, _ = jax.jit(step)(looped, None)
        chex.assert_trees_all_close(scanned, looped, rtol=1e-5)


class TestTrees:
    """Any tree of parameters: empty, scalar, with None leaves, nested nnx.State."""

    @pytest.mark.parametrize("params", [{}, (), [None, {"a": None}]])
    def test_without_leaves(self, tx, params):
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)

    def test_with_none_leaves(self, tx):
        params = {"frozen": None, "w": jnp.array([1.0, -3.0])}
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates["frozen"] is None
        chex.assert_shape(updates["w"], (2,))

    @pytest.mark.parametrize("params", [jnp.float32(1.5), np.float32([1.0, 2.0])])
    def test_of_one_leaf(self, tx, params):
        updates, _ = tx.update(params, tx.init(params), params)
        chex.assert_equal_shape([updates, params])

    def test_of_nnx_state(self, tx):
        model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(1)))
        params = nnx.state(model, nnx.Param)
        gradients = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 3))) ** 2))(model)
        updates, _ = tx.update(gradients, tx.init(params), params)
        assert_same_description(updates, gradients)

    def test_of_an_nnx_optimizer(self, tx):
        model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        before = nnx.to_pure_dict(nnx.state(model))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 3))) ** 2))(model))
        assert not np.array_equal(model.kernel[...], before["kernel"])


class TestComposition:
    """Under Optax's own combinators the numbers are those of the transformation alone."""

    def steps(self, tx, n=3, **extra):
        """Parameters and positions after some steps."""
        params, gradients = params_and_gradients()
        state, update = tx.init(params), jax.jit(functools.partial(tx.update, **extra))
        for _ in range(n):
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, positions(state)

    def test_chain_and_named_chain(self, tx):
        alone = self.steps(tx)
        chex.assert_trees_all_equal(self.steps(optax.chain(optax.identity(), tx)), alone)
        chex.assert_trees_all_equal(self.steps(optax.named_chain(("ours", tx))), alone)

    def test_masked(self, tx, name):
        mask = {"dense": {"kernel": True, "bias": False}, "scalar": True, "list": False}
        params, gradients = params_and_gradients()
        masked = optax.masked(tx, mask)
        updates, state = masked.update(gradients, masked.init(params), params)
        alone, alone_state = tx.update(gradients, tx.init(params), params)
        chex.assert_trees_all_equal(updates["dense"]["kernel"], alone["dense"]["kernel"])
        chex.assert_trees_all_equal(updates["list"], gradients["list"])
        if name in TRACKING:
            counted = positions(state)
            chex.assert_trees_all_equal(counted["dense"]["kernel"], positions(alone_state)["dense"]["kernel"])
            assert isinstance(counted["dense"]["bias"], optax.MaskedNode)

    def test_partition(self, tx, name):
        labels = {"dense": "ours", "scalar": "ours", "list": "sgd"}
        params, gradients = params_and_gradients()
        both = optax.partition({"ours": tx, "sgd": optax.sgd(0.5)}, labels)
        scale = {"grid_scale": jax.tree.map(lambda p: 0.25, params)}
        updates, state = both.update(gradients, both.init(params), params, **scale)
        alone, alone_state = tx.update(gradients, tx.init(params), params, **scale)
        chex.assert_trees_all_equal(updates["dense"], alone["dense"])
        chex.assert_trees_all_equal(updates["list"], jax.tree.map(lambda g: -0.5 * g, gradients["list"]))
        if name in TRACKING:
            chex.assert_trees_all_equal(positions(state)["dense"], positions(alone_state)["dense"])

    def test_multi_steps(self, tx):
        accumulated = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
        # The mean of two equal gradients: exact.
        chex.assert_trees_all_close(self.steps(accumulated, n=6), self.steps(tx, n=3), rtol=1e-5)
        chex.assert_trees_all_equal(self.steps(accumulated, n=5)[1], self.steps(accumulated, n=4)[1])

    def test_apply_if_finite(self, tx):
        guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
        chex.assert_trees_all_close(self.steps(guarded), self.steps(tx), rtol=1e-5)
        params, gradients = params_and_gradients()
        _, state = guarded.update(gradients, guarded.init(params), params)
        updates, after = guarded.update(jax.tree.map(lambda g: g * jnp.nan, gradients), state, params)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
        chex.assert_trees_all_equal(positions(after), positions(state))

    def test_extra_arguments_pass_by(self, tx):
        chex.assert_trees_all_equal(self.steps(tx, value=jnp.float32(3.0), anything="at all"), self.steps(tx))
        assert isinstance(tx, optax.GradientTransformationExtraArgs)

    def test_mask_of_the_weight_decay(self):
        params, gradients = params_and_gradients()
        kernels = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)  # noqa: E731
        masked = ag.manifold_adamw(1e-2, weight_decay=0.5, mask=kernels)
        updates, _ = masked.update(gradients, masked.init(params), params)
        decayed, free = (
            tx.update(gradients, tx.init(params), params)[0]
            for tx in (ag.manifold_adamw(1e-2, weight_decay=0.5), ag.manifold_adamw(1e-2, weight_decay=0.0))
        )
        chex.assert_trees_all_equal(updates["dense"]["kernel"], decayed["dense"]["kernel"])
        chex.assert_trees_all_equal(updates["list"][0], free["list"][0])
        assert not np.array_equal(decayed["list"][0], free["list"][0])

    def test_mu_dtype(self):
        params, gradients = params_and_gradients()
        tx = ag.manifold_adamw(1e-2, mu_dtype=jnp.bfloat16)
        _, state = tx.update(gradients, tx.init(params), params)
        assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "mu"))} == {jnp.dtype("bfloat16")}


class TestInjectHyperparams:
    """Every number may become an array, the learning rate a schedule, and a format stays a string or a FloatFormat."""

    def final(self, tx, n=4):
        params, gradients = params_and_gradients()
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(n):
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    @pytest.mark.parametrize("format", [None, "float8_e4m3fn", ag.as_format("E3M4")])
    def test_of_manifold_adamw(self, format):
        injected = optax.inject_hyperparams(ag.manifold_adamw)(learning_rate=1e-2, format=format, weight_decay=0.1)
        params, state = self.final(injected)
        plain, _ = self.final(ag.manifold_adamw(1e-2, format=format, weight_decay=0.1))
        chex.assert_trees_all_close(params, plain, rtol=1e-5)
        assert {"learning_rate", "b1", "b2", "eps", "weight_decay", "max_stiffness"} <= set(state.hyperparams)

    def test_of_a_schedule(self):
        schedule = optax.cosine_decay_schedule(1e-2, 4)
        injected = optax.inject_hyperparams(ag.manifold_adamw)(learning_rate=schedule)
        params, state = self.final(injected)
        np.testing.assert_allclose(state.hyperparams["learning_rate"], schedule(3), rtol=1e-6)
        chex.assert_trees_all_close(params, self.final(ag.manifold_adamw(schedule))[0], rtol=1e-5)

    def test_of_the_stiffness(self):
        injected = optax.inject_hyperparams(ag.stiffness_precondition)(
            mantissa_bits=4, zero_stiffness=0.5, max_stiffness=0.1
        )
        plain = ag.stiffness_precondition(4, zero_stiffness=0.5, max_stiffness=0.1)
        params, gradients = params_and_gradients()
        actual, state = injected.update(gradients, injected.init(params), params)
        chex.assert_trees_all_equal(actual, plain.update(gradients, optax.EmptyState(), params)[0])
        state.hyperparams["mantissa_bits"] = jnp.int32(6)
        changed, _ = injected.update(gradients, state, params)
        other = ag.stiffness_precondition(6, zero_stiffness=0.5, max_stiffness=0.1)
        chex.assert_trees_all_equal(changed, other.update(gradients, optax.EmptyState(), params)[0])

    def test_of_the_tracker(self):
        params, state = self.final(optax.inject_hyperparams(ag.track_ulp_position)(format="E4M3"))
        chex.assert_trees_all_equal_shapes(optax.tree.get(state, "ulp_position"), params)

    def test_with_mu_dtype_as_a_static_argument(self):
        injected = optax.inject_hyperparams(ag.manifold_adamw, static_args=("mu_dtype", "mask"))
        _, state = self.final(
            injected(learning_rate=1e-2, mu_dtype=jnp.bfloat16, mask=lambda p: jax.tree.map(jnp.ndim, p))
        )
        assert optax.tree.get(state, "mu")["scalar"].dtype == jnp.bfloat16
