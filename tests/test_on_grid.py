"""on_grid: whole steps, exact under optax.apply_updates, the same on every sharding and after every restart."""

import copy
import dataclasses
import functools
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from quick import some

import altgrad_jax as ag
import altgrad_jax.flax_support
from altgrad_jax.on_grid import _rates, moved
from altgrad_jax.scales import with_level

ADAM = functools.partial(optax.adamw, 1e-2)
# Adam without a first moment: the momentum of on_grid takes its place.
RMS = functools.partial(
    optax.chain, optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True), optax.scale(-1e-2)
)
VARIANTS = {
    "nearest": lambda: ag.on_grid(ADAM(), rounding="nearest"),
    "stochastic": lambda: ag.on_grid(ADAM()),
    "momentum": lambda: ag.on_grid(RMS(), momentum=0.9),
    "8-bit moments": lambda: ag.compress_state(ag.on_grid(RMS(), momentum=0.9), min_size=1),
}


@pytest.fixture(params=VARIANTS)
def tx(request):
    return VARIANTS[request.param]()


def params_and_gradients(fraction_bits=0):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": jax.random.normal(keys[0], (8, 16)),
        "b": {"kernel": 0.1 * jax.random.normal(keys[1], (16, 4)), "bias": jnp.zeros(4)},
    }
    gradients = jax.tree.map(lambda p: 0.1 * jax.random.normal(keys[2], p.shape), params)
    return ag.to_grid(params, "float8_e4m3fn", fraction_bits=fraction_bits), gradients


def run(tx, params, state, gradients, steps):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


class TestRounding:
    """The stored number is the rounded target, and the update is its distance in steps."""

    def test_nearest_is_the_nearest_number(self):
        params, gradients = params_and_gradients(fraction_bits=2)
        tx = ag.on_grid(optax.sgd(0.3), rounding="nearest")
        after, _ = run(tx, params, tx.init(params), gradients, 1)
        target = jax.tree.map(lambda w, g: w - 0.3 * g, ag.from_grid(params, full=True), gradients)
        for leaf, wanted in ((after["a"], target["a"]), (after["b"]["kernel"], target["b"]["kernel"])):
            expected = ag.to_grid(wanted, "float8_e4m3fn", fraction_bits=2, scale=leaf.scale)
            np.testing.assert_array_equal(leaf.index, expected.index)
        np.testing.assert_array_equal(after["b"]["bias"], target["b"]["bias"])

    def test_stochastic_moves_to_a_neighbour_and_is_unbiased(self):
        params = ag.to_grid(jnp.full((1024, 1024), 1.0), "float8_e4m3fn", scale=2.0**-7)
        ulp = 2.0**-3
        tx = ag.on_grid(optax.scale(1.0))
        for share in (0.01, 0.3):
            updates, _ = tx.update(jnp.full((1024, 1024), share * ulp), tx.init(params), params)
            steps = np.asarray(ag.signed_steps(updates, params))
            assert set(np.unique(steps)) == {0, 1}
            assert abs(steps.mean() - share) < 5 * np.sqrt(share / 2**20)
        updates, _ = tx.update(jnp.full((1024, 1024), -0.3 * ulp), tx.init(params), params)
        steps = np.asarray(ag.signed_steps(updates, params)) / 2  # Below a power of two the steps are half as wide.
        assert abs(steps.mean() + 0.3) < 5 * np.sqrt(0.3 / 2**20)

    @pytest.mark.parametrize(
        "name",
        some(["float8_e4m3fn", "E0M7", "E7M0", "float4_e2m1fn", "bfloat16"], ("E0M7", "bfloat16").__contains__),
    )
    @pytest.mark.parametrize("fraction_bits", [0, 8])
    @pytest.mark.parametrize("arguments", [{}, {"rounding": "nearest"}, {"momentum": 0.9}])
    def test_without_a_movement_no_number_moves(self, name, fraction_bits, arguments):
        format = ag.as_format(name)
        last = format.max_index * 2**fraction_bits
        first = 128 * 2**fraction_bits if name == "bfloat16" else 0  # XLA flushes what lies below.
        positive = np.linspace(first, last, 2**11).round()
        dtype = next(d for d in (np.int8, np.int16, np.int32) if last <= np.iinfo(d).max)
        index = jnp.asarray(np.concatenate([-positive, positive])[None], dtype)
        params = ag.GridArray(index, jnp.zeros((1, 1), jnp.int8), format, fraction_bits)
        tx = ag.on_grid(optax.scale(-1.0), **arguments)
        updates, state = tx.update(jnp.zeros(index.shape), tx.init(params), params)
        assert not np.asarray(updates.index).any()
        assert not np.asarray(updates.exponent).any()
        chex.assert_trees_all_close(
            *(ag.from_grid(s.momentum) for s in (state, tx.init(params))), rtol=1e-6, atol=1e-37
        )

    @pytest.mark.parametrize(
        "name",
        some(
            ["float8_e3m4", "float8_e4m3fn", "float8_e5m2", "E0M7", "E7M0", "float4_e2m1fn"],
            ("float8_e3m4", "E0M7").__contains__,
        ),
    )
    @pytest.mark.parametrize("fraction_bits", [0, 8])
    @pytest.mark.parametrize("momentum", [None, 0.9])
    def test_rows_that_were_just_stored_rest(self, name, fraction_bits, momentum):
        """Also where rounding took their largest element to the level at which rows grow."""
        params = ag.to_grid(jax.random.normal(jax.random.key(0), (1000, 64)), name, fraction_bits=fraction_bits)
        after, _, flips = scan(
            tx := ag.on_grid(optax.set_to_zero(), momentum=momentum), params, tx.init(params), jnp.zeros((6, 1000, 64))
        )
        assert not flips.any()
        np.testing.assert_array_equal(after.exponent, params.exponent)

    def test_moves_from_every_number_to_every_other(self):
        format = ag.as_format("float8_e4m3fn")
        old, new = (a.astype(np.int8) for a in np.meshgrid(np.arange(-126, 127), np.arange(-126, 127)))
        zero = jnp.zeros((253, 1), jnp.int8)
        before, after = (ag.GridArray(jnp.asarray(i), zero, format) for i in (old, new))
        move = ag.from_grid(after) - ag.from_grid(before)
        for rounding in ("nearest", "stochastic"):
            tx = ag.on_grid(optax.scale(1.0), rounding=rounding)
            updates, _ = tx.update(move, tx.init(before), before)
            np.testing.assert_array_equal(optax.apply_updates(before, updates).index, new)
            np.testing.assert_array_equal(ag.signed_steps(updates, before), new.astype(int) - old)

    @pytest.mark.parametrize("arguments", [{}, {"rounding": "nearest"}, {"momentum": 0.9}])
    @pytest.mark.parametrize("fraction_bits", [0, 8])
    def test_a_movement_that_is_not_finite_makes_nan(self, arguments, fraction_bits):
        params = ag.to_grid(jnp.array([[0.5, -0.01, 0.3, 1.0]]), fraction_bits=fraction_bits)
        tx = ag.on_grid(optax.scale(1.0), **arguments)
        state = tx.init(params)
        for bad in (jnp.array([[jnp.inf, jnp.nan, 0.0, -jnp.inf]]), jnp.zeros((1, 4))):
            updates, state = tx.update(bad, state, params)
            params = optax.apply_updates(params, updates)
            for full in (False, True):
                np.testing.assert_array_equal(np.isnan(ag.from_grid(params, full=full)), [[True, True, False, True]])
        np.testing.assert_array_equal(np.isnan(params.fp8()[0].astype(jnp.float32)), [[True, True, False, True]])


