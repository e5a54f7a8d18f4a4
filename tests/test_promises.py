"""One test for each promise that a wrong line of the library once broke unseen: values, not shapes or signs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import some

import altgrad_jax as ag
from altgrad_jax.codec import exponent_range
from altgrad_jax.on_grid import moved
from altgrad_jax.stiffness import ulps_moved

SEEDED = {
    "grid_sgd": lambda seed: ag.grid_sgd(20.0, seed=seed),
    "grid_adamw": lambda seed: ag.grid_adamw(1e-2, seed=seed),
    "grid_adamw, 8bit": lambda seed: ag.grid_adamw(1e-2, second_moment="8bit", seed=seed),
    "on_grid": lambda seed: ag.on_grid(optax.sgd(1.0), seed=seed),
    "compress_state": lambda seed: ag.compress_state(ag.on_grid(optax.adam(1e-2)), seed=seed),
}


def stepped(tx, params, moves):
    state, update = tx.init(params), jax.jit(tx.update)
    for move in moves:
        updates, state = update(move, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


class TestRandomBits:
    """Of leaves whose paths end alike, of the weight and of its momentum, and of two seeds: uncorrelated."""

    def test_of_nested_leaves(self):
        params = ag.to_grid({layer: {"k": jnp.full((64, 64), 1.01)} for layer in ("l1", "l2")}, scale=2.0**-3)
        moves = jax.tree.map(lambda p: jnp.full(p.shape, 0.02), ag.from_grid(params))
        for arguments in ({}, {"momentum": 0.9}):
            tx = ag.on_grid(optax.scale(1.0), **arguments)
            updates, state = tx.update(moves, tx.init(params), params)
            drawn = state.momentum if arguments else updates
            one, other = (np.asarray(drawn[layer]["k"].index, float).ravel() for layer in ("l1", "l2"))
            assert one.std() > 0
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.1

    def test_of_a_weight_and_its_momentum(self):
        """A weight that owes more than a step goes up by the first word, and its momentum by another one."""
        params = ag.to_grid(jnp.full((64, 64), 1.0), "float8_e3m4", scale=2.0**-3)
        tx = ag.on_grid(optax.scale(1.0), momentum=0.9)
        start = tx.init(params)
        momentum = dataclasses.replace(start.momentum, index=jnp.zeros_like(start.momentum.index))
        start = start._replace(momentum=momentum, grid_step=jnp.uint32(10**6))
        updates, state = tx.update(jnp.full((64, 64), 0.2345), start, params)
        up, owed = np.asarray(updates.index, float).ravel(), np.asarray(ag.from_grid(state.momentum)).ravel()
        assert set(up) == {0, 1}
        # What is owed after the same movement still takes two neighbouring numbers, whichever way the weight went.
        for way in (0, 1):
            assert len(np.unique(owed[up == way])) == 2

    @pytest.mark.parametrize("name", some(SEEDED, ("grid_sgd", "grid_adamw").__contains__))
    def test_of_two_seeds(self, name):
        params = ag.to_grid(jnp.full((64, 64), 1.01))
        moves = [jnp.full((64, 64), 0.02)] * 2
        results = [stepped(SEEDED[name](seed), params, moves) for seed in (0, 1, 0)]
        fingerprints = [int(ag.diagnostics.fingerprint(result)) for result in results]
        assert fingerprints[0] == fingerprints[2] != fingerprints[1]

    def test_of_moments_of_two_seeds(self):
        """Also where the parameters are not stored."""
        params = jnp.ones((64, 64))
        moments = [
            stepped(ag.compress_state(optax.adam(1e-2), seed=seed), params, [jnp.full((64, 64), 0.0123)])[1]
            for seed in (0, 1)
        ]
        one, other = (np.asarray(optax.tree.get(state.inner_state, "mu").index) for state in moments)
        assert (one != other).any()

    def test_of_a_moment_at_two_steps(self):
        params, tx = jnp.ones((64, 64)), ag.compress_state(optax.trace(0.9))
        state, seen = tx.init(params), []
        for step in (0, 1):
            _, after = tx.update(jnp.full((64, 64), 0.0123), state._replace(moment_step=jnp.uint32(step)), params)
            seen.append(np.asarray(after.inner_state.trace.index))
        assert (seen[0] != seen[1]).any()


class TestFractionBits:
    """The inner transformation, weight decay and what init makes see values with their fraction bits."""

    X = jnp.array([[1.0, 1.01, 1.02, 0.3, -0.7, 0.111, 0.5, 0.25]])

    def test_in_the_inner_transformation(self):
        params, seen = ag.to_grid(self.X, fraction_bits=8), []

        def init(params):
            seen.append(params)
            return optax.EmptyState()

        def update(updates, state, params):
            seen.append(params)
            return updates, state

        tx = ag.on_grid(optax.GradientTransformation(init, update))
        tx.update(self.X, tx.init(params), params)
        for numbers in seen:
            np.testing.assert_allclose(numbers, self.X, rtol=2.0**-12)
            assert (numbers != params.value()).any()

    def test_in_weight_decay(self):
        params = ag.to_grid(self.X, fraction_bits=8)
        seen = []

        def spy(updates, state, params=None):
            seen.append(updates)
            return updates, state

        decay = optax.chain(optax.add_decayed_weights(0.5), optax.GradientTransformation(lambda p: (), spy))
        tx = ag.on_grid(decay)
        tx.update(jnp.zeros_like(self.X), tx.init(params), params)
        np.testing.assert_allclose(seen[0], 0.5 * self.X, rtol=2.0**-12)

    def test_in_the_decay_of_grid_sgd(self):
        params = ag.to_grid(self.X, fraction_bits=8)
        _, state = stepped(ag.grid_sgd(1.0, weight_decay=0.5), params, [jnp.zeros_like(self.X)])
        np.testing.assert_allclose(optax.tree.get(state, "trace"), 0.5 * self.X, rtol=2.0**-12)


class TestOrder:
    """Of what a chain does."""

    def test_grid_sgd_decays_before_the_trace(self):
        """So the decay is part of the momentum."""
        params = ag.to_grid(jnp.full((1, 8), 2.0))
        _, state = stepped(ag.grid_sgd(0.0, 0.5, weight_decay=0.25), params, [jnp.ones((1, 8))] * 2)
        np.testing.assert_array_equal(optax.tree.get(state, "trace"), 1.5 * (1.0 + 0.25 * 2.0))

    def test_manifold_adamw_hands_its_format_to_the_tracker(self):
        params, gradients = jnp.array([1.0, 0.3, -5.0]), jnp.array([1.0, -1.0, 1.0])
        for format in ("float8_e4m3fn", "E0M7", None):
            updates, state = (tx := ag.manifold_adamw(0.1, format=format)).update(gradients, tx.init(params), params)
            moved = np.asarray(optax.apply_updates(params, updates) - params, np.float64)
            step = np.spacing(np.abs(params)) if format is None else np.asarray(ag.spacing(params, format))
            np.testing.assert_allclose(optax.tree.get(state, "ulp_position"), moved / step, rtol=1e-6)

    def test_a_chain_inside_of_on_grid_knows_the_scales(self):
        """The stiffness is the spacing of the scaled grid."""
        params, seen = ag.to_grid(jnp.full((2, 8), 0.3), "float8_e4m3fn", scale=2.0**-6), []

        def spy(updates, state, params=None):
            seen.append(updates)
            return updates, state

        inner = optax.chain(
            ag.stiffness_precondition(format="float8_e4m3fn"), optax.GradientTransformation(lambda params: (), spy)
        )
        tx = ag.on_grid(inner)
        tx.update(jnp.full((2, 8), 1e-3), tx.init(params), params)
        spacing = 2.0**-6 * ag.spacing(params.value() / 2.0**-6, "float8_e4m3fn")
        np.testing.assert_allclose(seen[0], 1e-3 * spacing, rtol=1e-6)
        # Far from zero a scaled floating-point grid has the same spacing, but not near it.
        small = ag.to_grid(jnp.full((2, 8), 2.0**-12), "float8_e4m3fn", scale=2.0**-6)
        tx.update(jnp.ones((2, 8)), tx.init(small), small)
        np.testing.assert_array_equal(seen[1], 2.0**-6 * 2.0**-9)


class TestErrors:
    """What is owed comes from the movement."""

    def test_below_the_ulp_of_the_weight(self):
        """2**-30 at w = 1 is lost in the sum of both, and not in what is owed."""
        w, owed = jnp.float32(1.0), jnp.float32(2.0**-30)
        _, _, after = moved(w, jnp.float32(0), owed, jnp.float32(2.0**-4), lambda t, near: t, 0.1, 0.1)
        np.testing.assert_allclose(after, 2.0**-30, rtol=1e-6)


class TestExponents:
    """Also those that are not per row: they follow their own axes, and stop at their ends."""

    @pytest.mark.parametrize("shape", [(1, 16), (1, 1), (8, 16), (8, 1)])
    @pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9}])
    def test_grow_on_their_own_axes(self, shape, arguments):
        """One element grows by 64: the exponents that it shares grow, all others stay."""
        params = ag.to_grid(jnp.ones((8, 16)), scale=2.0**-2)
        params = dataclasses.replace(params, exponent=jnp.full(shape, -2, jnp.int8))
        target = jnp.ones((8, 16)).at[3, 5].set(64.0)
        tx = ag.on_grid(optax.scale(-0.2), **arguments)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(150):
            updates, state = update(ag.from_grid(params) - target, state, params)
            params = optax.apply_updates(params, updates)
        assert params.exponent.shape == shape
        np.testing.assert_allclose(ag.from_grid(params)[3, 5], 64.0, rtol=0.1)
        shares = np.broadcast_to(np.asarray(params.exponent), (8, 16)) > 1  # -2 holds numbers up to 3.875.
        expected = np.zeros((8, 16), bool)
        expected[3 if shape[0] > 1 else slice(None), 5 if shape[1] > 1 else slice(None)] = True
        np.testing.assert_array_equal(shares, expected)
        np.testing.assert_allclose(np.asarray(ag.from_grid(params))[~expected], 1.0, atol=0.1)

    @pytest.mark.parametrize("arguments", [{}, {"rounding": "nearest"}, {"momentum": 0.9}])
    @pytest.mark.parametrize("name", ["float8_e3m4", "E7M0", "E0M7"])
    def test_stop_at_their_ends(self, name, arguments):
        low, high = exponent_range(ag.as_format(name))
        largest = ag.as_format(name).max_index
        tx = ag.on_grid(optax.scale(1.0), **arguments)
        for exponent, index in ((high, largest), (low, 1)):
            params = ag.GridArray(
                jnp.full((1, 8), index, jnp.int8), jnp.full((1, 1), exponent, jnp.int8), ag.as_format(name)
            )
            after, state = stepped(tx, params, [jnp.zeros((1, 8))] * 5)
            np.testing.assert_array_equal(after.exponent, exponent)
            np.testing.assert_array_equal(state.exponent, exponent)
            np.testing.assert_array_equal(after.index, index)

    @pytest.mark.parametrize("size", [2e-38, 1e38])
    def test_of_moments_stop_at_their_ends(self, size):
        tx = ag.compress_state(optax.trace(0.5))
        _, state = stepped(tx, jnp.ones((64, 64)), [jnp.full((64, 64), size)] * 4)
        moment = state.inner_state.trace
        low, high = exponent_range(moment.format)
        for exponent in (moment.exponent, state.exponent.trace):
            assert bool((low <= exponent).all() & (exponent <= high).all())
        assert bool(jnp.isfinite(moment.value()).all())

    def test_that_change_move_nothing_by_themselves(self):
        """`signed_steps` counts on the grid after the update."""
        params = ag.to_grid(jnp.array([[240.0, 1.0, -3.5, 0.0]]), "float8_e4m3fn", scale=1.0)
        tx = ag.on_grid(optax.scale(1.0))
        state = tx.init(params)
        for change in (0, 1):
            updates, state = tx.update(jnp.zeros((1, 4)), state, params)
            np.testing.assert_array_equal(updates.exponent, change)
            np.testing.assert_array_equal(ag.signed_steps(updates, params), 0)
            params = optax.apply_updates(params, updates)
        assert (updates.index != 0).any()

    def test_of_formats_of_large_numbers_alone_start_where_powers_of_two_do(self):
        large = ag.FloatFormat("large", exponent_bits=2, mantissa_bits=1, bias=-9, max=3 * 2.0**11)
        assert exponent_range(large) == (-126, 128 - 13)

    def test_of_to_grid_stop_at_their_ends(self):
        for size in (1e-38, 2.9e38):
            stored = ag.to_grid(jnp.full((1, 8), size), "float8_e4m3fn")
            low, high = exponent_range(stored.format)
            assert low <= int(stored.exponent[0, 0]) <= high
        np.testing.assert_allclose(stored.value(), 2.9e38, rtol=0.07)


class TestToGrid:
    """Of GridArrays."""

    @pytest.mark.parametrize("name", ["float8_e5m2", "E0M7", "bfloat16", "float4_e2m1fn"])
    def test_into_another_format_rescales(self, name):
        """The scale that the numbers would get by themselves, and all bits of the numbers."""
        x = jax.random.normal(jax.random.key(0), (4, 64)) * jnp.array([[1.0], [8.0], [0.1], [3.0]])
        stored = ag.to_grid(x, fraction_bits=6)
        again, fresh = ag.to_grid(stored, name), ag.to_grid(ag.from_grid(stored, full=True), name)
        np.testing.assert_array_equal(again.exponent, fresh.exponent)
        np.testing.assert_array_equal(again.index, fresh.index)

    def test_of_float64_rounds_once(self):
        """A little above a midpoint, which is what float32 makes of it: away from the even number below."""
        with jax.enable_x64(True):
            x = jnp.array([[1 + 2.0**-5 + 2.0**-40, 1 + 2.0**-5, -1 - 3 * 2.0**-5 + 2.0**-40]], jnp.float64)
            numbers = ag.from_grid(ag.to_grid(x, "float8_e3m4", scale=1.0))
        np.testing.assert_array_equal(numbers, [[1 + 2.0**-4, 1.0, -1 - 2.0**-4]])

    def test_into_more_fraction_bits_keeps_the_scale(self):
        stored = ag.to_grid(jnp.ones((1, 8)), scale=4.0)
        again = ag.to_grid(stored, fraction_bits=8)
        np.testing.assert_array_equal(again.exponent, 2)
        np.testing.assert_array_equal(again.value(), stored.value())


class TestMoments:
    """compress_state takes the moments of the shapes of their parameters."""

    def test_of_another_shape_are_left_alone(self):
        """Under a known name, at the path of a parameter, like the first moment of a low rank."""

        def init(params):
            return optax.TraceState({"w": jnp.ones((128, 64)), "v": jnp.ones((64, 64))})

        tx = ag.compress_state(optax.GradientTransformation(init, lambda u, s, p=None: (u, s)))
        state = tx.init({"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64))})
        assert isinstance(state.inner_state.trace["w"], jax.Array)
        assert isinstance(state.inner_state.trace["v"], ag.GridArray)

    def test_of_min_size_elements_are_taken(self):
        tx = ag.compress_state(optax.trace(0.9), min_size=64)
        state = tx.init({"in": jnp.ones((8, 8)), "out": jnp.ones((7, 9))})
        assert isinstance(state.inner_state.trace["in"], ag.GridArray)
        assert isinstance(state.inner_state.trace["out"], jax.Array)

    def test_an_infinite_second_moment_saturates(self):
        tx = ag.compress_state(optax.scale_by_rms(0.9), min_size=1)
        _, state = stepped(tx, jnp.ones((8, 8)), [jnp.full((8, 8), 1e30)] * 2)
        assert bool((jnp.isfinite(state.inner_state.nu.value()) & (state.inner_state.nu.value() > 1e30)).all())


class TestBoundaries:
    """Where a share or a rank is decided by equality."""

    def test_of_saturation(self):
        x = jnp.array([448.0, -448.0, 447.0, 500.0])
        assert float(ag.diagnostics.saturation_share(x, "float8_e4m3fn")) == 0.75

    def test_of_subnormal_numbers(self):
        smallest = ag.as_format("float8_e4m3fn").smallest_normal
        x = jnp.array([smallest, -smallest, 0.99 * smallest, 0.0])
        assert float(ag.diagnostics.subnormal_share(x, "float8_e4m3fn")) == 0.25

    def test_of_gradients_of_one_step(self):
        measured = ag.diagnostics.gradient_stiffness(jnp.array([0.125, 0.124]), jnp.ones(2), "float8_e4m3fn")
        assert float(measured.below_share) == 0.5

    def test_of_ranks(self):
        """Squares of 4, 1, 1, 1, 1 of 8: half with the first, five eighths with the second."""
        x = jnp.diag(jnp.array([2.0, 1.0, 1.0, 1.0, 1.0]))
        for share, rank in ((0.5, 1), (0.625, 2), (0.63, 3), (1.0, 5)):
            assert float(ag.diagnostics.variance_rank(x, share)) == rank

    def test_of_the_largest_position(self):
        """The largest index of float32 is no float32: it rounds up, beyond the last number."""
        largest = float(np.finfo(np.float32).max)
        for sign in (1.0, -1.0):
            assert float(ag.value(sign * jnp.inf, "float32")) == sign * largest
            assert float(ag.value(jnp.float32(sign * 2.0**31), "float32")) == sign * largest

    def test_of_flushed_spacings(self):
        """A spacing below 2**-126, that of the scaled grid, is divided by as the larger one after the move."""
        scale = 2.0**-120
        before, after = jnp.float32(2.0**-5 * scale), jnp.float32(scale)
        ulps = ulps_moved(before, after - before, ag.as_format("float8_e4m3fn"), jnp.float32(scale))
        np.testing.assert_allclose(ulps, (1 - 2.0**-5) * 2.0**3, rtol=1e-6)
        # Both are below it: the smallest normal number divides.
        ulps = ulps_moved(jnp.float32(0), jnp.float32(2.0**-124), ag.as_format("float8_e4m3fn"), jnp.float32(2.0**-122))
        np.testing.assert_array_equal(ulps, 4.0)
