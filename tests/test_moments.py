"""compress_state: moments in one byte, unbiased and never frozen; all else as the inner transformation left it."""

from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import altgrad_jax as ag
from altgrad_jax.moments import FIRST, SECOND

RMS = optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)


def second_moments():
    """Every nonnegative number of an unsigned format with 5 exponent and 3 mantissa bits, by index; 255 is NaN."""
    subnormal = [Fraction(k, 8) * Fraction(2) ** -30 for k in range(8)]
    normal = [(1 + Fraction(k % 8, 8)) * Fraction(2) ** (k // 8 - 31) for k in range(8, 255)]
    return [float(number) for number in subnormal + normal]


def gradient(seed=0, shape=(64, 96)):
    """Gradients whose rows differ by orders of magnitude."""
    rows = jnp.exp2(jax.random.randint(jax.random.key(99), (shape[0], 1), -20, 4))
    return rows * jax.random.normal(jax.random.key(seed), shape)


class TestEncoding:
    """A second moment has eight bits without a sign, a first one the 127 numbers of E3M4 and a sign."""

    def test_every_index_of_a_second_moment(self):
        index = jnp.arange(256, dtype=jnp.uint8)[None]
        numbers = ag.GridArray(index, jnp.full((1, 1), 4.0), SECOND, 0).value()
        np.testing.assert_array_equal(numbers[0], [4 * number for number in second_moments()] + [np.nan])

    def test_of_the_initial_state_is_the_nearest(self):
        tx = ag.compress_state(optax.scale_by_rms(initial_scale=0.3), min_size=1)
        stored = tx.init(jnp.ones((2, 3))).inner_state.nu
        assert stored.index.dtype == jnp.uint8
        np.testing.assert_array_equal(stored.value(), np.full((2, 3), 0.3125))

    @pytest.mark.parametrize("step", [0, 3, 64, 100])
    def test_rounds_to_a_neighbour_without_bias(self, step):
        """Over 128 seeds the mean is the moment; every result is one of the two numbers next to it."""
        tx = lambda seed: ag.compress_state(RMS, min_size=1, seed=seed)  # noqa: E731
        g, params = gradient(), jnp.ones((64, 96))
        state = tx(0).init(params)
        _, state = tx(0).update(gradient(1), state, params)
        state = state._replace(moment_step=jnp.uint32(step))
        _, inner = RMS.update(g, state.inner_state._replace(nu=state.inner_state.nu.value()))
        exact = np.asarray(inner.nu, np.float64)
        after = jax.jit(jax.vmap(lambda seed: tx(seed).update(g, state, params)[1].inner_state.nu))(jnp.arange(128))
        scale = np.asarray(after.scale, np.float64)
        assert (scale == scale[0]).all()
        values, grid = np.asarray(after.value(), np.float64), np.array(second_moments())
        low = np.searchsorted(grid, exact / scale[0], side="right") - 1
        neighbours = np.stack([grid[low], grid[np.minimum(low + 1, 254)]]) * scale[0]
        assert np.isin(low, range(1, 254)).mean() > 0.9
        assert ((values == neighbours[0]) | (values == neighbours[1])).all()
        gap = np.maximum(neighbours[1] - neighbours[0], 1e-300)
        bias = ((values.mean(axis=0) - exact) / gap)[low >= 1]  # Each with a standard deviation of at most 0.044.
        assert abs(bias.mean()) < 5 * 0.044 / np.sqrt(bias.size)
        assert abs(bias).max() < 6 * 0.044

    def test_of_a_first_moment_is_on_its_grid(self):
        tx = ag.compress_state(optax.trace(0.9), min_size=1)
        _, state = tx.update(gradient(), tx.init(gradient()), None)
        trace = state.inner_state.trace
        assert (trace.format, trace.index.dtype) == (FIRST, jnp.int8)
        unit = ag.spacing(gradient() / trace.scale, "E3M4") * trace.scale
        assert float(jnp.max(jnp.abs(trace.value() - gradient()) / unit)) < 1


class TestSecondMoment:
    """It moves by a thousandth of itself per step, never reaches 0, and cannot be negative."""

    def test_does_not_freeze(self):
        """From 4.0 towards 1.15 with a decay of 0.999: nearest would stay at 4.0."""
        tx = ag.compress_state(optax.scale_by_rms(0.999, initial_scale=4.0), min_size=1)
        params = jnp.ones((32, 128))
        g = jnp.full((32, 128), 1.15**0.5)
        step = lambda state, _: (tx.update(g, state, params)[1], None)  # noqa: E731
        state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=3000))(tx.init(params))
        nu = np.asarray(state.inner_state.nu.value())
        expected = 1.15 + (4.0 - 1.15) * 0.999**3000
        assert abs(nu.mean() - expected) < 5 * nu.std() / 64  # 4096 independent elements.
        assert nu.std() < 0.35 * expected

    def test_never_becomes_zero(self):
        """In a row that reaches over 60 orders of magnitude, what float32 can hold at all is positive."""
        g = jnp.asarray(10.0 ** -np.linspace(0, 30, 128, dtype=np.float32))[None] * jnp.ones((4, 1))
        tx = ag.compress_state(optax.scale_by_rms(0.999), min_size=1)
        state = tx.init(g)
        for _ in range(3):
            _, state = tx.update(g, state, None)
            nu = state.inner_state.nu
            positive = np.asarray(1e-3 * g.astype(jnp.float32) ** 2) >= 2.0**-126
            assert (nu.value() > 0)[positive].all()
        _, state = tx.update(0 * g, tx.init(g), None)
        assert not state.inner_state.nu.index.any()

    def test_of_tiny_gradients(self):
        """Where the square of the gradient nearly underflows, the scale stays a normal number."""
        g = jnp.full((4, 8), 2.0**-58)
        tx = ag.compress_state(optax.scale_by_rms(0.5), min_size=1)
        _, state = tx.update(g, tx.init(g), None)
        nu = state.inner_state.nu
        assert (nu.value() > 0).all()
        assert (nu.scale >= 2.0**-126).all()

    def test_that_is_negative_becomes_nan(self):
        tx = ag.compress_state(optax.trace(0.9), first=(), second=("trace",), min_size=1)
        g = jnp.array([[1.0, -1.0]])
        _, state = tx.update(g, tx.init(g), None)
        np.testing.assert_array_equal(jnp.isnan(state.inner_state.trace.value()), [[False, True]])

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_that_is_not_finite_is_nan_and_leaves_its_row_alone(self, bad):
        tx = ag.compress_state(optax.scale_by_adam(), min_size=1)
        g = gradient().at[3, 5].set(bad)
        state = tx.init(g)
        for _ in range(3):
            updates, state = tx.update(g, state, None)
        expected = np.zeros(g.shape, bool)
        expected[3, 5] = True
        for moment in (state.inner_state.mu, state.inner_state.nu):
            np.testing.assert_array_equal(jnp.isnan(moment.value()), expected)
        np.testing.assert_array_equal(jnp.isnan(updates), expected)


