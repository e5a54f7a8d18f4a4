"""grid_adamw: its chain, its bytes, its arguments."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from quick import some

import altgrad_jax as ag
from altgrad_jax.factored import scale_by_factored_rms


class TestBytes:
    """Parameters and optimizer state of a model of ten million weights, scales included."""

    def model(self):
        """A decoder of width 384 and 6 layers with a vocabulary of 512, as shapes."""
        shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        block = {"qkv": shape(384, 1152), "out": shape(384, 384), "up": shape(384, 1536), "down": shape(1536, 384)}
        biases = {"b": shape(1536), "norm": shape(768)}
        return {"embed": shape(512, 384), "blocks": [block | biases] * 6, "head": shape(384, 512)}

    @pytest.mark.parametrize(
        ("second_moment", "fraction_bits", "b1", "expected"),
        [
            ("factored", 0, 0.9, 2.03),
            ("factored", 8, 0.0, 2.02),
            ("factored", 8, 0.9, 3.03),
            ("factored", 0, 0.0, 1.02),
            ("8bit", 0, 0.9, 3.02),
            ("8bit", 8, 0.0, 3.01),
            ("8bit", 8, 0.9, 4.02),
        ],
    )
    def test_of_recipes(self, second_moment, fraction_bits, b1, expected):
        params = jax.eval_shape(lambda p: ag.to_grid(p, fraction_bits=fraction_bits), self.model())
        state = jax.eval_shape(ag.grid_adamw(1e-3, b1, second_moment=second_moment).init, params)
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.model()))
        assert weights > 10e6
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
        assert stored / weights == pytest.approx(expected, abs=0.01)

    def test_of_adamw_in_its_own_order(self):
        params = jax.eval_shape(lambda p: ag.to_grid(p, fraction_bits=8), self.model())
        state = jax.eval_shape(ag.compress_state(ag.on_grid(optax.adamw(1e-3))).init, params)
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
        assert stored / sum(leaf.size for leaf in jax.tree.leaves(self.model())) == pytest.approx(4.02, abs=0.01)

    def test_at_a_billion(self):
        """20 stacked layers, 2048 wide."""
        shape = lambda *shape: jax.ShapeDtypeStruct((20, *shape), jnp.float32)  # noqa: E731
        layers = {
            "qkv": shape(2048, 6144),
            "out": shape(2048, 2048),
            "up": shape(2048, 8192),
            "down": shape(8192, 2048),
        }
        params = ag.to_grid(layers | {"norms": {"scale": shape(2, 2048)}})
        state = jax.eval_shape(ag.grid_adamw(1e-3).init, params)
        weights = sum(leaf.size for leaf in jax.tree.leaves(layers))
        assert weights > 1e9
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state))) / weights <= 2.02

    @pytest.mark.parametrize(
        ("second_moment", "b1", "fraction_bits", "limit"),
        [("factored", 0.9, 0, 2.04), ("factored", 0.0, 0, 1.04), ("factored", 0.9, 8, 3.04), ("8bit", 0.9, 0, 3.02)],
    )
    def test_of_rows_as_short_as_a_head(self, second_moment, b1, fraction_bits, limit):
        """Rows of 64 numbers have one exponent in each array, and one mean in a factored second moment."""
        shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        heads = {name: shape(768, 12, 64) for name in ("query", "key", "value")}
        block = heads | {
            "out": shape(12, 64, 768),
            "up": shape(768, 3072),
            "down": shape(3072, 768),
            "norm": shape(768),
        }
        params = {"embed": shape(5000, 768), "block": block}
        stored = jax.eval_shape(lambda p: ag.to_grid(p, fraction_bits=fraction_bits), params)
        state = jax.eval_shape(ag.grid_adamw(1e-3, b1, second_moment=second_moment).init, stored)
        count = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
        assert count((stored, state)) / sum(leaf.size for leaf in jax.tree.leaves(params)) <= limit


class TestUniformFormats:
    """The numbers of E1M6 are four times those of E0M7, so that four times the scale makes them the same."""

    @pytest.mark.parametrize("b1", [0.0, 0.9])
    def test_train_to_the_same_bits(self, b1):
        key = jax.random.key(0)
        x = jax.random.normal(key, (16, 8)) * jnp.exp2(jnp.arange(-8.0, 8))[:, None]
        tx = ag.grid_adamw(0.3, b1, 0.99, weight_decay=0.5)

        @jax.jit
        def step(params, state, key):
            updates, state = tx.update(1 + jax.random.normal(key, x.shape), state, params)
            return optax.apply_updates(params, updates), state

        one, two = start = [ag.to_grid(x, name) for name in ("E0M7", "E1M6")]
        states = [tx.init(params) for params in start]
        for own in jax.random.split(key, 20):
            pairs = [step(params, state, own) for params, state in zip((one, two), states, strict=True)]
            (one, two), states = zip(*pairs, strict=True)
        chex.assert_trees_all_equal(one.index, two.index)
        chex.assert_trees_all_equal(one.exponent, two.exponent + 2)
        momenta = [ag.from_grid(state.momentum) for state in states]
        if b1:
            chex.assert_trees_all_equal(*momenta)
        assert (one.exponent > start[0].exponent).any()
        assert (one.exponent < start[0].exponent).any()


class TestChain:
    """Its chain, argument for argument."""

    ARGUMENTS = (0.02, 0.8, 0.95, 1e-3, 0.3)

    def run(self, tx):
        draw = lambda seed: jax.random.normal(jax.random.key(seed), (64, 64))  # noqa: E731
        params = ag.to_grid({"kernel": draw(0), "bias": draw(1)[0]})
        state, update = tx.init(params), jax.jit(tx.update)
        for seed in range(3):
            gradients = {"kernel": draw(seed), "bias": draw(seed)[1]}
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    @pytest.mark.parametrize("second_moment", ["factored", "8bit", "float32"])
    @pytest.mark.parametrize("b1", [0.8, 0.0])
    def test_is_the_chain(self, second_moment, b1):
        learning_rate, _, b2, eps, decay = self.ARGUMENTS
        mask = {"kernel": True, "bias": False}
        whole = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
        inner = optax.chain(
            scale_by_factored_rms(b2, eps) if second_moment == "factored" else whole,
            optax.add_decayed_weights(decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
        chain = ag.on_grid(inner, momentum=b1 or None, seed=7)
        if second_moment == "8bit":
            chain = ag.compress_state(chain, seed=7)
        tx = ag.grid_adamw(learning_rate, b1, b2, eps, decay, second_moment=second_moment, seed=7, mask=mask)
        chex.assert_trees_all_equal(self.run(tx), self.run(chain))

    def test_has_a_factored_second_moment_by_default(self):
        tx, default = ag.grid_adamw(*self.ARGUMENTS, second_moment="factored"), ag.grid_adamw(*self.ARGUMENTS)
        chex.assert_trees_all_equal(self.run(tx), self.run(default))

    def test_of_another_seed_draws_other_bits(self):
        results = [self.run(ag.grid_adamw(*self.ARGUMENTS, seed=seed))[0]["kernel"].index for seed in (0, 1)]
        assert (results[0] != results[1]).any()

    @pytest.mark.parametrize("second_moment", some(["factored", "8bit"], "factored".__eq__))
    def test_compiled_mapped_and_injected_is_the_eager_one(self, second_moment):
        """Bit for bit."""
        stack = jax.vmap(ag.to_grid)(jax.random.normal(jax.random.key(0), (2, 64, 64)))
        gradients = jax.random.normal(jax.random.key(1), (2, 64, 64))
        one, gradient = jax.tree.map(lambda x: x[1], (stack, gradients))

        def steps(tx, params, gradient):
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(gradient, state, params)
                params = optax.apply_updates(params, updates)
            return params

        tx = ag.grid_adamw(*self.ARGUMENTS, second_moment=second_moment)
        eager = steps(tx, one, gradient)
        chex.assert_trees_all_equal(eager, jax.jit(lambda *leaves: steps(tx, *leaves))(one, gradient))
        mapped = jax.vmap(lambda *leaves: steps(tx, *leaves))(stack, gradients)
        chex.assert_trees_all_equal(eager, jax.tree.map(lambda x: x[1], mapped))
        names = ("learning_rate", "b1", "b2", "eps", "weight_decay")
        numbers = dict(zip(names, self.ARGUMENTS, strict=True))
        injected = optax.inject_hyperparams(ag.grid_adamw, hyperparam_dtype=jnp.float32)
        injected = injected(**numbers, second_moment=second_moment)
        agreement = steps(injected, one, gradient).index == eager.index
        assert float(agreement.mean()) > 0.999  # Numbers that are not constants: the last bit of a quotient.

    @pytest.mark.slow
    @pytest.mark.parametrize("axis", [0, 1])
    def test_on_two_devices(self, axis):
        """Means over a sharded axis differ in their last bits, so that a few elements round differently."""
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        params = ag.to_grid(jax.random.normal(jax.random.key(0), (256, 128)))
        gradient = jax.random.normal(jax.random.key(1), params.shape)
        tx = ag.grid_adamw(0.02)

        @jax.jit
        def step(params, gradient):
            updates, state = tx.update(gradient, tx.init(params), params)
            return optax.apply_updates(params, updates), state

        def placed(leaf):
            spec = [None, None]
            spec[axis] = "d" if leaf.shape[axis] > 1 else None
            return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

        (one, state), (two, other) = step(params, gradient), step(*jax.tree.map(placed, (params, gradient)))
        assert float((one.index != two.index).mean()) < 1e-3
        chex.assert_trees_all_close(state.inner_state[0], other.inner_state[0], rtol=1e-6)
        chex.assert_trees_all_equal((one.exponent, state.exponent), (two.exponent, other.exponent))


class TestBadInput:
    """Refused as early as possible."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"second_moment": "4bit"}, "second_moment must be 'factored', '8bit' or 'float32', got '4bit'"),
            ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
            ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
            ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1.0"),
        ],
    )
    def test_of_grid_adamw(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ag.grid_adamw(**{"learning_rate": 1e-3} | arguments)

    def test_of_numbers_that_became_integers(self):
        """Optax gives them the dtype of the first leaf, in which a learning rate of 0.01 is 0."""
        tx = optax.inject_hyperparams(ag.grid_adamw)(learning_rate=1e-2)
        with pytest.raises(TypeError, match=r"learning_rate must be a floating number, got an array of int8.*float32"):
            tx.init(ag.to_grid(jnp.ones((8, 8))))
