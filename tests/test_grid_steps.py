"""scale_by_grid_steps and grid_sgd: whole steps on the grid, unbiased, bounded, and nothing lost in silence."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import altgrad_jax as ag
from altgrad_jax.codec import encode, nan_index, rest_bits_of
from altgrad_jax.grid_steps import whole_steps

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "pytorch_golden.json").read_text())["grid_steps"]


def moved(tx, params, *updates):
    """Parameters and state after some updates."""
    state, update = tx.init(params), jax.jit(tx.update)
    for u in updates:
        steps, state = update(u, state, params)
        params = optax.apply_updates(params, steps)
    return params, state


class TestSteps:
    """Every weight moves by the rounded number of steps, from any number."""

    @pytest.mark.parametrize(("format", "fraction_bits"), [("float8_e4m3fn", 0), ("E7M0", 0), ("float8_e5m2", 3)])
    def test_from_every_number_by_every_number_of_steps(self, format, fraction_bits):
        top = ag.as_format(format).refined(fraction_bits).max_index
        index = np.arange(-top, top + 1)
        params = ag.to_grid(jnp.zeros((index.size, 1)), format, fraction_bits=fraction_bits, scale=1.0)
        params = dataclasses.replace(params, index=jnp.asarray(index[:, None], params.index.dtype))
        for steps in (-7, -1, 0, 1, 3, 10):
            after, state = moved(ag.scale_by_grid_steps(10), params, jnp.full((index.size, 1), float(steps)))
            np.testing.assert_array_equal(after.index[:, 0], np.clip(index + steps, -top, top))
            np.testing.assert_array_equal(after.exponent, params.exponent)
            assert state == ag.GridStepsState(1)

    def test_is_unbiased_over_all_random_words(self):
        bits = rest_bits_of(whole_steps(10))
        assert bits == 27

        @jax.jit
        def count(x, part):
            words = (jnp.arange(2**24, dtype=jnp.uint32) + (part << 24)) << (32 - bits)
            steps = encode(jnp.full(words.shape, x), 0, whole_steps(10), words)
            return jnp.sum(steps), steps.min(), steps.max()

        for x in map(np.float32, (0.3, -0.3, 2.0**-20, 2.75, -9.999, 0.5)):
            sums, lows, highs = np.array([count(x, jnp.uint32(part)) for part in range(8)]).T
            assert sums.sum() / 2.0**bits == float(x)
            assert (lows.min(), highs.max()) == (np.floor(x), np.ceil(x))

    def test_is_bounded(self):
        params = ag.to_grid(jnp.full((1, 4), 0.5), scale=1.0)
        after, state = moved(ag.scale_by_grid_steps(3), params, jnp.array([[100.0, -3e38, 2.0, 3.001]]))
        np.testing.assert_array_equal(after.index - params.index, [[3, -3, 2, 3]])
        assert int(state.grid_step) == 1

    def test_of_zero_moves_nothing(self):
        params = ag.to_grid(jax.random.normal(jax.random.key(0), (8, 16)))
        after, state = moved(ag.scale_by_grid_steps(), params, *[jnp.zeros((8, 16))] * 3)
        chex.assert_trees_all_equal(after, params)
        assert [int(count) for count in state] == [3]

    @pytest.mark.parametrize("fraction_bits", [0, 3, 9])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_that_are_not_finite_make_their_element_nan(self, fraction_bits, bad):
        params = ag.to_grid(jnp.array([[1.0, 1.0, -1.0, -1.0]]), fraction_bits=fraction_bits)
        after, _ = moved(ag.scale_by_grid_steps(), params, jnp.array([[bad, 1.0, bad, -1.0]]))
        np.testing.assert_array_equal(after.index[:, [0, 2]], nan_index(params.grid))
        np.testing.assert_array_equal((after.index - params.index)[:, [1, 3]], [[1, -1]])
        np.testing.assert_array_equal(jnp.isnan(ag.from_grid(after)), [[True, False, True, False]])
        np.testing.assert_array_equal(after.exponent, params.exponent)

    def test_leave_a_weight_that_is_nan(self):
        params = ag.GridArray(
            jnp.array([[-128] * 4 + [5]], jnp.int8), jnp.zeros((1, 1), jnp.int8), ag.as_format("E4M3")
        )
        after, _ = moved(ag.scale_by_grid_steps(), params, jnp.array([[4.0, -4.0, 0.0, np.nan, 4.0]]))
        np.testing.assert_array_equal(after.index, [[-128] * 4 + [9]])

    def test_draws_new_bits_for_every_seed_step_and_leaf(self):
        w = ag.to_grid(jnp.ones((16, 16)))
        params, half = {"a": w, "b": w}, {"a": jnp.full((16, 16), 0.5), "b": jnp.full((16, 16), 0.5)}
        draws = []
        for seed in (0, 1):
            tx = ag.scale_by_grid_steps(seed=seed)
            state = tx.init(params)
            for _ in range(2):
                steps, state = tx.update(half, state, params)
                draws += [np.asarray(steps["a"].index), np.asarray(steps["b"].index)]
        for i, one in enumerate(draws):
            assert 0.3 < one.mean() < 0.7
            assert all(0.3 < (one != other).mean() < 0.7 for other in draws[:i])

    def test_passes_other_parameters_by(self):
        params = {"kernel": ag.to_grid(jnp.ones((2, 2))), "bias": jnp.ones(2)}
        updates = {"kernel": jnp.ones((2, 2)), "bias": jnp.full(2, 0.25)}
        after, _ = moved(ag.scale_by_grid_steps(), params, updates)
        np.testing.assert_array_equal(after["bias"], [1.25, 1.25])


class TestGridSgd:
    """AltGrad's GridOptim on the numbers of the reference; its rate is a number of steps."""

    def test_follows_the_reference(self):
        params = ag.to_grid(jnp.array([[1.0, -0.5, 0.25, 2.0]]), "E4M3", scale=1.0)
        tx = ag.grid_sgd(1.0)
        state = tx.init(params)
        for golden in GOLDEN:
            updates, state = tx.update(jnp.array([golden["g"]]), state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_array_equal(ag.from_grid(params)[0], golden["w"])
            np.testing.assert_allclose(optax.tree.get(state, "trace")[0], golden["vel"], rtol=1e-6)
            # Nothing saturates here: what the reference counts as moved and as flipped are all changes of an index.
            assert [np.count_nonzero(updates.index)] * 2 == golden["ret"]

    def test_weight_decay_pulls_to_zero(self):
        params = ag.to_grid(jnp.array([[1.0, -1.0]]))
        after, _ = moved(ag.grid_sgd(2.0, 0.0, weight_decay=1.0), params, jnp.zeros((1, 2)))
        np.testing.assert_array_equal(after.index - params.index, [[-2, 2]])

    def test_learns_with_moments_in_one_byte(self):
        x = jax.random.normal(jax.random.key(0), (64, 8))
        target = x @ jax.random.normal(jax.random.key(1), (8, 4))
        loss = lambda w: jnp.mean((x @ w - target) ** 2)  # noqa: E731
        tx = ag.compress_state(ag.grid_sgd(optax.linear_schedule(2.0, 0.0, 150)), min_size=1)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(ag.from_grid(params)), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = ag.to_grid(jnp.zeros((8, 4)), "float8_e4m3fn", scale=2.0**-6)
        (after, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=150))((params, tx.init(params)))
        assert float(loss(ag.from_grid(after))) < 0.02 * float(loss(ag.from_grid(params)))

    def test_is_mapped_by_map_params(self):
        params = {"kernel": ag.to_grid(jnp.ones((2, 2))), "bias": jnp.ones(2)}
        tx = ag.grid_sgd(1.0)
        marked = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))
        chex.assert_trees_all_equal(optax.tree.get(marked, "trace"), jax.tree.map(jnp.ones_like, ag.from_grid(params)))