class TestScales:
    """Powers of two per row, chosen anew at 0, 1, 2, 4, ..., 32 steps and then every 64."""

    def updated(self, gradients, start=0):
        tx = ag.compress_state(optax.scale_by_adam(), min_size=1)
        params = jnp.ones(gradients[0].shape)
        state = tx.init(params)._replace(moment_step=jnp.uint32(start))
        for g in gradients:
            _, state = jax.jit(tx.update)(g, state, params)
        return state

    def test_leave_headroom_per_row(self):
        state = self.updated([gradient()])
        for moment, headroom in ((state.inner_state.mu, 4), (state.inner_state.nu, 256)):
            mantissa, _ = np.frexp(moment.scale)
            assert (mantissa == 0.5).all()
            chex.assert_shape(moment.scale, (64, 1))
            share = np.abs(moment.value()).max(axis=1, keepdims=True) * headroom / (moment.scale * moment.format.max)
            assert (share <= 1 + 1 / 8).all()
            assert (share > 0.4).all()

    def test_change_only_at_a_look(self):
        g = jnp.ones((2, 4))
        before, between, at = (self.updated([g] + [2.0**-12 * g] * k, start=60) for k in (0, 3, 4))
        chex.assert_trees_all_equal(between.inner_state.nu.scale, before.inner_state.nu.scale)
        assert (at.inner_state.mu.scale < before.inner_state.mu.scale).all()

    def test_count_what_saturates_in_between(self):
        g = jnp.ones((2, 4))
        state = self.updated([g, 1000 * g, 1000 * g], start=64)
        assert (state.inner_state.mu.index == 127).all()
        assert int(state.saturated) == 0
        _, counted = ag.compress_state(optax.scale_by_adam(), min_size=1).update(
            g, state._replace(moment_step=jnp.uint32(128)), jnp.ones((2, 4))
        )
        assert int(counted.saturated) == 16

    def test_of_a_row_without_gradient_is_that_of_the_largest(self):
        state = self.updated([jnp.array([[1.0, 2.0], [0.0, 0.0]])])
        for moment in (state.inner_state.mu, state.inner_state.nu):
            assert moment.scale[0] == moment.scale[1]