RECIPES = some(
    [("float8_e4m3fn", 0), ("float8_e3m4", 0), ("E2M5", 0), ("E0M7", 0), ("float8_e3m4", 8)],
    (("float8_e3m4", 0), ("float8_e3m4", 8)).__contains__,
)


def scan(tx, params, state, moves):
    """Parameters, state and whether each weight moved, after the updates in the leading axis of moves."""

    @jax.jit
    def run(carry, moves):
        def step(carry, move):
            params, state = carry
            updates, state = tx.update(move, state, params)
            moved = jax.tree.map(lambda index: index != 0, ag.signed_steps(updates, params))
            return (optax.apply_updates(params, updates), state), moved

        return jax.lax.scan(step, carry, moves)

    (params, state), moved = run((params, state), moves)
    return params, state, moved


def target(params, state):
    """Weights and what they owe, which gains exactly the update at each step, in float64."""
    w, owed = (np.asarray(ag.from_grid(tree, full=True), np.float64) for tree in (params, state.momentum))
    return w + owed


def mature(state):
    """A state so late that the momentum needs no bias correction: b_t is b."""
    return state._replace(grid_step=jnp.uint32(10**6))


class TestMomentum:
    """What is owed, times 1 - b, is the average of the updates; within a step of the target it moves to the nearest."""

    def test_is_the_recurrence(self):
        """The function on one leaf, in float64, with an ordinary rounding; the last two owe more than a step."""
        before, update = np.array([1.0, -0.3, 0.8, 2.0, -2.0]), np.array([0.02, -0.001, 0.1, 0.0, 0.0])
        carried = np.array([0.0, 0.04, -0.08, 1.2, -0.2])
        rounded = lambda t, near: jnp.where(near, jnp.round(8 * t) / 8, jnp.floor(8 * t) / 8)  # noqa: E731
        with jax.enable_x64(True):
            aim, expected, after = moved(before, update, carried, np.full(5, 0.125), rounded, 0.3, 0.2)
        owed = carried + 1.5 * update
        near = np.array([True, True, True, False, False])
        np.testing.assert_allclose(expected, 0.8 * owed, rtol=1e-14)
        np.testing.assert_allclose(aim, before + np.where(near, owed, 0.2 * owed), rtol=1e-14)
        stored = np.where(near, np.round(8 * (before + owed)), np.floor(8 * (before + 0.2 * owed))) / 8
        np.testing.assert_allclose(after, before + owed - stored, rtol=1e-13)

    @pytest.mark.parametrize("b", [1e-3, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("t", [1, 2, 5, 50, 10**6])
    def test_share_of_a_move_in_all_that_it_entails(self, b, t):
        """A move of 1 entails later ones, the products of b_t."""
        later = np.asarray(_rates(b, jnp.uint32(t) + jnp.arange(int(16 / (1 - b)), dtype=jnp.uint32))[0])
        np.testing.assert_allclose(float(_rates(b, jnp.uint32(t - 1))[2]), 1 / (1 + np.cumprod(later).sum()), rtol=3e-4)

    @pytest.mark.parametrize("b", [0.5, 0.9])
    def test_moves_are_the_unbiased_average_of_the_updates(self, b):
        """Those of `optax.ema`, from the first on, where the grid is so fine that rounding does not show."""
        moves = 1e-2 * jax.random.normal(jax.random.key(1), (30, 8, 64))
        params = ag.to_grid(jax.random.normal(jax.random.key(0), (8, 64)), "bfloat16", fraction_bits=9)
        tx, twin = ag.on_grid(optax.scale(1.0), momentum=b), optax.ema(b)
        state, twin_state = tx.init(params), twin.init(jnp.zeros((8, 64)))
        for move in moves:
            updates, state = tx.update(move, state, params)
            after = optax.apply_updates(params, updates)
            way, params = np.asarray(ag.from_grid(after, full=True) - ag.from_grid(params, full=True)), after
            wanted, twin_state = twin.update(move, twin_state)
            np.testing.assert_allclose(way, wanted, atol=1e-4)

    @pytest.mark.parametrize("b", [0.5, 0.9, 0.95])
    def test_weight_and_what_is_owed_gain_exactly_the_update(self, b):
        """However the weight is rounded, with a momentum that is not rounded: float32, of a bfloat16 weight."""
        params = ag.to_grid(jax.random.normal(jax.random.key(0), (8, 64)), "bfloat16")
        tx = ag.on_grid(optax.scale(1.0), momentum=b)
        moves = 1e-3 * jax.random.normal(jax.random.key(1), (50, 8, 64))
        after, state, _ = scan(tx, params, mature(tx.init(params)), moves)
        gained = target(after, state) - target(params, tx.init(params))
        np.testing.assert_allclose(gained, np.asarray(moves, np.float64).sum(0), atol=2e-6)

    @pytest.mark.parametrize(("name", "fraction_bits"), RECIPES)
    @pytest.mark.parametrize("rate", [1e-3, 1e-5])
    def test_arrives_with_constant_updates(self, name, fraction_bits, rate):
        """In the mean over 4096 weights; rounded to nearest, the smaller updates would move nothing."""
        params = ag.to_grid(0.05 * jax.random.normal(jax.random.key(0), (64, 64)), name, fraction_bits=fraction_bits)
        tx = ag.on_grid(optax.scale(1.0), momentum=0.9)
        moves = rate * jnp.ones((300, 64, 64))
        after, state, _ = scan(tx, params, mature(tx.init(params)), moves)
        gained = target(after, state) - target(params, tx.init(params))
        noise = gained.std() / 64
        assert abs(gained.mean() - 300 * rate) < 5 * noise + 0.01 * 300 * rate
        assert noise < 0.1 * 300 * rate

    def test_starts_anywhere_in_the_interval_that_rounds_to_a_weight(self):
        """Half a step, and below a power of two, where steps are half as wide, half of that; 0 stays 0."""
        for weight, low, high in ((1.0, -0.25, 0.5), (1.25, -0.5, 0.5), (-1.0, -0.5, 0.25)):
            params = ag.to_grid(jnp.full((64, 64), weight), "float8_e4m3fn", scale=2.0**-7)
            owed = np.asarray(ag.on_grid(optax.sgd(1.0), momentum=0.9).init(params).momentum) / 2.0**-3
            assert low < owed.min() < 0.9 * low
            assert 0.9 * high < owed.max() < high
            # Half of the weights on either side, evenly except for the rounding towards 0.
            for side in (low, high):
                inside = owed[owed * side > 0] / side
                np.testing.assert_allclose([inside.mean(), inside.std()], [0.5, 12**-0.5], atol=0.03)
        params = ag.to_grid(jnp.zeros((64, 64)))
        assert not np.asarray(ag.on_grid(optax.sgd(1.0), momentum=0.9).init(params).momentum).any()

    @pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
    def test_shows_movements_that_are_a_part_of_a_step(self, share):
        """In the mean, from numbers that were stored just now: a number stands for all that round to it."""
        x = 0.05 * jax.random.normal(jax.random.key(0), (256, 256))
        params, tx = ag.to_grid(x), ag.on_grid(optax.scale(1.0), momentum=0.9)
        steps = np.asarray(params.scale * ag.spacing(params.value() / params.scale, "float8_e3m4"))
        after, state, _ = scan(
            tx, params, tx.init(params), jnp.asarray(np.broadcast_to(share / 50 * steps, (50, *x.shape)))
        )
        meant = (target(after, state) - target(params, tx.init(params))) / steps
        way = np.asarray(after.value() - params.value()) / steps
        assert abs(way.mean() / meant.mean() - 1) < 0.05 + 5 * way.std() / meant.mean() / 256
        assert way.std() < np.sqrt(1.2 * meant.mean())

    def test_of_plain_leaves_is_that_of_optax(self):
        params, gradients = params_and_gradients()
        tx = ag.on_grid(optax.scale(-0.02), momentum=0.8)
        after, _ = run(tx, params, tx.init(params), gradients, 7)
        plain = optax.chain(optax.scale(-0.02), optax.ema(0.8))
        bias = jnp.zeros(4)
        alone, _ = run(plain, bias, plain.init(bias), gradients["b"]["bias"], 7)
        np.testing.assert_allclose(after["b"]["bias"], alone, rtol=1e-6)

    def test_is_one_byte_with_the_exponents_of_its_weights(self):
        params, gradients = params_and_gradients()
        tx = ag.on_grid(optax.scale(-0.3), momentum=0.9)
        after, state = run(tx, params, tx.init(params), gradients, 3)
        assert state.momentum["a"].index.dtype == jnp.int8
        np.testing.assert_array_equal(state.momentum["a"].exponent, after["a"].exponent)
        assert state.momentum["b"]["bias"].dtype == jnp.float32


class TestRest:
    """A finished model rests, and what is still owed arrives."""

    @pytest.mark.parametrize(("name", "fraction_bits"), RECIPES)
    def test_after_training(self, name, fraction_bits):
        """At most 0.01 % of the weights move per step in 10,000 steps without gradients."""
        params = ag.to_grid(0.05 * jax.random.normal(jax.random.key(0), (64, 64)), name, fraction_bits=fraction_bits)
        tx = ag.on_grid(optax.scale(1.0), momentum=0.9)
        moves = 1e-3 * jax.random.normal(jax.random.key(1), (100, 64, 64))
        params, state, flips = scan(tx, params, tx.init(params), moves)
        assert flips[-1].mean() > 1e-3
        params, state, flips = scan(tx, params, state, jnp.zeros((10_000, 64, 64)))
        assert flips[100:].mean() <= 1e-4
        steps = np.asarray(params.scale * ag.spacing(ag.from_grid(params, full=True) / params.scale, params.grid))
        assert (np.abs(ag.from_grid(state.momentum)) <= 0.51 * steps + 1e-9).mean() > 0.999

    @pytest.mark.parametrize("b", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
    @pytest.mark.parametrize("half", [0.5, -0.5])
    def test_where_half_a_step_is_owed(self, b, half):
        """An element half-way between two numbers settles on one of them."""
        params = ag.to_grid(1 + jnp.arange(1, 16)[None] / 16, scale=1.0)
        tx = ag.on_grid(optax.scale(1.0), momentum=b)
        state = mature(tx.init(params))
        owed = ag.to_grid(jnp.full((1, 15), half / 16), state.momentum.format, scale=1.0)
        state = state._replace(momentum=owed)
        _, _, flips = scan(tx, params, state, jnp.zeros((200, 1, 15)))
        assert flips.sum(0).max() <= 1

    @pytest.mark.parametrize(("steps", "arrives"), [(0.4, 1.0), (0.7, 1.125), (1.3, 1.125), (1.7, 1.25), (-2.3, 0.875)])
    def test_elements_arrive_at_the_nearest_number(self, steps, arrives):
        """Nearest to the target of one update, under a momentum that lasts while they owe more than a step."""
        params = ag.to_grid(jnp.ones((1, 1024)), "float8_e4m3fn", scale=2.0**-7)
        tx = ag.on_grid(optax.scale(1.0), momentum=0.9)
        move = steps * (2.0**-3 if steps > 0 else 2.0**-4)
        start = mature(tx.init(params))
        zero = dataclasses.replace(start.momentum, index=jnp.zeros_like(start.momentum.index))
        start = start._replace(momentum=zero)
        after, state, _ = scan(tx, params, start, jnp.zeros((200, 1, 1024)).at[0].set(move))
        np.testing.assert_array_less(np.abs(target(after, state) - 1 - move).mean(), 0.1 * 2.0**-3)
        assert float(jnp.mean(ag.from_grid(after) == arrives)) > 0.9

    @pytest.mark.parametrize(("name", "fraction_bits"), RECIPES)
    def test_rows_with_rare_updates_go_the_way_of_their_float32_twin(self, name, fraction_bits):
        """Rows that see 1 % of 500 steps, at random."""
        shape = (64, 128)
        x = 0.05 * jax.random.normal(jax.random.key(0), shape)
        seen = jax.random.bernoulli(jax.random.key(1), 0.01, (500, shape[0], 1))
        moves = jnp.where(seen, 1e-3, 0.0) * jnp.ones(shape)
        params = ag.to_grid(x, name, fraction_bits=fraction_bits)
        tx = ag.on_grid(optax.scale(1.0), momentum=0.9)
        after, _, _ = scan(tx, params, tx.init(params), moves)
        way = float(jnp.mean(ag.from_grid(after, full=True) - ag.from_grid(params, full=True)))
        twin = optax.ema(0.9)

        def step(carry, move):
            w, state = carry
            update, state = twin.update(move, state)
            return (w + update, state), None

        (w, _), _ = jax.lax.scan(step, (x, twin.init(x)), moves)
        np.testing.assert_allclose(way, float(jnp.mean(w - x)), rtol=0.1)


class TestExponents:
    """The exponent of a row follows its largest element, one step behind, up and down."""

    def outgrown(self, fraction_bits=0):
        # 240 is beyond half of 448; 3 * 2**-9 has a bit to lose.
        values = jnp.array([[240.0, 1.0, -3.5, 3 * 2.0**-9, 2 * 2.0**-9, 0.0], [100.0, 1.0, -3.5, 2.0**-9, 0.0, 0.0]])
        return ag.to_grid(values, "float8_e4m3fn", scale=jnp.ones((2, 1)), fraction_bits=fraction_bits)

    def test_grow_by_one_and_keep_the_numbers(self):
        params, tx = self.outgrown(), ag.on_grid(optax.scale(1.0), rounding="nearest")
        after, _ = run(tx, params, tx.init(params), jnp.zeros((2, 6)), 2)
        np.testing.assert_array_equal(after.exponent, [[1], [0]])
        # 3 * 2**-9 lies between two numbers of the coarser grid: to the even one.
        expected = np.asarray(ag.from_grid(params)).copy()
        expected[0, 3] = 4 * 2.0**-9
        np.testing.assert_array_equal(ag.from_grid(after), expected)

    def test_grow_without_bias(self):
        values = jnp.concatenate([jnp.array([240.0]), jnp.full(4096, 3 * 2.0**-9)])[None]
        params, tx = ag.to_grid(values, "float8_e4m3fn", scale=1.0), ag.on_grid(optax.scale(1.0))
        after, _ = run(tx, params, tx.init(params), jnp.zeros(values.shape), 2)
        rounded = np.asarray(ag.from_grid(after))[0, 1:] * 2.0**9
        assert set(np.unique(rounded)) == {2.0, 4.0}
        assert abs(rounded.mean() - 3) < 5 / 64

    def test_are_exact_with_a_fraction_bit_to_spare(self):
        params, tx = self.outgrown(fraction_bits=1), ag.on_grid(optax.scale(1.0))
        after, _ = run(tx, params, tx.init(params), jnp.zeros((2, 6)), 2)
        np.testing.assert_array_equal(after.exponent, [[1], [0]])
        np.testing.assert_array_equal(ag.from_grid(after, full=True), ag.from_grid(params, full=True))

    @pytest.mark.parametrize(
        ("arguments", "steps", "exponent"), [({}, 9, -2), ({"rounding": "nearest"}, 9, -2), ({"momentum": 0.9}, 2, -3)]
    )
    def test_shrink_exactly(self, arguments, steps, exponent):
        """At once with a momentum; without one, by one binade per step and not to the last."""
        values = jnp.array([[26.0, 1.0, -3.5, 0.25], [0.0, 0.0, 0.0, 0.0]])
        params, tx = (
            ag.to_grid(values, "float8_e4m3fn", scale=jnp.ones((2, 1))),
            ag.on_grid(optax.scale(1.0), **arguments),
        )
        after, _ = run(tx, params, tx.init(params), jnp.zeros((2, 4)), steps)
        np.testing.assert_array_equal(after.exponent, [[exponent], [0]])  # A row of zeros keeps its own.
        np.testing.assert_array_equal(ag.from_grid(after), values)

    @pytest.mark.parametrize("arguments", [{}, {"rounding": "nearest"}, {"momentum": 0.9}])
    def test_leave_the_row_of_a_nan_alone(self, arguments):
        params = ag.to_grid(jnp.array([[0.5, -0.01, 0.3, 1.0]]), "float8_e4m3fn")
        tx = ag.on_grid(optax.scale(1.0), **arguments)
        state, bad = tx.init(params), jnp.array([[jnp.nan, 0.0, 0.0, 0.0]])
        expected = np.asarray(ag.from_grid(params)).copy()
        expected[0, 0] = np.nan
        for _ in range(9):
            updates, state = tx.update(bad, state, params)
            params = optax.apply_updates(params, updates)
            bad = jnp.zeros((1, 4))
        np.testing.assert_array_equal(ag.from_grid(params), expected)

    def test_follow_a_jump_two_steps_later(self):
        params = ag.to_grid(jnp.ones((1, 1)), "float8_e4m3fn", scale=2.0**-8)  # Ends at 1.75.
        tx = ag.on_grid(optax.scale(1.0), rounding="nearest")
        state, stored = tx.init(params), []
        for _ in range(4):
            params, state = run(tx, params, state, jnp.full((1, 1), 5.0), 1)
            stored.append((float(ag.from_grid(params)[0, 0]), float(params.scale[0, 0])))
        # First because 1.0 is beyond half of 1.75, then by more because it saturates. 8.5 and 13 are rounded.
        assert stored == [(1.75, 2.0**-8), (3.5, 2.0**-7), (8.0, 2.0**-4), (13.0, 2.0**-3)]

    def test_follow_a_jump_at_once_with_a_momentum(self):
        params = ag.to_grid(jnp.ones((1, 1)), "float8_e4m3fn", scale=2.0**-8)
        tx = ag.on_grid(optax.scale(1.0), momentum=0.5)
        params, state = run(tx, params, tx.init(params), jnp.full((1, 1), 100.0), 1)
        assert float(ag.from_grid(params)[0, 0]) == 1.75
        # The 60 that are owed after a move of 100 make the row grow until a quarter of the range holds them.
        assert 60 <= 31 / 16 * 2.0**6 * 2.0 ** float(state.exponent[0, 0]) <= 480

    def test_let_a_weight_grow_without_end(self):
        params = ag.to_grid(jnp.ones((1, 2)), "float8_e4m3fn", fraction_bits=8)
        tx = ag.on_grid(optax.scale(1.0), momentum=0.9)
        after, _ = run(tx, params, tx.init(params), jnp.array([[0.25, 0.0]]), 640)
        np.testing.assert_allclose(ag.from_grid(after, full=True), [[161.0 - 9 * 0.25, 1.0]], rtol=0.03)
        assert float(after.scale[0, 0]) > float(params.scale[0, 0])

    @pytest.mark.parametrize("momentum", [None, 0.9])
    @pytest.mark.parametrize("start", some([1e-3, 1e-20, 0.0], (1e-20).__eq__))
    @pytest.mark.parametrize("fraction_bits", [0, 8])
    def test_follow_weights_that_grow_by_orders_of_magnitude(self, momentum, start, fraction_bits):
        params = ag.to_grid(
            start * jax.random.normal(jax.random.key(0), (8, 32)), "float8_e4m3fn", fraction_bits=fraction_bits
        )
        inner = optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)
        tx = ag.on_grid(optax.chain(inner, optax.scale(-1e-2)), momentum=momentum)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(ag.from_grid(params) - 0.5, state, params)
            return optax.apply_updates(params, updates), state

        state, means = tx.init(params), []
        for _ in range(192):
            params, state = step(params, state)
            means.append(float(ag.from_grid(params).mean()))
        assert means[63] > 0.2
        np.testing.assert_allclose(means[-1], 0.5, atol=0.02)
        assert max(means) < 0.55


class TestDeterminism:
    """The random bits are a function only of seed, step, path and position."""

    def test_seeds_and_leaves_start_apart(self):
        x = jnp.full((64, 64), 1.01)
        params = ag.to_grid({"a": x, "b": x})
        starts = [ag.on_grid(optax.sgd(1.0), momentum=0.9, seed=seed).init(params).momentum for seed in (0, 1, 0)]
        chex.assert_trees_all_equal(starts[0], starts[2])
        drawn = [np.asarray(start[name]) for start in starts[:2] for name in ("a", "b")]
        for i, one in enumerate(drawn):
            for other in drawn[:i]:
                assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1

    def test_seeds_steps_and_leaves_differ(self):
        x = jnp.full((64, 64), 1.01)
        params = ag.to_grid({"a": x, "c": x}, "float8_e4m3fn", scale=2.0**-7)
        gradients = {"a": jnp.full(x.shape, 0.05), "c": jnp.full(x.shape, 0.05)}

        def steps(seed, step):
            tx = ag.on_grid(optax.scale(1.0), seed=seed)
            updates, _ = tx.update(gradients, tx.init(params)._replace(grid_step=jnp.uint32(step)), params)
            return updates

        first, again = steps(0, 1), steps(0, 1)
        chex.assert_trees_all_equal(first, again)
        for other in (first["c"], steps(1, 1)["a"], steps(0, 2)["a"]):
            agreement = np.mean(np.asarray(first["a"].index) == other.index)
            assert abs(agreement - (0.4**2 + 0.6**2)) < 0.05

    @pytest.mark.parametrize("momentum", [None, 0.9])
    @pytest.mark.parametrize("spec", some([jax.P("d"), jax.P(None, "d")], lambda spec: len(spec) > 1))
    def test_any_explicit_sharding_gives_the_same_bits(self, momentum, spec):
        """Those that JAX infers are in test_sharding.py."""
        # The inner transformation is only a product: XLA:CPU contracts Adam's sums differently for other shapes.
        tx = ag.on_grid(optax.scale(-0.3), momentum=momentum)
        params, gradients = params_and_gradients()
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))

        def shard(leaf):
            even = leaf.ndim == 2 and leaf.shape[len(spec) - 1] % 2 == 0
            return jax.device_put(leaf, jax.NamedSharding(mesh, spec if even else jax.P()))

        local = run(tx, params, tx.init(params), gradients, 5)
        with jax.set_mesh(mesh):
            sharded = run(tx, *jax.tree.map(shard, (params, tx.init(params), gradients)), 5)
        assert len(sharded[0]["a"].index.sharding.device_set) == 2
        sharded, local = jax.tree.map(np.asarray, (sharded, local))
        stored = [(params["a"], params["b"]["kernel"]) for params, _ in (sharded, local)]
        chex.assert_trees_all_equal(*stored)
        if momentum is None:
            chex.assert_trees_all_equal(sharded, local)
        else:  # XLA:CPU contracts the recurrence of the momentum differently for other shapes.
            chex.assert_trees_all_close(sharded[1].momentum, local[1].momentum, atol=1e-8, rtol=1e-5)
        assert not np.array_equal(local[0]["a"].index, params["a"].index)

    @pytest.mark.parametrize("kind", ["msgpack", "orbax", "pickle", "copy"])
    @pytest.mark.parametrize("name", some(VARIANTS, ("stochastic", "8-bit moments").__contains__))
    def test_a_restart_continues_bit_for_bit(self, name, kind, tmp_path):
        tx = VARIANTS[name]()
        params, gradients = params_and_gradients(fraction_bits=8)
        through = run(tx, params, tx.init(params), gradients, 6)
        half = run(tx, params, tx.init(params), gradients, 3)
        if kind == "msgpack":
            fresh = (params, tx.init(params))
            half = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(half))
        elif kind == "pickle":
            half = pickle.loads(pickle.dumps(half))
        elif kind == "copy":
            half = copy.deepcopy(half)
        else:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "half", half)
                checkpointer.wait_until_finished()
                half = checkpointer.restore(tmp_path / "half", jax.eval_shape(lambda: half))
        chex.assert_trees_all_equal(run(tx, *half, gradients, 3), through)


