"""Moments and weights in one byte against their own float32 twin: spikes, ranges, pauses, jumps, rows from zero."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import some

import altgrad_jax as ag
from altgrad_jax.factored import scale_by_factored_rms

SHAPE, STEPS, RATE = (64, 64), 2560, 1e-3
GRADIENT = 0.01 * (1 + 0.1 * jax.random.normal(jax.random.key(1), SHAPE))
WEIGHTS = 0.5 * jax.random.normal(jax.random.key(0), SHAPE)


def laprop(second_moment, accumulated=1):
    """AdamW without its momentum, which follows it in grid_adamw and in its float32 twin."""
    whole = optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)
    scaled = scale_by_factored_rms(0.999, 1e-8) if second_moment == "factored" else whole
    inner = optax.chain(scaled, optax.scale_by_learning_rate(RATE))
    return optax.MultiSteps(inner, accumulated) if accumulated > 1 else inner


def pair(name, accumulated=1):
    """A transformation with moments in one byte, and the same with float32 ones."""
    if name != "compress_state(adamw)":
        inner = laprop(name, accumulated)
        if accumulated == 1:
            tx = ag.grid_adamw(RATE, weight_decay=0.0, second_moment=name)
        else:
            tx = ag.on_grid(inner, momentum=0.9)
            tx = ag.compress_state(tx) if name == "8bit" else tx
        return tx, optax.chain(inner, optax.ema(0.9))
    adam = optax.adamw(RATE, weight_decay=0.0)
    adam = adam if accumulated == 1 else optax.MultiSteps(adam, accumulated)
    return ag.compress_state(adam), adam


@functools.cache
def runner(name, accumulated=1):
    """Both ways as a function of the gradients' factor per step and row, and of a spike per step: rows, element."""
    tx, twin = pair(name, accumulated)

    def way(tx, params):
        @jax.jit
        def run(gains, spikes):
            def step(carry, now):
                params, state = carry
                gain, spike = now
                gradient = (GRADIENT * gain[:, None]).at[3, 5].add(spike)
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), (gains, spikes))
            return ag.from_grid(params, full=True) - ag.from_grid(after, full=True)

        return run

    params = WEIGHTS if name == "compress_state(adamw)" else ag.to_grid(WEIGHTS, fraction_bits=8)
    return way(tx, params), way(twin, WEIGHTS)


def ways(name, gains=None, spikes=None, accumulated=1):
    gains = jnp.ones((STEPS, SHAPE[0])) if gains is None else gains
    spikes = jnp.zeros(len(gains)) if spikes is None else spikes
    return [np.asarray(run(gains, spikes), np.float64) for run in runner(name, accumulated)]


def close_by_rows(ours, twin):
    np.testing.assert_allclose(ours.mean(axis=1), twin.mean(axis=1), rtol=0.1)


@pytest.mark.parametrize("name", ["compress_state(adamw)", "8bit", "factored", "float32"])
class TestMoments:
    """Every row goes the way of float32 within 10 %: under `compress_state` and each second moment of grid_adamw."""

    @pytest.mark.parametrize("at", [0, 5, 1000])
    @pytest.mark.parametrize("size", some([1e2, 1e6, 1e8], (1e6).__eq__))
    def test_after_a_spike(self, name, size, at):
        """All other elements, also those of its row; the spiked one goes no further than they or its twin.

        Elements of other rows and columns go the way of a run without the spike.
        """
        ours, twin = ways(name, spikes=jnp.zeros(STEPS).at[at].set(size))
        beside = np.delete(np.arange(64), 3)[:, None], np.delete(np.arange(64), 5)
        np.testing.assert_allclose(ours[beside].mean(axis=1), ways(name)[1][beside].mean(axis=1), rtol=0.1)
        others = np.ones(SHAPE, bool)
        others[3, 5] = False
        for row in range(SHAPE[0]):
            np.testing.assert_allclose(ours[row][others[row]].mean(), twin[row][others[row]].mean(), rtol=0.1)
        assert abs(ours[3, 5]) <= 1.1 * max(np.max(ours[others]), abs(twin[3, 5]))

    def test_in_rows_of_all_sizes(self, name):
        sizes = 10.0 ** -jnp.repeat(jnp.arange(8), 8)
        close_by_rows(*ways(name, jnp.broadcast_to(sizes, (STEPS, SHAPE[0]))))

    @pytest.mark.parametrize("start", [10, 1000])
    def test_after_a_late_start(self, name, start):
        """Of half of the rows, and of all."""
        late = jnp.arange(STEPS) >= start
        close_by_rows(*ways(name, jnp.where(jnp.arange(64) % 2 == 0, late[:, None], 1)))
        close_by_rows(*ways(name, late[:, None] * jnp.ones(64)))

    @pytest.mark.slow
    def test_after_ten_thousand_steps(self, name):
        late = jnp.arange(10_240) >= 10_000
        close_by_rows(*ways(name, jnp.where(jnp.arange(64) % 2 == 0, late[:, None], 1)))

    @pytest.mark.parametrize("share", [0.02, 0.0015])
    def test_in_rows_that_are_rarely_seen(self, name, share):
        seen = jax.random.bernoulli(jax.random.key(2), share, (STEPS, 64)).at[100].set(True)
        ours, twin = ways(name, jnp.where(jnp.arange(64) % 2 == 0, seen, 1).astype(jnp.float32))
        np.testing.assert_allclose(ours[::2].mean(), twin[::2].mean(), rtol=0.1)
        close_by_rows(ours[1::2], twin[1::2])

    @pytest.mark.parametrize("factor", [100.0, 1e-4])
    def test_after_a_jump(self, name, factor):
        gains = jnp.where(jnp.arange(STEPS) < 500, 1.0, factor)
        close_by_rows(*ways(name, gains[:, None] * jnp.ones(64)))

    @pytest.mark.slow
    @pytest.mark.parametrize("accumulated", [8, 128])
    def test_inside_of_which_gradients_accumulate(self, name, accumulated):
        close_by_rows(*ways(name, accumulated=accumulated))

    @pytest.mark.parametrize("size", [1e19, 1e25, 3e38])
    def test_stay_finite(self, name, size):
        ours, _ = ways(name, spikes=jnp.zeros(STEPS).at[5].set(size))
        assert np.isfinite(ours).all()
        others = np.arange(64) != 3
        np.testing.assert_allclose(ours[others].mean(), ways(name)[1].mean(), rtol=0.1)


