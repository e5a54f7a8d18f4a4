"""Diagnostics against numpy, exact arithmetic, the reference's recorded values, and their identities."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import altgrad_jax as ag
from altgrad_jax import diagnostics

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "pytorch_golden.json").read_text())
FORMAT = "float8_e4m3fn"


def floats(hexes):
    return jnp.array([float.fromhex(x) for x in hexes], jnp.float32)


def tree(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed))
    return {"a": scale * jax.random.normal(keys[0], (8, 16)), "b": [scale * jax.random.normal(keys[1], (5,))]}


def flat(x):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]).astype(np.float64)


class TestStallAndFlip:
    """Shares of the weights with a nonzero update, from what is stored before and after."""

    def test_of_a_step_of_on_grid(self):
        params = ag.to_grid(tree(0), where=lambda path, leaf: leaf.ndim == 2)
        update = jax.tree.map(lambda u: jnp.where(u > 0.5, 0, 0.02 * u), tree(1))
        tx = ag.on_grid(optax.identity())
        steps, _ = tx.update(update, tx.init(params), params)
        after = optax.apply_updates(params, steps)
        stall, flip = (f(update, params, after) for f in (diagnostics.stall_rate, diagnostics.flip_rate))
        meant = flat(update) != 0
        stayed = flat(ag.from_grid(params)) == flat(ag.from_grid(after))
        assert float(stall) == np.float32((meant & stayed).sum() / meant.sum())
        assert 0.1 < float(stall) < 0.99
        assert float(stall) + float(flip) == pytest.approx(1, abs=1e-7)
        jitted = jax.jit(diagnostics.stall_rate)(update, params, after)
        assert float(jitted) == float(stall)

    def test_without_an_update(self):
        assert np.isnan(diagnostics.stall_rate(jnp.zeros(3), jnp.ones(3), jnp.ones(3)))

    def test_sees_through_a_change_of_the_scale(self):
        before = ag.to_grid(jnp.ones((1, 2)), scale=1.0)
        after = ag.to_grid(jnp.ones((1, 2)), scale=2.0)
        assert float(diagnostics.flip_rate(jnp.ones((1, 2)), before, after)) == 0


class TestUlpDistance:
    """|after - before| over the spacing before."""

    def test_agrees_with_the_reference_but_at_negative_powers_of_two(self):
        golden = GOLDEN["ulp"]
        before, after, expected = (floats(golden[name]) for name in ("before", "after", "distance"))
        for b, a, distance in zip(before, after, expected, strict=True):
            ours = diagnostics.ulp_distance(b[None], a[None]).max
            # nextafter towards +inf is half an ULP there.
            assert float(ours) == float(distance) / (2 if float(b) == -1.0 else 1)

    @pytest.mark.parametrize("format", [None, "float8_e5m2"])
    def test_agrees_with_numpy(self, format):
        before, after = tree(0), tree(1)
        stats = jax.jit(diagnostics.ulp_distance, static_argnames="format")(before, after, format=format)
        x, y = flat(before), flat(after)
        spacing = np.abs(np.spacing(x.astype(np.float32))) if format is None else 2.0 ** (np.floor(np.log2(abs(x))) - 2)
        ulps = abs(y - x) / spacing
        expected = ulps.mean(), np.median(ulps), np.quantile(ulps, 0.99), ulps.max(), 0.0
        np.testing.assert_allclose(stats, expected, rtol=2e-5)

    def test_of_grid_arrays_is_in_their_own_scaled_steps(self):
        before = ag.to_grid(jnp.array([[1.0, 0.0, -4.0]]), "float8_e4m3fn", fraction_bits=2)
        after = ag.to_grid(jnp.array([[1.125, 0.0, -4.125]]), "float8_e4m3fn", fraction_bits=2, scale=before.scale)
        assert [float(x) for x in diagnostics.ulp_distance(before, after)][3:] == [1.0, np.float32(1 / 3)]


class TestGridAlignment:
    """Distance to the nearest number."""

    def test_agrees_with_an_exhaustive_search(self):
        values = np.asarray(ag.value(jnp.arange(-126.0, 127.0), FORMAT), np.float64)
        x = tree(2, 3.0)
        nearest = values[np.argmin(abs(flat(x)[:, None] / 0.5 - values), axis=1)] * 0.5
        ulps = abs(flat(x) - nearest) / (0.5 * np.asarray(ag.spacing(jnp.asarray(flat(x) / 0.5, jnp.float32), FORMAT)))
        aligned = diagnostics.grid_alignment(x, FORMAT, 0.5)
        np.testing.assert_allclose(aligned, [ulps.mean(), ulps.max(), (ulps == 0).mean()], rtol=1e-6)
        assert float(aligned.max_ulps) <= 0.5

    def test_of_what_is_on_the_grid(self):
        aligned = diagnostics.grid_alignment(ag.fake_quantize(tree(0)["a"], FORMAT, 1.0), FORMAT)
        assert [float(x) for x in aligned] == [0, 0, 1]


class TestGradientStiffness:
    """Correlation, ratio and order of gradients and spacings."""

    def test_agrees_with_the_reference(self):
        golden = GOLDEN["grad_stiff_corr"]
        grid = ag.FloatFormat("m2", exponent_bits=7, mantissa_bits=2, bias=63, max=2.0**60)  # As good as unbounded.
        ours = diagnostics.gradient_stiffness(floats(golden["g"]), floats(golden["w"]), grid)
        names = ("grad_stiff_correlation", "grad_stiff_ratio_mean", "grad_below_stiffness_frac")
        np.testing.assert_allclose(ours, [golden["M2"][name] for name in names], rtol=1e-6)

    def test_agrees_with_numpy(self):
        g, w = tree(3), tree(4)
        spacing = flat(ag.spacing(jnp.asarray(flat(w), jnp.float32), FORMAT))
        magnitude = abs(flat(g))
        expected = np.corrcoef(magnitude, spacing)[0, 1], (magnitude / spacing).mean(), (magnitude < spacing).mean()
        np.testing.assert_allclose(diagnostics.gradient_stiffness(g, w, FORMAT), expected, rtol=2e-5)

    def test_of_grid_arrays_is_in_their_own_scaled_steps(self):
        w = ag.to_grid(tree(4), FORMAT, where=lambda path, leaf: True, scale=2.0**-4)
        plain = jax.tree.map(lambda x: x * 2.0**4, ag.from_grid(w))
        ours = diagnostics.gradient_stiffness(tree(3), w)
        expected = diagnostics.gradient_stiffness(jax.tree.map(lambda g: g * 2.0**4, tree(3)), plain, FORMAT)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


class TestShares:
    """Saturated and subnormal numbers."""

    def test_of_arrays(self):
        x = {"a": jnp.array([448.0, 447.0, -448.0, 1e9]), "b": jnp.array([0.0, 2.0**-6, 2.0**-7, -(2.0**-9)])}
        assert float(diagnostics.saturation_share(x, FORMAT)) == 3 / 8
        assert float(diagnostics.subnormal_share(x, FORMAT)) == 2 / 8
        assert float(diagnostics.subnormal_share(x["b"], "E0M7")) == 3 / 4
        assert float(diagnostics.saturation_share(x, FORMAT, 2.0)) == 1 / 8
        assert float(diagnostics.subnormal_share(x, FORMAT, 2.0)) == 3 / 8

    def test_of_grid_arrays(self):
        x = ag.GridArray(
            jnp.array([[126, -126, 125, 7, 8, 0]], jnp.int8), jnp.full((1, 1), -1, jnp.int8), ag.as_format(FORMAT), 0
        )
        assert float(diagnostics.saturation_share(x)) == np.float32(2 / 6)
        assert float(diagnostics.subnormal_share(x)) == np.float32(1 / 6)
        plain = ag.from_grid(x)
        np.testing.assert_array_equal(plain, 0.5 * ag.value(x.index.astype(jnp.float32), FORMAT))
        assert diagnostics.saturation_share(plain, FORMAT, 0.5) == diagnostics.saturation_share(x)
        assert diagnostics.subnormal_share(plain, FORMAT, 0.5) == diagnostics.subnormal_share(x)

    def test_of_a_whole_state(self):
        """Moments are read in it, and step counters and exponents are left out."""
        tx = ag.grid_adamw(5.0, second_moment="8bit")
        params = ag.to_grid(jax.random.normal(jax.random.key(0), (64, 64)))
        updates, state = tx.update(jnp.ones((64, 64)), tx.init(params), params)
        moments = [state.inner_state.momentum, state.inner_state.inner_state[0].nu]
        saturated = sum(int((jnp.abs(m.index.astype(jnp.int32)) == m.format.max_index).sum()) for m in moments)
        assert saturated > 0  # A momentum that owes 10 is beyond a quarter of the largest number of most rows.
        assert float(diagnostics.saturation_share(state)) == np.float32(saturated / (2 * 64 * 64))
        after = optax.apply_updates(params, updates)
        _, later = tx.update(jnp.ones((64, 64)), state, after)
        meant = jax.tree.map(jnp.ones_like, moments[0].value())
        flips = np.asarray(later.inner_state.momentum.value() != moments[0].value())
        rate = diagnostics.flip_rate(meant, [moments[0], state.moment_step], [later.inner_state.momentum, 1])
        assert float(rate) == np.float32(flips.mean())


class TestCapacity:
    """Distinct numbers and their entropy."""

    def test_agrees_with_numpy(self):
        x = ag.to_grid(tree(5), FORMAT, where=lambda path, leaf: True)
        indices = np.concatenate([np.ravel(leaf.index) for leaf in (x["a"], x["b"][0])])
        counts = np.unique(indices, return_counts=True)[1] / indices.size
        used = diagnostics.capacity(x)
        assert (int(used.codes_used), used.codes) == (counts.size, 253)
        np.testing.assert_allclose(used.entropy, -(counts * np.log2(counts)).sum(), rtol=1e-5)

    def test_of_every_number_once(self):
        values = ag.value(jnp.arange(-126.0, 127.0), FORMAT)
        used = diagnostics.capacity(4.0 * values, FORMAT, 4.0)
        assert int(used.codes_used) == 253
        np.testing.assert_allclose(used.entropy, np.log2(253), rtol=1e-6)

    def test_refuses_a_tree_of_several_formats(self):
        x = [ag.to_grid(jnp.ones((1, 2)), "E4M3"), ag.to_grid(jnp.ones((1, 2)), "E5M2")]
        with pytest.raises(ValueError, match=r"a tree of one format, got \['E4M3', 'E5M2'\]"):
            diagnostics.capacity(x)
        with pytest.raises(ValueError, match="GridArrays have a format of their own, E4M3, and exclude format=E5M2"):
            diagnostics.capacity(x[0], "E5M2")


class TestRanks:
    """Stable, effective and variance rank."""

    def test_agree_with_the_reference(self):
        x = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        np.testing.assert_allclose(diagnostics.stable_rank(x), GOLDEN["rank"]["diag321"]["stable"], rtol=1e-6)
        np.testing.assert_allclose(diagnostics.effective_rank(x), GOLDEN["rank"]["diag321"]["effective"], rtol=1e-6)

    def test_of_an_orthogonal_matrix_are_its_size(self):
        q = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (24, 24)))[0]
        for rank in (diagnostics.stable_rank, diagnostics.effective_rank, diagnostics.variance_rank):
            np.testing.assert_allclose(rank(q), 24, rtol=1e-5)

    def test_agree_with_numpy_on_stacks(self):
        x = jax.random.normal(jax.random.key(0), (3, 7, 11)) * jnp.exp2(-jnp.arange(11.0))
        sigma = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
        p, part = sigma / sigma.sum(-1, keepdims=True), np.cumsum(sigma**2, -1) / (sigma**2).sum(-1, keepdims=True)
        np.testing.assert_allclose(diagnostics.stable_rank(x), (sigma**2).sum(-1) / sigma[:, 0] ** 2, rtol=1e-5)
        np.testing.assert_allclose(diagnostics.effective_rank(x), np.exp(-(p * np.log(p)).sum(-1)), rtol=1e-5)
        np.testing.assert_array_equal(diagnostics.variance_rank(x), 1 + (part < 0.99).sum(-1))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_of_nan_are_nan(self, bad):
        x = jnp.stack([jnp.eye(3), jnp.eye(3).at[0, 1].set(bad)])
        for rank in (diagnostics.stable_rank, diagnostics.effective_rank, diagnostics.variance_rank):
            np.testing.assert_array_equal(jnp.isnan(rank(x)), [False, True])


class TestEffectiveDescentQuality:
    """1 if all arrives, 0 if nothing does; movement at right angles does not count."""

    def test_of_simple_movements(self):
        u, w = tree(0), tree(1)
        quality = lambda after: float(diagnostics.effective_descent_quality(u, w, after))  # noqa: E731
        np.testing.assert_allclose(quality(jax.tree.map(jnp.add, w, u)), 1, rtol=1e-6)
        assert quality(w) == 0
        np.testing.assert_allclose(quality(jax.tree.map(lambda w, u: w - 0.5 * u, w, u)), -0.5, rtol=1e-5)
        u = jnp.array([1.0, 0.0])
        assert float(diagnostics.effective_descent_quality(u, jnp.zeros(2), jnp.array([0.0, 5.0]))) == 0

    def test_tells_stochastic_rounding_from_nearest(self):
        """Over a window nearest loses updates that are smaller than half a step, and unbiased rounding does not."""
        update = 0.002 * jnp.ones((16, 64))
        params = ag.to_grid(1 + 0.5 * jax.random.uniform(jax.random.key(0), (16, 64)))
        quality = {}
        for rounding in ("nearest", "stochastic"):
            tx = ag.on_grid(optax.identity(), rounding=rounding)

            def step(carry, _, tx=tx):
                params, state = carry
                updates, state = tx.update(update, state, params)
                return (optax.apply_updates(params, updates), state), None

            (after, _), _ = jax.jit(lambda c, step=step: jax.lax.scan(step, c, length=50))((params, tx.init(params)))
            quality[rounding] = float(diagnostics.effective_descent_quality(50 * update, params, after))
        assert quality["nearest"] == 0
        assert abs(quality["stochastic"] - 1) < 0.1


class TestPredictFreeze:
    """From a float32 trajectory, when nearest rounding without memory would stop every weight."""

    @pytest.mark.parametrize("fraction_bits", [0, 3])
    def test_is_exact_for_constant_gradients(self, fraction_bits):
        """SGD with a decaying rate on the grid makes the same steps: its gradients do not depend on the weights."""
        schedule = optax.exponential_decay(0.25, 5, 0.5, staircase=True)
        # All sums are exact, and one number per row keeps its scale.
        g, start = jnp.round(16 * tree(0)["a"]).at[:, 0].set(0) / 64, jnp.clip(tree(1)["a"], -1, 1).at[:, 0].set(2.5)
        params = ag.to_grid(start, FORMAT, fraction_bits=fraction_bits, scale=2.0**-6)
        start = ag.from_grid(params, full=True)
        tx, trace, last = ag.on_grid(optax.sgd(schedule), rounding="nearest"), [start], np.zeros(g.shape, int)
        state = tx.init(params)
        update = jax.jit(tx.update)
        for i in range(40):
            updates, state = update(g, state, params)
            assert not updates.exponent.any(), "No scale may change, because the prediction keeps them."
            last[np.asarray(updates.index) != 0] = i + 1
            params = optax.apply_updates(params, updates)
            trace.append(trace[-1] - np.float32(schedule(i)) * g)
        freeze = diagnostics.predict_freeze(jnp.stack(trace), FORMAT, scale=params.scale, fraction_bits=fraction_bits)
        np.testing.assert_array_equal(freeze.last_move, last)
        assert float(freeze.never_share) == (last == 0).mean()
        assert len(np.unique(last)) > 5

    def test_of_a_real_run(self):
        """AdamW on teacher and student: within 2 % of the steps, and 2 points of the share that never moves."""
        x = jax.random.normal(jax.random.key(0), (256, 16))
        target = jnp.tanh(x @ jax.random.normal(jax.random.key(1), (16, 32)) / 4)
        loss = lambda w: jnp.mean((jnp.tanh(x @ w) - target) ** 2)  # noqa: E731
        params = ag.to_grid(jax.random.normal(jax.random.key(2), (16, 32)) / 4, "float8_e4m3fn")
        adam = optax.adamw(optax.linear_schedule(1e-2, 0.0, 300))
        tx = ag.on_grid(adam, rounding="nearest")

        def step(carry, _):
            (w, inner), (q, state) = carry
            u, inner = adam.update(jax.grad(loss)(w), inner, w)
            steps, state = tx.update(jax.grad(loss)(ag.from_grid(q)), state, q)
            w = optax.apply_updates(w, u)
            return ((w, inner), (optax.apply_updates(q, steps), state)), (w, steps.index != 0)

        w = ag.from_grid(params)
        carry = (w, adam.init(w)), (params, tx.init(params))
        _, (trace, moves) = jax.jit(lambda c: jax.lax.scan(step, c, length=300))(carry)
        last = np.max(np.asarray(moves) * np.arange(1, 301)[:, None, None], axis=0)
        freeze = diagnostics.predict_freeze(jnp.concatenate([w[None], trace]), FORMAT, scale=params.scale)
        predicted = np.asarray(freeze.last_move)
        assert abs(float(freeze.never_share) - (last == 0).mean()) < 0.02
        assert abs(last.mean() - predicted.mean()) < 0.02 * 300