class TestPlatforms:
    @pytest.mark.parametrize("dtypes", [["int8"], ["int8", "int8"], ["int16", "int8"], ["int16", "int16"]])
    def test_what_is_written_for_one_of_them_gives_the_bits_of_all(self, dtypes, monkeypatch):
        """The level is that of the largest of a row, whatever the compiler is given."""
        rng, shape = np.random.default_rng(0), (64, 32)
        magnitude = np.float32(np.exp2(rng.uniform(-150, 30, shape))).view(np.int32)
        magnitude[:, ::3], magnitude[7] = 0, 0
        indices = [jnp.asarray(rng.integers(-99, 99, shape), jnp.int32) for _ in dtypes]
        results, format = {}, ag.as_format("E4M3")
        for platform in ("cpu", "cuda", "default"):

            def choose(*args, default, p=platform, **branches):
                return branches.get(p, default)(*args)

            def levels(magnitude, *indices):
                return with_level(list(zip(indices, map(np.dtype, dtypes), strict=True)), magnitude, (64, 1), format)

            monkeypatch.setattr(jax.lax, "platform_dependent", choose)
            results[platform] = jax.jit(levels)(magnitude, *indices)
        for result in results.values():
            chex.assert_trees_all_equal(result, results["default"])
            chex.assert_trees_all_equal(result[0], [i.astype(d) for i, d in zip(indices, dtypes, strict=True)])