class TestBadInput:
    """Refused as early as possible."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_steps": 0}, r"max_steps must be in \[1, 1048576\], got 0"),
            ({"max_steps": 2.5}, "max_steps must be an integer, got 2.5"),
            ({"seed": -1}, r"seed must be in \[0, 4294967295\], got -1"),
            ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
            ({"weight_decay": -1.0}, r"weight_decay must be in \[0, inf\), got -1.0"),
            ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1.0"),
        ],
    )
    def test_of_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ag.grid_sgd(**{"learning_rate": 1.0} | arguments)

    def test_of_update(self):
        tx, params = ag.scale_by_grid_steps(), ag.to_grid(jnp.ones((2, 2)))
        state = tx.init(params)
        with pytest.raises(ValueError, match="scale_by_grid_steps needs the parameters"):
            tx.update(jnp.ones((2, 2)), state)
        with pytest.raises(ValueError, match="no parameter that is stored on a grid"):
            tx.update(jnp.ones((2, 2)), state, jnp.ones((2, 2)))
        with pytest.raises(
            ValueError, match=r"scale_by_grid_steps takes gradients with respect to from_grid\(params\)"
        ):
            tx.update(params, state, params)
        with pytest.raises(ValueError, match=r"shapes of the params, got \(2,\) for \(2, 2\)"):
            tx.update(jnp.ones(2), state, params)