PARAMS = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4), "deep": [{"mu": jnp.ones((4, 8))}]}


class TestLeaves:
    """Moments of the shapes of parameters under the named fields, floating and large enough; nothing else."""

    def compressed(self, tx, params=None, **arguments):
        state = ag.compress_state(tx, **{"min_size": 32} | arguments).init(PARAMS if params is None else params)
        found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda leaf: isinstance(leaf, ag.GridArray))
        return [jax.tree_util.keystr(path) for path, leaf in found if isinstance(leaf, ag.GridArray)]

    def test_of_adam(self):
        assert self.compressed(optax.adam(1e-3)) == [
            f".inner_state[0].{moment}[{leaf}]" for moment in ("mu", "nu") for leaf in ("'deep'][0]['mu'", "'kernel'")
        ]

    def test_below_the_smallest_size(self):
        assert len(self.compressed(optax.adam(1e-3), min_size=4)) == 6
        assert not self.compressed(optax.adam(1e-3), min_size=33)

    def test_under_masks_partitions_and_injection(self):
        mask = {"kernel": True, "bias": True, "deep": False}
        assert len(self.compressed(optax.masked(optax.adam(1e-3), mask))) == 2
        labels = {"kernel": "a", "bias": "b", "deep": "b"}
        assert len(self.compressed(optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(0.1, 0.9)}, labels))) == 3
        assert len(self.compressed(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3))) == 4

    def test_of_on_grid(self):
        tx = ag.on_grid(RMS, feedback="momentum")
        assert len(self.compressed(tx, ag.to_grid(PARAMS))) == 4

    def test_of_other_names(self):
        assert len(self.compressed(optax.adan(1e-3), first=("m", "v"), second=("n",))) == 6
        assert self.compressed(optax.adam(1e-3), first=()) == [
            ".inner_state[0].nu['deep'][0]['mu']",
            ".inner_state[0].nu['kernel']",
        ]

    def test_of_no_parameters(self):
        assert not self.compressed(optax.adam(1e-3), {})

    def test_that_are_small_are_what_the_inner_transformation_makes_of_them(self):
        tx, adam = ag.compress_state(optax.adam(1e-2), min_size=32), optax.adam(1e-2)
        g = jax.tree.map(lambda p: 0.1 * p, PARAMS)
        state, plain = tx.init(PARAMS), adam.init(PARAMS)
        for _ in range(3):
            updates, state = tx.update(g, state, PARAMS)
            expected, plain = adam.update(g, plain, PARAMS)
        chex.assert_trees_all_equal(updates["bias"], expected["bias"])
        chex.assert_trees_all_equal(state.inner_state[0].nu["bias"], plain[0].nu["bias"])
        chex.assert_trees_all_close(updates["kernel"], expected["kernel"], rtol=0.15)

    def test_sees_the_extra_arguments(self):
        tx = ag.compress_state(optax.chain(optax.trace(0.9), optax.polyak_sgd(1.0)), min_size=1)
        g = jnp.ones((4, 8))
        halves = [tx.update(g, tx.init(g), g, value=jnp.float32(value))[0] for value in (2.0, 1.0)]
        chex.assert_trees_all_close(halves[0], 2 * halves[1], rtol=1e-6)