class TestStacks:
    """Layers that are stacked along the first axis are scanned, mapped and trained together."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("shape", "exponents"),
        [
            ((6, 4, 4), (6, 1, 1)),
            ((3, 3, 5, 16), (3, 3, 5, 1)),
            ((3, 3, 1, 4), (3, 3, 1, 1)),
            ((32, 2, 64), (32, 2, 1)),
            ((5000, 32), (5000, 1)),
        ],
    )
    def test_of_odd_shapes(self, shape, exponents):
        tx = VARIANTS["8-bit moments"]()
        update = jax.jit(tx.update)
        stack = ag.to_grid(0.1 * jax.random.normal(jax.random.key(0), (2, *shape)))
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(2)]
        assert layers[0].exponent.shape == exponents
        scanned = jax.lax.scan(lambda total, layer: (total + ag.from_grid(layer), None), jnp.zeros(shape), stack)[0]
        np.testing.assert_array_equal(scanned, ag.from_grid(layers[0]) + ag.from_grid(layers[1]))

        gradients = jax.random.normal(jax.random.key(1), stack.shape)
        mapped, _ = jax.jit(jax.vmap(tx.update))(gradients, jax.jit(jax.vmap(tx.init))(stack), stack)
        for i, layer in enumerate(layers):
            alone, _ = update(gradients[i], tx.init(layer), layer)
            chex.assert_trees_all_equal(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone)
        after, _ = run(tx, stack, tx.init(stack), gradients, 3)
        assert after.exponent.shape == (2, *exponents)
        moved = ag.from_grid(after, full=True) - ag.from_grid(stack, full=True)
        down = jnp.sign(moved) == -jnp.sign(gradients)
        assert float(down.mean()) > 0.1
        assert bool((down | (moved == 0)).all())

    def test_of_short_vectors_need_a_scale_of_each(self):
        stack = ag.to_grid(jnp.ones((3, 4)), scale=jnp.ones((3, 1)))
        total, _ = jax.lax.scan(lambda total, layer: (total + ag.from_grid(layer), None), jnp.zeros(4), stack)
        np.testing.assert_array_equal(total, 3)


class TestFlaxSerialization:
    """Another format, shape or dtype is refused."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"format": "E3M4"}, "stored format is 'float8_e3m4' but that of the target 'E3M4'"),
            ({"fraction_bits": 8}, "stored fraction_bits is 0 but that of the target 8"),
        ],
    )
    def test_into_another_grid(self, arguments, message):
        x = jnp.ones((2, 2))
        with pytest.raises(ValueError, match=message):
            flax.serialization.from_bytes(ag.to_grid(x, **arguments), flax.serialization.to_bytes(ag.to_grid(x)))

    def test_into_another_shape(self):
        blob = flax.serialization.to_bytes(ag.to_grid(jnp.ones((2, 2))))
        with pytest.raises(ValueError, match=r"stored index is int8\(2, 2\) but that of the target int8\(3, 2\)"):
            flax.serialization.from_bytes(ag.to_grid(jnp.ones((3, 2))), blob)


