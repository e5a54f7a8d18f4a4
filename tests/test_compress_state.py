"""compress_state: moments in one byte, unbiased and never frozen; the rest as the inner transformation left it."""

from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import altgrad_jax as ag
from altgrad_jax.compress_state import FIRST, SECOND

RMS = optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)


def second_moments():
    """Every nonnegative number of an unsigned format with 5 exponent and 3 mantissa bits, by index; 255 is NaN."""
    subnormal = [Fraction(k, 8) * Fraction(2) ** -30 for k in range(8)]
    normal = [(1 + Fraction(k % 8, 8)) * Fraction(2) ** (k // 8 - 31) for k in range(8, 255)]
    return [float(number) for number in subnormal + normal]


def gradient(seed=0, shape=(64, 96)):
    """Gradients whose rows differ by orders of magnitude."""
    rows = jnp.exp2(jax.random.randint(jax.random.key(99), (shape[0], 1), -6, 4))
    return rows * jax.random.normal(jax.random.key(seed), shape)


class TestEncoding:
    """A second moment has eight bits without a sign, a first one the 127 numbers of E4M3 and a sign."""

    def test_every_index_of_a_second_moment(self):
        index = jnp.arange(256, dtype=jnp.uint8)[None]
        numbers = ag.GridArray(index, jnp.full((1, 1), 2, jnp.int8), SECOND, 0).value()
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
        assert np.isin(low, range(1, 254)).mean() > 0.99
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
        unit = ag.spacing(gradient() / trace.scale, "E4M3") * trace.scale
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
        assert 0.1 < nu.std() / expected < 0.2  # "Scatters by a tenth to a fifth."

    def test_never_becomes_zero(self):
        """In a row over 60 orders of magnitude, every moment that float32 can hold is positive."""
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
        g = jnp.array([[2.0**-45, 2.0**-61]])  # The square of the smaller one is 2**-122.
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

    def test_that_is_nan_leaves_its_row_alone(self):
        tx = ag.compress_state(optax.scale_by_adam(), min_size=1)
        g = gradient().at[3, 5].set(np.nan)
        state = tx.init(g)
        for _ in range(3):
            updates, state = tx.update(g, state, None)
        expected = np.zeros(g.shape, bool)
        expected[3, 5] = True
        for moment in (state.inner_state.mu, state.inner_state.nu):
            np.testing.assert_array_equal(jnp.isnan(moment.value()), expected)
        np.testing.assert_array_equal(jnp.isnan(updates), expected)

    @pytest.mark.parametrize("large", [1e19, 2e19, 1e30, 3e38])
    def test_of_a_gradient_whose_square_is_infinite_saturates(self, large):
        g = gradient()
        tx = ag.compress_state(optax.scale_by_adam(), min_size=1)
        state = tx.init(g)
        for i in range(40):
            updates, state = jax.jit(tx.update)(g.at[3, 5].set(large) if i == 3 else g, state, None)
            chex.assert_tree_all_finite(updates)
        chex.assert_tree_all_finite((state.inner_state.mu.value(), state.inner_state.nu.value()))


class TestExponents:
    """One for every row, which follows its largest element, one step behind and bounded."""

    def updated(self, gradients, tx=None):
        tx = ag.compress_state(optax.scale_by_adam() if tx is None else tx, min_size=1)
        params = jnp.ones(gradients[0].shape)
        state = tx.init(params)
        for g in gradients:
            _, state = jax.jit(tx.update)(g, state, params)
        return state

    def test_of_the_first_gradient_fit_in_the_same_step(self):
        g = gradient() * jnp.exp2(jnp.arange(64.0) - 32)[:, None]
        state = self.updated([g])
        np.testing.assert_allclose(state.inner_state.mu.value(), 0.1 * g, rtol=0.126, atol=1e-4 * np.abs(g).max())
        np.testing.assert_allclose(state.inner_state.nu.value(), 1e-3 * g**2, rtol=0.126, atol=1e-8 * np.max(g) ** 2)
        assert state.inner_state.mu.exponent.shape == (64, 1)
        assert len(np.unique(state.inner_state.mu.exponent)) > 30

    @pytest.mark.parametrize("pause", [10, 1000])
    def test_of_a_first_gradient_that_comes_late(self, pause):
        g = jnp.ones((2, 8)).at[1].set(0)
        tx = ag.compress_state(optax.scale_by_adam(), min_size=1)
        state = tx.init(g)
        step = jax.jit(lambda state: jax.lax.scan(lambda s, _: (tx.update(g, s, g)[1], None), state, length=pause)[0])
        _, state = tx.update(g.at[1].set(1e-3), step(state), g)
        np.testing.assert_allclose(state.inner_state.mu.value()[1], 1e-4, rtol=0.126)
        np.testing.assert_allclose(state.inner_state.nu.value()[1], 1e-9, rtol=0.126)

    def test_of_the_largest_finite_numbers(self):
        """Headroom must not overflow."""
        for tx, g in ((optax.trace(0.9), 2.0**127), (optax.scale_by_rms(0.9, eps_in_sqrt=False), 2.0**62)):
            g = jnp.array([[g, g / 2]])
            tx = ag.compress_state(tx, min_size=1)
            updates, state = tx.update(g, tx.init(g), None)
            chex.assert_tree_all_finite((updates, state.inner_state[0].value()))

    def test_grow_by_a_bounded_number_of_binades(self):
        g = jnp.ones((2, 8))
        before, after = (self.updated([g] * 4 + [g.at[0, 0].set(1e8)] * k + [g]) for k in (0, 1))
        for moment, most in (("mu", 7), ("nu", 14)):
            grown = getattr(after.inner_state, moment).exponent - getattr(before.inner_state, moment).exponent
            assert int(grown[0, 0]) == most
            assert int(grown[1, 0]) == 0

    def test_shrink_slowly(self):
        """After a pause of thousands of steps the next gradients count as in float32."""
        g = jnp.ones((2, 4))
        tx = ag.compress_state(optax.scale_by_adam(b2=0.9), min_size=1)
        step = lambda state, _: (tx.update(jnp.zeros((2, 4)), state, g)[1], None)  # noqa: E731
        end = jax.jit(lambda state: jax.lax.scan(step, state, length=961)[0])(tx.update(g, tx.init(g), g)[1])
        assert not end.inner_state.mu.index.any()  # All forgotten, and yet:
        _, burst = tx.update(g, end, g)
        np.testing.assert_allclose(burst.inner_state.mu.value(), 0.1, rtol=0.13)
        np.testing.assert_allclose(burst.inner_state.nu.value(), 0.1, rtol=0.13)

    @pytest.mark.parametrize("gap", [40, 300])
    @pytest.mark.parametrize("b2", [0.999, 0.95])
    def test_keep_the_signal_of_rows_with_rare_gradients(self, gap, b2):
        """As in the embedding of a rare character: half of the rows have a gradient once in `gap` steps."""
        g = 1 + 0.1 * jax.random.normal(jax.random.key(0), (8, 32))
        rare = jnp.arange(8)[:, None] < 4

        def final(tx):
            def step(carry, i):
                params, state, largest = carry
                updates, state = tx.update(jnp.where(rare & (i % gap != 7), 0, g), state, params)
                largest = jnp.maximum(largest, jnp.abs(updates).max())
                return (optax.apply_updates(params, updates), state, largest), None

            params = jnp.zeros((8, 32))
            carry = params, tx.init(params), 0.0
            (params, _, largest), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(1000)))(carry)
            return float(jnp.mean(params[:4])), float(largest)

        adam = optax.adam(1e-3, b2=b2)
        (moved, largest), (expected, bound) = final(ag.compress_state(adam, min_size=1)), final(adam)
        np.testing.assert_allclose(moved, expected, rtol=0.05)
        assert largest < 2 * bound


