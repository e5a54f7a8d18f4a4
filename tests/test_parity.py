"""ManifoldAdamW against trajectories measured on the PyTorch reference, and its identities.

What each line of the reference is, in `altgrad/training/optimizer.py` of ParkerWilliams/altgrad at 7e74baf, and which
test stands for it:

| line | what | test |
|---|---|---|
| 56-62 | defaults | `test_defaults_are_those_of_the_reference` |
| 64-71 | errors | `test_errors.py::TestHyperparameters` |
| 114-120 | state of zeros, step from 1 | `TestTrajectories::test_weights_and_moments` |
| 125 | `manifold_aware=False` | `TestIdentities::test_unaware_is_adamw` |
| 126 | stiffness | `test_stiffness.py::TestStiffnessPrecondition::test_agrees_with_the_reference` |
| 128-132 | 1 at zero weights | `test_stiffness.py::...::test_at_zero_is_zero_stiffness` |
| 134 | its bound | `test_stiffness.py::...::test_is_bounded` |
| 136 | product with the gradient | `TestTrajectories::test_weights_and_moments` |
| 139 | stiffness and position are those of the weight before | `TestTrajectories::test_positions_by_increments` |
| 142-143 | decoupled weight decay | `TestTrajectories::test_weights_and_moments` |
| 146, 149 | moments | `TestTrajectories::test_weights_and_moments` |
| 152-161 | bias correction and update | `TestTrajectories::test_weights_with_a_float64_bias_correction` |
| 182-192 | position | `TestTrajectories::test_positions_by_increments` |
| 183 | half a ULP at negative powers of two: not copied | `test_stiffness.py::...::test_is_half_the_reference_at_...` |
| 186 | infinite after a move from zero: not copied | `TestIdentities::test_weights_at_and_across_zero_keep_...` |
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import altgrad_jax as ag

CASES = oracle.GOLDEN["manifold_adamw"]


def arguments(case):
    """The reference's arguments in our names; M = 7, which it treats as fixed point, is the uniform grid."""
    kw = dict(CASES[case]["kw"])
    ours = {"learning_rate": kw.pop("lr")}
    ours["b1"], ours["b2"] = kw.pop("betas", (0.9, 0.999))
    if kw.get("mantissa_bits") == 7:
        ours["format"] = "E0M7"
        del kw["mantissa_bits"]
    return ours | kw


def scale_by_adam_with_float64_bias_correction(b1, b2, eps):
    """As optax.scale_by_adam; the powers of the betas are float64, as in PyTorch."""

    def update(g, state, params=None):
        del params
        count = int(state.count) + 1
        mu, nu = b1 * state.mu + (1 - b1) * g, b2 * state.nu + (1 - b2) * g * g
        mu_hat, nu_hat = mu / np.float32(1 - b1**count), nu / np.float32(1 - b2**count)
        return mu_hat / (jnp.sqrt(nu_hat) + eps), optax.ScaleByAdamState(jnp.int32(count), mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def trajectory(tx, case):
    """Parameters, moments and positions after each step of a golden case, beside the golden ones."""
    w = jnp.asarray(CASES[case]["w0"], jnp.float32)
    state, before = tx.init(w), {"w": np.asarray(w, np.float64), "bit": np.zeros(w.shape)}
    ours_before = np.zeros(w.shape)
    for step, (g, golden) in enumerate(zip(CASES[case]["grads"], CASES[case]["steps"], strict=True), 1):
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, w)
        w = optax.apply_updates(w, updates)
        golden = {k: oracle.numbers(v) for k, v in golden.items()}
        ours = np.asarray(optax.tree.get(state, "ulp_position"), np.float64)
        yield step, w, state, golden, before, ours - ours_before, ours
        before, ours_before = golden, ours