class TestNnxOptimizer:
    """flax.nnx.Optimizer keeps the leaves of a GridArray in a mapping of its own, from the second update on."""

    @pytest.mark.parametrize("stored", [False, True])
    def test_trains(self, stored):
        model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        if stored:
            nnx.update(model, ag.to_grid(nnx.state(model, nnx.Param)))
        tx = optax.adamw(3e-2)
        tx = ag.compress_state(ag.on_grid(tx) if stored else tx, min_size=1)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        x = jax.random.normal(jax.random.key(0), (32, 16))

        @nnx.jit
        def step(model, optimizer):
            graphdef, params = nnx.split(model, nnx.Param)
            loss = lambda values: jnp.mean((nnx.merge(graphdef, values)(x) - x) ** 2)  # noqa: E731
            value, gradients = jax.value_and_grad(loss)(ag.from_grid(params))
            optimizer.update(model, gradients)
            return value

        losses = [float(step(model, optimizer)) for _ in range(30)]
        assert losses[-1] < 0.5 * losses[0]
        assert int(optax.tree.get(nnx.as_pure(optimizer.opt_state), "moment_step")) == 30


class TestBytes:
    """Parameters and optimizer state of a model of ten million weights, scales included."""

    def model(self):
        """A decoder of width 384 and 6 layers with a vocabulary of 512, as shapes."""
        shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        block = {"qkv": shape(384, 1152), "out": shape(384, 384), "up": shape(384, 1536), "down": shape(1536, 384)}
        biases = {"b": shape(1536), "norm": shape(768)}
        return {"embed": shape(512, 384), "blocks": [block | biases] * 6, "head": shape(384, 512)}

    @pytest.mark.parametrize(("fraction_bits", "feedback", "limit"), [(0, "momentum", 3.13), (8, None, 4.13)])
    def test_of_grid_adamw(self, fraction_bits, feedback, limit):
        params = jax.eval_shape(lambda p: ag.to_grid(p, fraction_bits=fraction_bits), self.model())
        state = jax.eval_shape(ag.grid_adamw(1e-3, feedback=feedback).init, params)
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.model()))
        assert weights > 10e6
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
        assert stored / weights <= limit


class TestBadInput:
    """Refused where it can first be known."""

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"first": "mu"}, TypeError, "first must be a sequence of names of state fields, got 'mu'"),
            ({"second": (1,)}, TypeError, r"second must be a sequence of names of state fields, got \(1,\)"),
            ({"first": ("nu",)}, ValueError, r"must not share names, got \['nu'\] in both"),
            ({"seed": -1}, ValueError, r"seed must be in \[0, 4294967295\], got -1"),
            ({"seed": 0.5}, ValueError, "seed must be an integer"),
            ({"min_size": -1}, ValueError, r"min_size must be in \[0, inf\), got -1"),
        ],
    )
    def test_of_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            ag.compress_state(optax.adam(1e-3), **arguments)

    def test_without_moments(self):
        with pytest.raises(ValueError, match=r"no moments .* which has \['g', 'm', 'n', 't', 'v'\]: name them"):
            ag.compress_state(optax.chain(optax.scale_by_adan())).init(jnp.ones((8, 8)))

    def test_compressed_twice(self):
        tx = ag.compress_state(ag.compress_state(optax.adam(1e-3), min_size=1))
        with pytest.raises(ValueError, match="found GridArrays in the state of the inner transformation"):
            tx.init(jnp.ones((8, 8)))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"moments": "4bit"}, "moments must be '8bit' or 'float32', got '4bit'"),
            ({"b1": 0.0}, r"b1 must be in \(0, 1\), got 0.0"),
            ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
            ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1.0"),
            ({"rounding": "up"}, "rounding must be 'stochastic' or 'nearest', got 'up'"),
            ({"feedback": "error"}, "feedback must be None or 'momentum', got 'error'"),
        ],
    )
    def test_of_grid_adamw(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ag.grid_adamw(**{"learning_rate": 1e-3} | arguments)