def is_moment(leaf):
    return isinstance(leaf, ag.GridArray)


PARAMS = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4), "deep": [{"mu": jnp.ones((4, 8))}]}


class TestDerivatives:
    """Through a step, such as those of a loss after some steps with respect to a learning rate."""

    def test_are_those_of_float32_within_the_rounding(self):
        start, goal = gradient(1), gradient(2)

        def after(rate, tx):
            params, state = start, tx.init(start)
            for _ in range(3):
                updates, state = tx.update(params - goal, state, params)
                params = optax.apply_updates(params, rate * updates)
            return jnp.mean((params - goal) ** 2)

        adam = optax.scale_by_adam()
        ours = jax.grad(lambda rate: after(rate, ag.compress_state(adam, min_size=1)))(-0.01)
        np.testing.assert_allclose(ours, jax.grad(lambda rate: after(rate, adam))(-0.01), rtol=0.1)


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
        tx = ag.on_grid(RMS, momentum=0.9)
        assert len(self.compressed(tx, ag.to_grid(PARAMS))) == 4  # Two of them the momentum of on_grid.

    def test_of_other_names(self):
        assert len(self.compressed(optax.adan(1e-3), first=("m", "v"), second=("n",))) == 6
        assert self.compressed(optax.adam(1e-3), first=()) == [
            ".inner_state[0].nu['deep'][0]['mu']",
            ".inner_state[0].nu['kernel']",
        ]

    def test_of_no_parameters(self):
        assert not self.compressed(optax.adam(1e-3), {})

    def test_that_are_no_floats(self):
        """A state with integers of the shape of a parameter, such as a count per element."""
        inner = optax.GradientTransformation(
            lambda params: optax.TraceState(trace=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params)),
            lambda updates, state, params=None: (updates, state),
        )
        assert not self.compressed(inner, min_size=1)

    def test_of_names_that_match_nothing(self):
        with pytest.raises(ValueError, match=r"no moments of .* under \['mo'\] in the inner state, whose fields are"):
            self.compressed(optax.adam(1e-3), first=("mo",))

    def test_draw_random_bits_of_their_own(self):
        """Two equal leaves, and both moments of one, round differently."""
        params = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))}
        tx = ag.compress_state(optax.scale_by_adam(0.9, 0.9), min_size=1)
        g = jax.tree.map(lambda p: 1.03 * p, params)
        _, state = tx.update(g, tx.init(params), params)
        up = [np.asarray(m.index) > np.min(m.index) for m in jax.tree.leaves(state.inner_state[1:], is_leaf=is_moment)]
        assert len(up) == 4
        for i, one in enumerate(up):
            assert 0 < one.mean() < 1
            assert all((one != other).any() for other in up[:i])

    def test_of_narrow_parameters_keep_their_dtype_for_the_inner_transformation(self):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        tx = optax.apply_if_finite(ag.compress_state(optax.adam(1e-3, eps=1e-4), min_size=1), 3)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}

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