def tolerance(case, step, golden, before):
    """2 ULP, and what float32 makes of 1 - 0.999, which Optax divides by: 1.6e-5 of the step, relative."""
    ulp = np.spacing(np.maximum(np.abs(golden["w"]), np.abs(before["w"])).astype(np.float32))
    return 2 * ulp + 3e-5 * CASES[case]["kw"]["lr"] * step


class TestTrajectories:
    """Weights, moments and positions of every golden case."""

    @pytest.mark.parametrize("case", CASES)
    def test_weights_and_moments(self, case):
        for step, w, state, golden, before, _, _ in trajectory(ag.manifold_adamw(**arguments(case)), case):
            difference = np.abs(np.asarray(w, np.float64) - golden["w"])
            assert (difference <= tolerance(case, step, golden, before)).all(), (step, difference)
            np.testing.assert_allclose(optax.tree.get(state, "mu"), golden["m"], rtol=1e-5)
            np.testing.assert_allclose(optax.tree.get(state, "nu"), golden["v"], rtol=1e-5)

    @pytest.mark.parametrize("case", CASES)
    def test_weights_with_a_float64_bias_correction(self, case):
        kw = arguments(case)
        stiffness = {k: kw[k] for k in ("mantissa_bits", "format", "max_stiffness") if k in kw}
        aware = kw.get("manifold_aware", True)
        tx = optax.chain(
            ag.stiffness_precondition(**stiffness) if aware else optax.identity(),
            scale_by_adam_with_float64_bias_correction(kw["b1"], kw["b2"], kw.get("eps", 1e-8)),
            optax.add_decayed_weights(kw.get("weight_decay", 0.01)),
            optax.scale_by_learning_rate(kw["learning_rate"]),
            ag.track_ulp_position(),
        )
        for step, w, _, golden, *_ in trajectory(tx, case):
            allowed = np.maximum(2 * np.spacing(np.abs(golden["w"]).astype(np.float32)), 2e-9)
            difference = np.abs(np.asarray(w, np.float64) - golden["w"])
            assert (difference <= allowed).all(), (step, difference)

    # Without manifold_M7: with a format we count its steps, and the reference float32 ULPs.
    @pytest.mark.parametrize("case", sorted(set(CASES) - {"manifold_M7"}))
    def test_positions_by_increments(self, case):
        for step, _, _, golden, before, increment, position in trajectory(ag.manifold_adamw(**arguments(case)), case):
            assert np.isfinite(position).all()
            counted = np.isfinite(golden["bit"])  # The reference has -inf for ever after a move from 0.
            with np.errstate(invalid="ignore"):
                reference = golden["bit"] - before["bit"]
            half_ulp = (before["w"] < 0) & (np.frexp(before["w"])[0] == -0.5)
            reference = np.where(half_ulp, reference / 2, reference)
            ulp = np.spacing(np.abs(np.where(counted, before["w"], 1.0)).astype(np.float32))
            accumulation = np.spacing(np.abs(position).astype(np.float32)) + np.spacing(
                np.abs(np.where(counted, golden["bit"], 0)).astype(np.float32)
            )
            allowed = tolerance(case, step, golden, before) / ulp + accumulation
            assert (np.abs(increment - reference) <= allowed)[counted].all(), (step, increment, reference)
            # The tolerance means something: it is a small part of what is counted.
            assert (allowed < 0.01 * np.abs(reference) + 8)[counted].all()


def run(tx, w, gradients):
    """Parameters after each of the gradients, in one compiled scan."""

    @jax.jit
    def scan(w):
        def step(carry, g):
            w, state = carry
            updates, state = tx.update(g, state, w)
            return (optax.apply_updates(w, updates), state), optax.apply_updates(w, updates)

        return jax.lax.scan(step, (w, tx.init(w)), gradients)

    return scan(w)