RECIPES = [(name, bits) for name in ("float8_e3m4", "float8_e4m3fn", "E2M5", "E0M7") for bits in (0, 8)]


@functools.partial(jax.jit, static_argnames=("momentum", "fixed"))
def moved(params, moves, momentum, fixed=False):
    """Parameters after these updates; with `fixed` under the exponents that they have."""
    tx = ag.on_grid(optax.scale(1.0), momentum=momentum)

    def step(carry, move):
        params, state = carry
        state = state._replace(exponent=params.exponent) if fixed else state
        updates, state = tx.update(move, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), moves)[0][0]


@jax.jit
def averaged(moves):
    """Where the float32 twin of a momentum that starts at zero ends."""
    twin, zero = optax.ema(0.9), jnp.zeros(moves.shape[1:])

    def step(carry, move):
        update, state = twin.update(move, carry[1])
        return (carry[0] + update, state), None

    return jax.lax.scan(step, (zero, twin.init(zero)), moves)[0][0]


@pytest.mark.parametrize(("name", "fraction_bits"), RECIPES)
class TestWeights:
    """Exponents follow what they scale."""

    @pytest.mark.parametrize("noise", [0.0, 0.2])
    def test_from_zero_end_as_under_a_fitted_scale(self, name, fraction_bits, noise):
        """As the `B` of LoRA, under a rate that falls to zero: the error of the same run with the final scale."""
        goal = 0.02 * jax.random.normal(jax.random.key(0), (64, 64))
        rate = jnp.linspace(1, 0, 300)[:, None, None] / 150
        moves = rate * (goal + noise * jax.random.normal(jax.random.key(1), (300, 64, 64)))
        momentum = None if fraction_bits else 0.9
        end = averaged(moves) if momentum else moves.sum(axis=0)
        # With a momentum in a leaf whose other rows are as large as 1.
        scale = ag.to_grid(jnp.ones((64, 64)), name).scale if momentum else None
        zero = ag.to_grid(jnp.zeros((64, 64)), name, fraction_bits=fraction_bits, scale=scale)
        error = lambda p: float(jnp.linalg.norm(ag.from_grid(p, full=True) - end))  # noqa: E731
        fitted = dataclasses.replace(zero, exponent=ag.to_grid(end, name, fraction_bits=fraction_bits).exponent)
        limit = 1.3 if momentum else 2.5 if name == "E0M7" else 1.8
        assert error(moved(zero, moves, momentum)) <= limit * error(moved(fitted, moves, momentum, fixed=True))

    @pytest.mark.parametrize("size", [1e-12, 3e-11])
    def test_that_are_nearly_zero_go_their_way(self, name, fraction_bits, size):
        """A row beside rows of 0.05 becomes 0 if that is its nearest number, and not in silence."""
        x = jnp.concatenate([jnp.full((1, 64), size), 0.05 * jax.random.normal(jax.random.key(0), (7, 64))])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            params = ag.to_grid(x, name, fraction_bits=fraction_bits)
        lost = not ag.from_grid(params, full=True)[0].any()
        assert lost == any("1 of 8 rows of params became 0, the first at (0, 0)" in str(w.message) for w in caught)
        assert lost or (name, size) == ("float8_e4m3fn", 3e-11)
        after = moved(params, 2.5e-4 * jnp.ones((200, 8, 64)), None if fraction_bits else 0.9)
        np.testing.assert_allclose(ag.from_grid(after)[0].mean(), 0.05, rtol=0.1)


@pytest.mark.parametrize(("name", "limit"), [("E0M7", 0.016), ("E2M5", 0.0105)])
def test_normal_weights_lose_little(name, limit):
    x = jax.random.normal(jax.random.key(0), (256, 256))
    error = jnp.linalg.norm(ag.from_grid(ag.to_grid(x, name)) - x) / jnp.linalg.norm(x)
    assert float(error) <= limit