class TestSchedules:
    """Moments that change at some steps only."""

    @pytest.mark.parametrize("k", [3, 32, 100])
    def test_of_multi_steps_arrive(self, k):
        """Around stored parameters they go where the same transformation takes float32 ones."""
        start, gradient = jax.random.normal(jax.random.key(0), (16, 16)), jnp.full((16, 16), -1.0)
        inner = optax.MultiSteps(optax.adam(0.01), k).gradient_transformation()

        def way(tx, params):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            after, _ = jax.lax.scan(step, (params, tx.init(params)), length=320)[0]
            return float(jnp.mean(ag.from_grid(after, full=True) - ag.from_grid(params, full=True)))

        stored = way(ag.compress_state(ag.on_grid(inner), min_size=1), ag.to_grid(start, fraction_bits=8))
        np.testing.assert_allclose(stored, way(inner, start), rtol=0.05)


class TestBadInput:
    """Refused as early as possible."""

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

    def test_of_an_array_for_the_smallest_size(self):
        tx = optax.inject_hyperparams(ag.compress_state)
        with pytest.raises(TypeError, match=r"min_size must be no array, got .*: name it in the static_args"):
            jax.jit(lambda p: tx(inner=optax.adam(1e-3), min_size=3).init(p))(jnp.ones(3))

    def test_without_moments(self):
        with pytest.raises(ValueError, match=r"no moments .* whose fields are \['g', 'm', 'n', 't', 'v'\]: name them"):
            ag.compress_state(optax.chain(optax.scale_by_adan())).init(jnp.ones((8, 8)))

    def test_of_stored_parameters_without_on_grid(self):
        with pytest.raises(ValueError, match="need on_grid inside of compress_state"):
            ag.compress_state(optax.adam(1e-3), min_size=1).init(ag.to_grid(jnp.ones((8, 8))))

    def test_compressed_twice(self):
        tx = ag.compress_state(ag.compress_state(optax.adam(1e-3), min_size=1))
        with pytest.raises(ValueError, match="compress a state once only"):
            tx.init(jnp.ones((8, 8)))