class TestOptaxContract:
    """Optax's conventions, for parameters that are integers."""

    @pytest.mark.parametrize(
        ("x64", "dtype"),
        some(
            [(x64, dtype) for x64 in (False, True) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)],
            (False, jnp.bfloat16).__eq__,
        ),
    )
    def test_state_and_updates_keep_the_dtypes_of_small_leaves_and_gradients(self, dtype, x64):
        with jax.enable_x64(x64):
            params, gradients = params_and_gradients()
            params["b"]["bias"] = params["b"]["bias"].astype(jnp.float64 if x64 else dtype)
            gradients = jax.tree.map(lambda g: g.astype(dtype), gradients)
            tx = ag.on_grid(optax.scale(-0.1), momentum=np.float64(0.9))
            state = tx.init(params)
            updates, after = tx.update(gradients, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(optax.apply_updates(params, updates), params)

    def test_state_and_updates_keep_their_description(self, tx):
        params, gradients = params_and_gradients()
        state = tx.init(params)
        updates, after = tx.update(gradients, state, params)
        chex.assert_trees_all_equal_structs(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        shapes = jax.eval_shape(tx.init, jax.eval_shape(lambda: params))
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, jax.eval_shape(lambda: state))

    @pytest.mark.parametrize("momentum", [None, 0.9])
    def test_traces_once_and_runs_in_scan(self, momentum):
        tx = ag.on_grid(optax.scale(-0.3), momentum=momentum)
        params, gradients = params_and_gradients()
        chex.clear_trace_counter()

        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(params, state):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        looped = (params, tx.init(params))
        for _ in range(4):
            looped = step(*looped)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, length=4))((params, tx.init(params)))
        chex.assert_trees_all_equal(scanned[0]["a"].index, looped[0]["a"].index)
        chex.assert_trees_all_close(scanned[0], looped[0], atol=1e-6)
        assert not np.array_equal(scanned[0]["a"].index, params["a"].index)

    def test_is_mapped_by_map_params(self, tx):
        params, _ = params_and_gradients()
        state = tx.init(params)
        mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
        chex.assert_trees_all_equal(mapped, state)

    def test_a_group_of_partition_may_be_empty(self):
        tx = optax.partition({label: ag.grid_adamw(1e-2) for label in ("all", "none")}, lambda params: "all")
        params = ag.to_grid({"kernel": jnp.ones((4, 8))})
        updates, _ = tx.update({"kernel": jnp.ones((4, 8))}, tx.init(params), params)
        assert (optax.apply_updates(params, updates)["kernel"].index != params["kernel"].index).any()

    def test_inside_are_masks_clipping_accumulation_and_guards(self):
        params, gradients = params_and_gradients()
        for inner in (
            optax.chain(optax.clip_by_global_norm(0.1), ADAM()),
            optax.masked(ADAM(), lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)),
            optax.MultiSteps(ADAM(), 2).gradient_transformation(),
            optax.apply_if_finite(ADAM(), 3),
            optax.inject_hyperparams(optax.adamw)(learning_rate=lambda count: 1e-2),
            ag.manifold_adamw(1e-2, format="float8_e4m3fn"),
        ):
            tx = ag.on_grid(inner)
            after, _ = run(tx, params, tx.init(params), gradients, 4)
            assert not np.array_equal(after["a"].index, params["a"].index)
        tx = ag.on_grid(optax.apply_if_finite(ADAM(), 3))
        bad = jax.tree.map(lambda g: g * jnp.nan, gradients)
        after, _ = run(tx, params, tx.init(params), bad, 1)
        chex.assert_trees_all_equal(after, params)

    def test_hands_the_scales_to_the_inner_transformation(self):
        params, gradients = params_and_gradients()
        seen = {}

        def update(updates, state, params=None, *, grid_scale, value):
            seen.update(scale=grid_scale, value=value)
            return updates, state

        tx = ag.on_grid(optax.GradientTransformationExtraArgs(lambda params: (), update))
        tx.update(gradients, tx.init(params), params, value=3.0)
        chex.assert_trees_all_equal(seen["scale"]["a"], params["a"].scale)
        assert seen["scale"]["b"]["bias"] == 1.0
        assert seen["value"] == 3.0

    def test_is_tracked_in_real_steps_outside_and_in_intended_ones_inside(self):
        params = ag.to_grid(
            {"w": jnp.full((2, 4), 1.25), "b": jnp.ones(3)}, "float8_e4m3fn", fraction_bits=1, scale=2.0**-7
        )
        gradients = {"w": jnp.full((2, 4), 0.3 * 2.0**-3), "b": jnp.full(3, 2.0**-23)}
        outside = optax.chain(ag.on_grid(optax.scale(1.0), rounding="nearest"), ag.track_ulp_position())
        inside = ag.on_grid(optax.chain(optax.scale(1.0), ag.track_ulp_position("float8_e4m3fn")), rounding="nearest")
        for tx, wanted in ((outside, 0.5), (inside, 0.3)):
            _, state = tx.update(gradients, tx.init(params), params)
            positions = optax.tree.get(state, "ulp_position")
            np.testing.assert_allclose(positions["w"], np.full((2, 4), wanted), rtol=1e-6)
        assert positions["b"].shape == (3,)
        with pytest.raises(ValueError, match="belongs inside of on_grid"):
            ag.stiffness_precondition().init(params)