def test_defaults_are_those_of_the_reference():
    given = {name: p.default for name, p in inspect.signature(ag.manifold_adamw).parameters.items()}
    assert [given[name] for name in ("b1", "b2", "eps", "weight_decay", "manifold_aware")] == [
        0.9,
        0.999,
        1e-8,
        0.01,
        True,
    ]
    assert given["max_stiffness"] == 1e6
    w, g = jnp.array([0.7, -3.0, 0.0]), jnp.array([0.1, 1.0, -1.0])
    plain, given = (
        tx.update(g, tx.init(w), w)[0] for tx in (ag.manifold_adamw(0.1), ag.manifold_adamw(0.1, mantissa_bits=2))
    )
    np.testing.assert_array_equal(plain, given)


class TestIdentities:
    """What Adam does to a stiffness in front of it."""

    W = jax.random.normal(jax.random.key(0), (64,)) + jnp.where(jnp.arange(64) % 2, 1.0, -1.0)
    GRADIENTS = jax.random.normal(jax.random.key(1), (30, 64))

    def test_without_eps_no_mantissa_bits_change_a_bit(self):
        unbounded = functools.partial(ag.manifold_adamw, 0.01, eps=0.0, max_stiffness=float("inf"))
        every = [run(unbounded(mantissa_bits=m), self.W, self.GRADIENTS)[1] for m in range(7)]
        chex.assert_trees_all_equal(*every)
        assert not np.array_equal(every[0][-1], self.W)

    def test_constant_stiffness_is_adamw_with_eps_divided_by_it(self):
        w, g = jnp.full(64, 1.5), 1e-6 * self.GRADIENTS  # Such that eps counts.
        w = w + 0.1 * jnp.arange(64) / 64
        manifold = run(ag.manifold_adamw(1e-3, mantissa_bits=5, weight_decay=0.1), w, g)[1]
        adamw = run(optax.adamw(1e-3, eps=1e-8 * 2**5, weight_decay=0.1), w, g)[1]
        chex.assert_trees_all_close(manifold, adamw, rtol=1e-6)
        plain = run(optax.adamw(1e-3, weight_decay=0.1), w, g)[1]
        assert float(jnp.abs(manifold - plain).max()) > 1e-4

    def test_unaware_is_adamw(self):
        gradients = jnp.tile(self.GRADIENTS, (7, 1))[:200]
        ours = run(ag.manifold_adamw(1e-2, weight_decay=0.05, manifold_aware=False), self.W, gradients)[1]
        chex.assert_trees_all_close(ours, run(optax.adamw(1e-2, weight_decay=0.05), self.W, gradients)[1], rtol=1e-6)

    def test_is_the_four_names_chained_by_hand(self):
        by_hand = optax.chain(
            ag.stiffness_precondition(mantissa_bits=3),
            optax.scale_by_adam(),
            optax.add_decayed_weights(0.01),
            optax.scale_by_learning_rate(1e-2),
            ag.track_ulp_position("E4M3"),
        )
        named = optax.chain(
            ag.stiffness_precondition(mantissa_bits=3),
            *[optax.adamw(1e-2, weight_decay=0.01)],
            ag.track_ulp_position("E4M3"),
        )
        ours = run(by_hand, self.W, self.GRADIENTS)
        chex.assert_trees_all_equal(ours[1], run(named, self.W, self.GRADIENTS)[1])
        manifold = run(ag.manifold_adamw(1e-2, mantissa_bits=3), self.W, self.GRADIENTS)
        chex.assert_trees_all_equal(ours[1], manifold[1])

    def test_weights_at_and_across_zero_keep_finite_positions(self):
        w, g = jnp.array([0.0, 0.005, -0.005, -0.0]), jnp.array([[1.0, 1.0, -1.0, -1.0]] * 40)
        for format in (None, "float8_e4m3fn", "E0M7"):
            (w_end, state), path = run(ag.manifold_adamw(0.01, format=format), w, g)
            assert np.isfinite(optax.tree.get(state, "ulp_position")).all()
            assert np.all(np.sign(w_end[1:3]) == -np.sign(w[1:3]))
            assert np.isfinite(path).all()