class TestFlax:
    """The training loops of Flax, unchanged."""

    def test_linen_train_state(self):
        params, gradients = params_and_gradients()
        state = TrainState.create(apply_fn=None, params=params, tx=ag.on_grid(ADAM()))
        state = jax.jit(lambda state: state.apply_gradients(grads=gradients))(state)
        assert isinstance(state.params["a"], ag.GridArray)
        assert not np.array_equal(state.params["a"].index, params["a"].index)

    def test_nnx_state(self):
        model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(model, nnx.Param)
        params = ag.to_grid(state)
        tx = ag.on_grid(ADAM())

        def loss(floats):
            return jnp.mean(nnx.merge(graphdef, floats)(jnp.ones((4, 16))) ** 2)

        opt_state, losses = tx.init(params), []
        for _ in range(10):
            value, gradients = jax.value_and_grad(loss)(ag.from_grid(params))
            updates, opt_state = tx.update(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(value))
        assert losses[-1] < losses[0]


class TestBadInput:
    """What was expected, what came, what to do."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rounding": "up"}, "rounding must be 'stochastic' or 'nearest', got 'up'"),
            (
                {"rounding": "nearest", "momentum": 0.9},
                "got rounding='nearest': store the weights with fraction_bits=8",
            ),
            ({"momentum": 0.0}, r"momentum must be in \(0, 1\), got 0.0"),
            ({"seed": -1}, r"seed must be in \[0, 4294967295\], got -1"),
            ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ],
    )
    def test_of_on_grid(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ag.on_grid(optax.sgd(1.0), **arguments)

    def test_of_update(self):
        params, gradients = params_and_gradients()
        tx = ag.on_grid(optax.sgd(1.0))
        state = tx.init(params)
        with pytest.raises(ValueError, match="on_grid cannot store the steps of a line search, got value_fn"):
            tx.update(gradients, state, params, value_fn=lambda params: 0.0)
        with pytest.raises(ValueError, match="knows the scales of its parameters, got grid_scale: leave it out"):
            tx.update(gradients, state, params, grid_scale=1.0)
        with pytest.raises(ValueError, match="on_grid needs the parameters"):
            tx.update(gradients, state)
        with pytest.raises(
            ValueError, match=r"no parameter that is stored on a grid: make some with to_grid\(params\)"
        ):
            tx.update(gradients, state, ag.from_grid(params))
        with pytest.raises(ValueError, match=r"gradients with respect to from_grid\(params\), got GridArrays"):
            tx.update(params, state, params)
        with pytest.raises(ValueError, match=r"shapes of the params, got \(1,\) for \(8, 16\) at params\['a'\]"):
            tx.update(gradients | {"a": jnp.ones(1)}, state, params)
