"""The factored second moment against Optax's, and what it does where Optax's does harm."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import some

from altgrad_jax.factored import _first, matrix_axes, scale_by_factored_rms

B2, EPS = 0.99, 1e-8
SHAPE, STEPS = (64, 128), 1200


def optax_factored(b2=B2, eps=EPS):
    """Optax's, with the same decay rates and eps, for leaves of any size."""

    def rate(t, b):
        t = jnp.float32(t)
        return b * (1 - b**t) / (1 - b ** (t + 1))

    return optax.scale_by_factored_rms(decay_rate=b2, min_dim_size_to_factor=1, epsilon=eps**2, decay_rate_fn=rate)


OURS, THEIRS, OPTAX_98 = scale_by_factored_rms(B2, EPS), optax_factored(), optax_factored(0.98)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnums=0)
def updates_of(tx, gradients):
    """Updates of a leaf for gradients `[steps, ...]`, and the state after them."""
    like = jnp.zeros(gradients.shape[1:], gradients.dtype)

    def step(state, gradient):
        updates, state = tx.update(gradient, state, like)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(like), gradients)
    return updates, state


@functools.partial(jax.jit, static_argnums=0)
def last_update(tx, gradient):
    """After 250 steps of the same gradient."""
    step = lambda _, carry: tx.update(gradient, carry[1], gradient)  # noqa: E731
    return jax.lax.fori_loop(0, 250, step, tx.update(gradient, tx.init(gradient), gradient))[0]


class TestMatrices:
    """Which axes the means keep."""

    @pytest.mark.parametrize(
        ("shape", "axes"),
        [
            ((4, 6), (0, 1)),
            ((50000, 32), (0, 1)),
            ((48, 32, 32), (1, 2)),  # More layers than rows.
            ((32, 4096, 11008), (1, 2)),
            ((6, 4, 4), (1, 2)),
            ((768, 12, 64), (0, 2)),  # A kernel of attention, and its way back.
            ((12, 64, 768), (1, 2)),
            ((3072, 16, 256), (0, 2)),  # With more heads than its width has room for.
            ((4096, 8, 128), (0, 2)),
            ((24, 768, 12, 64), (1, 3)),
            ((3, 3, 64, 128), (2, 3)),
            ((3, 3, 1, 16), (1, 3)),
            ((512, 512, 1, 1), (0, 1)),  # Convolutions in the order of Equinox and PyTorch.
            ((512, 256, 3, 3), (0, 1)),
            ((512, 512, 3), (0, 1)),
            ((768, 3, 768), (0, 2)),  # Query, key and value in one.
            ((32, 8, 1024), (1, 2)),  # A stack of LoRA's.
        ],
    )
    def test_of_a_shape(self, shape, axes):
        assert matrix_axes(shape) == axes

    @pytest.mark.parametrize("shape", some([((5, 4, 4),), ((16, 6, 6),), ((3, 3, 8, 16),)], ((5, 4, 4),).__eq__))
    def test_in_a_stack_are_as_by_themselves(self, shape):
        assert matrix_axes(shape) == (len(shape) - 2, len(shape) - 1)
        gradients = draw(0, 20, *shape).at[:10, 1].set(0)  # A layer that starts late,
        gradients = gradients.at[10:].multiply(1e3)  # when the means of the others bound their squares.
        together, state = updates_of(OURS, gradients)
        matrices = gradients.reshape(20, -1, *shape[-2:])
        for i in range(matrices.shape[1]):
            alone, _ = updates_of(OURS, matrices[:, i])
            np.testing.assert_allclose(together.reshape(matrices.shape)[:, i], alone, rtol=1e-5)
        assert state.row.shape == (*shape[:-1], 1)
        assert state.column.shape == (*shape[:-2], 1, shape[-1])

    def test_under_vmap(self):
        """Up to the order of the sums."""
        tx, gradients = OURS, draw(0, 20, 5, 4, 16)
        mapped, _ = jax.vmap(functools.partial(updates_of, tx), in_axes=1)(gradients)
        np.testing.assert_allclose(mapped, jnp.moveaxis(updates_of(tx, gradients)[0], 1, 0), rtol=1e-6)


class TestOptax:
    """Without outliers it is Optax's, within a few roundings of float32."""

    @pytest.mark.parametrize("shape", [(), (7,), (1, 1), (64, 1), (1, 64), (64, 48), (96, 4, 32)])
    @pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-2, 1e9])
    def test_gives_these_updates(self, shape, size):
        gradients = size * draw(0, 30, *shape)
        ours, theirs = (updates_of(tx, gradients)[0] for tx in (OURS, THEIRS))
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)

    @pytest.mark.parametrize("eps", [1e-3, 1e-8, 1e-12])
    @pytest.mark.parametrize("b2", [0.0, 0.9, 0.999])
    def test_for_every_hyperparameter(self, b2, eps):
        gradients = 1e-3 * draw(0, 30, 16, 8)
        ours, theirs = (
            updates_of(scale_by_factored_rms(b2, eps), gradients)[0],
            updates_of(optax_factored(b2, eps), gradients)[0],
        )
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)


class TestMeans:
    """Averages without a bias, in float32."""

    def test_of_constant_gradients_are_their_squares_at_every_step(self):
        rows, columns = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 0.5, 0.25])
        gradient = rows[:, None] * columns
        tx = scale_by_factored_rms(0.999, EPS)
        for steps in (1, 2, 100):
            updates, state = updates_of(tx, jnp.broadcast_to(gradient, (steps, 4, 3)))
            np.testing.assert_allclose(state.row[:, 0], (gradient**2).mean(1), rtol=1e-4)
            np.testing.assert_allclose(state.column[0], (gradient**2).mean(0), rtol=1e-4)
            np.testing.assert_allclose(updates, 1, rtol=1e-4)
        assert state.count == 100

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_of_narrow_leaves_do_not_freeze(self, dtype):
        """Under b2 = 0.999 a mean in their dtype would stand still."""
        tx = scale_by_factored_rms(0.999, EPS)
        gradients = jnp.concatenate([jnp.full((10, 8, 8), 2.0), jnp.full((3000, 8, 8), 1.0)]).astype(dtype)
        updates, state = updates_of(tx, gradients)
        assert (state.row.dtype, state.column.dtype, updates.dtype) == (jnp.float32, jnp.float32, dtype)
        np.testing.assert_allclose(state.row, 1, rtol=0.01)
        # Gradients of narrow dtype for float32 parameters, as those of GridArrays are, do not narrow the update.
        assert tx.update(gradients[0], state, jnp.zeros((8, 8)))[0].dtype == jnp.float32

    def test_of_zeros(self):
        """Rows, columns, leaves and no eps: nothing moves, and nothing is NaN."""
        for eps in (0.0, EPS):
            gradients = draw(0, 20, 8, 8).at[:, 3].set(0).at[:, :, 5].set(0)
            updates, _ = updates_of(scale_by_factored_rms(B2, eps), gradients)
            assert jnp.isfinite(updates).all()
            assert not updates[:, 3].any()
            assert not updates[:, :, 5].any()
            updates, state = updates_of(scale_by_factored_rms(B2, eps), jnp.zeros((20, 8, 8)))
            assert not updates.any()
            assert not state.row.any()

    def test_of_squares_beyond_float32_are_finite(self):
        updates, state = updates_of(OURS, jnp.full((20, 64, 64), 3e38))
        assert float(state.row.max()) == float(state.column.max()) == 2.0**100
        assert jnp.isfinite(updates).all()

    def test_are_kept_by_a_norm_of_nan(self):
        """XLA:CPU drops NaN from a clip between traced numbers where only a reduction reads it."""
        gradient = draw(0, 64, 64).at[2, 3].set(jnp.nan)
        norm = jax.jit(lambda g, state: optax.tree.norm(OURS.update(g, state, g)[0]))
        assert jnp.isnan(norm(gradient, OURS.init(gradient)))

    def test_in_double_precision(self):
        """Gradients of float64 for parameters of float32, and float64 for both."""
        with jax.enable_x64(True):
            gradient = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)))
            for like in (gradient, gradient.astype(jnp.float32)):
                state = OURS.init(like)
                updates, after = jax.jit(OURS.update)(gradient, state, like)
                assert (updates.dtype, after.row.dtype) == (jnp.float64, like.dtype)
                chex.assert_trees_all_equal_shapes_and_dtypes(state, after)

    def test_inside_of_shard_map(self):
        """Of each shard by itself, from a state that is made inside."""
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        gradients = draw(0, 5, 2, 8, 16)
        run = jax.jit(
            jax.shard_map(
                lambda g: OURS.update(g, OURS.init(g), g)[0], mesh=mesh, out_specs=jax.P("d"), in_specs=jax.P("d")
            )
        )
        np.testing.assert_allclose(
            run(gradients[0])[1], OURS.update(gradients[0, 1:], OURS.init(gradients[0, 1:]))[0][0], rtol=1e-6
        )

    def test_of_a_tree_with_nothing_in_it(self):
        tx = OURS
        assert tx.update({}, tx.init({}), {})[0] == {}
        updates, state = tx.update(
            {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)}, tx.init({"a": jnp.zeros((0, 3)), "b": jnp.ones(2)})
        )
        assert updates["a"].shape == (0, 3)
        chex.assert_tree_all_finite(state)
        np.testing.assert_allclose(updates["b"], 1)

    def test_under_jit_are_those_of_eager_steps(self):
        """To the last bits of the decay rate."""
        tx, gradients = OURS, {"a": draw(0, 16, 8), "b": draw(1, 8)}
        eager, compiled = tx.init(gradients), tx.init(gradients)
        for _ in range(3):
            (now, eager), (then, compiled) = tx.update(gradients, eager), jax.jit(tx.update)(gradients, compiled)
        chex.assert_trees_all_close((now, eager), (then, compiled), rtol=3e-7)


@functools.cache
def runner(ours):
    tx = scale_by_factored_rms(0.999, EPS) if ours else optax_factored(0.999)

    @jax.jit
    def run(gain, spike, place=(3, 5)):
        """Sum of the updates; gain of the rows `[steps, 64]`, spikes `[steps]`."""

        def step(state, now):
            gradient = (GRADIENT * now[0][:, None]).at[place].set(jnp.where(now[1] == 0, GRADIENT[place], now[1]))
            updates, state = tx.update(gradient, state, GRADIENT)
            return state, updates

        return jax.lax.scan(step, tx.init(GRADIENT), (gain, spike))[1].sum(axis=0)

    return run


GRADIENT = 0.01 * (1 + 0.1 * draw(0, *SHAPE))
EVEN = jnp.ones((STEPS, SHAPE[0]))
NONE = jnp.zeros(STEPS)
OTHERS = np.ones(SHAPE, bool)
OTHERS[3], OTHERS[:, 5] = False, False


def way(gain=EVEN, spike=NONE, ours=True):
    return np.asarray(runner(ours)(gain, spike), np.float64)


class TestOutliers:
    """One element that is far larger than all others changes little except itself."""

    @pytest.mark.parametrize("at", [0, 5, 1000])
    @pytest.mark.parametrize("size", [1e2, 1e6, 1e8, 1e19, 3e38])
    def test_leave_the_others_alone(self, size, at):
        """Which move a hundred times too far with Optax's; in its row and column by 15 %."""
        spike, plain = NONE.at[at].set(size), way()
        ratio = way(spike=spike) / plain
        np.testing.assert_allclose(ratio[OTHERS], 1, rtol=0.02)
        for line in (3, np.delete(np.arange(128), 5)), (np.delete(np.arange(64), 3), 5):
            assert abs(ratio[line].mean() - 1) <= 0.15
        assert abs(way(spike=spike)[3, 5] - plain[3, 5]) <= max(40, 0.2 * plain[3, 5])

    def test_of_a_million_times_the_others(self):
        gradients = jnp.ones((6, *SHAPE)).at[5, 3, 5].set(1e6)
        ours, theirs = (float(updates_of(tx, gradients)[0][5, 0, 0]) for tx in (OURS, THEIRS))
        assert (ours, theirs) == (pytest.approx(1, abs=0.005), pytest.approx(4500, rel=0.03))

    @pytest.mark.parametrize("shape", [(1024, 8), (8, 1024), (64, 64)])
    def test_raise_both_means_by_a_quarter(self, shape):
        _, before = updates_of(OURS, jnp.ones((300, *shape)))
        _, after = OURS.update(jnp.ones(shape).at[3, 5].set(1e6), before)
        least = 0.01 * (100 - 1) / np.array(shape[::-1])  # Of a square as large as 1 / (1 - b2) times its matrix.
        for name, alone in zip(("row", "column"), least, strict=True):
            rise = float((getattr(after, name) / getattr(before, name)).max())
            assert 1.0 < rise <= max(1.251, 1 + alone)

    def test_in_a_row_of_zeros_and_a_column_of_small_gradients(self):
        """A product of two small means is far below its square: the update is bounded."""
        gradients = (1e-2 * draw(0, 200, 64, 64)).at[:, 3].set(0).at[:, :, 5].multiply(1e-6).at[100, 3, 5].set(0.3)
        updates, _ = updates_of(scale_by_factored_rms(0.999, EPS), gradients)
        assert float(jnp.abs(updates).max()) == pytest.approx(0.001**-0.5 * (1 - 0.999**101) ** 0.5, rel=1e-3)
        assert float(updates_of(optax_factored(0.999), gradients)[0].max()) > 200

    @pytest.mark.parametrize("at", [0, 7])
    @pytest.mark.parametrize(("bad", "update"), [(np.nan, np.nan), (np.inf, 32**0.5), (-np.inf, -(32**0.5))])
    def test_that_are_not_finite_are_so_by_themselves(self, bad, update, at):
        gradients = draw(0, 20, 16, 16)
        spoilt, _ = updates_of(OURS, gradients.at[at, 2, 3].set(bad))
        clean, _ = updates_of(OURS, gradients)
        np.testing.assert_allclose(spoilt[at, 2, 3], update, rtol=1e-6)
        assert jnp.isfinite(spoilt.at[at, 2, 3].set(0)).all()
        rest = np.ones((16, 16), bool)
        rest[2], rest[:, 3] = False, False
        np.testing.assert_allclose(spoilt[:, rest], clean[:, rest], rtol=0.1)

    def test_do_not_stop_at_once_what_grows_for_good(self):
        """Gradients 100 times larger from a step on are updates of 1 again, a few steps after Optax's."""
        gain = jnp.where(jnp.arange(STEPS) < 500, 1.0, 100.0)[:, None] * EVEN
        ours, theirs = way(gain), way(gain, ours=False)
        assert 1 < ours.mean() / theirs.mean() < 1.2

    @pytest.mark.parametrize("start", [1, 10, 1000])
    def test_are_not_what_starts_late(self, start):
        """Rows and whole leaves whose first gradients come after others go as far as with Optax's."""
        late = (jnp.arange(STEPS) >= start).astype(jnp.float32)[:, None]
        for gain in (jnp.where(jnp.arange(64) % 2 == 0, late, 1.0), late * EVEN):
            np.testing.assert_allclose(way(gain), way(gain, ours=False), rtol=0.1)

    @pytest.mark.parametrize("start", [1, 10, 1000])
    def test_are_not_blocks_that_start_late(self, start):
        """Where the means of rows and columns are small, Optax's first update is 700: they go as far as under Adam."""
        late = (jnp.arange(STEPS) >= start).astype(jnp.float32)[:, None, None]
        gradients = GRADIENT.at[32:, :64].set(0).at[:32, 64:].set(0)
        first = (jnp.arange(64) < 32)[:, None]
        gradients = jnp.where(first, 1.0, late) * gradients
        adam = optax.scale_by_rms(0.999, EPS, eps_in_sqrt=False, bias_correction=True)
        ours, theirs, whole = (
            float(jnp.abs(updates_of(tx, gradients)[0][:, 32:, 64:]).sum())
            for tx in (scale_by_factored_rms(0.999, EPS), optax_factored(0.999), adam)
        )
        assert 0.99 * whole <= ours <= 1.01 * theirs

    @pytest.mark.parametrize("shape", some([((8, 4096),), ((4096, 8),), ((1536, 1536),)], ((8, 4096),).__eq__))
    def test_are_not_rows_columns_and_elements_that_stand_out_for_good(self, shape):
        """A hundred times larger: their updates are 1 in the end, as with Optax's."""
        n, m = shape
        for gradient in (
            jnp.where(jnp.arange(m) == 3, 1.0, 0.01) * jnp.ones(shape),
            jnp.where(jnp.arange(n) == 3, 1.0, 0.01)[:, None] * jnp.ones(shape),
            jnp.full(shape, 0.01).at[3, 3].set(100),
        ):
            ours, theirs = last_update(scale_by_factored_rms(0.98, EPS), gradient), last_update(OPTAX_98, gradient)
            np.testing.assert_allclose(ours[3, 3], 1, rtol=0.1)
            np.testing.assert_allclose(ours[0, 3] / theirs[0, 3], 1, rtol=0.1)
            np.testing.assert_allclose(ours[3, 0] / theirs[3, 0], 1, rtol=0.1)

    def test_are_not_rows_that_are_rarely_seen(self):
        seen = jax.random.bernoulli(jax.random.key(2), 0.02, (STEPS, 64)).astype(jnp.float32)
        gain = jnp.where(jnp.arange(64) % 2 == 0, seen, 1.0)
        np.testing.assert_allclose(way(gain), way(gain, ours=False), rtol=0.02)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_are_not_rows_and_columns_of_all_sizes(self, axis):
        """Not in the first steps either, in which a tuned model has no warm-up."""
        sizes = jnp.expand_dims(10.0 ** -jnp.linspace(0, 7, SHAPE[axis]), 1 - axis)
        ours, theirs = (updates_of(tx, draw(0, 30, *SHAPE) * sizes)[0] for tx in (OURS, THEIRS))
        np.testing.assert_allclose(jnp.sqrt((ours**2).mean((1, 2))), jnp.sqrt((theirs**2).mean((1, 2))), rtol=0.03)

    def test_in_the_first_gradient_of_a_small_leaf(self):
        """There every element is a large share of its row, and the others move too far for ten steps."""
        spike = draw(0, 300, 16, 16).at[0, 3, 5].set(1e6)
        ours, plain = (
            jnp.abs(updates_of(scale_by_factored_rms(0.999, EPS), g)[0]) for g in (spike, draw(0, 300, 16, 16))
        )
        beside = np.delete(np.arange(16), 3)[:, None], np.delete(np.arange(16), 5)
        for steps, ratio in ((10, 1.6), (300, 1.05)):
            moved = (ours[:steps].sum(axis=0) / plain[:steps].sum(axis=0))[beside]
            assert float(moved.mean()) == pytest.approx(ratio, rel=0.03)


def test_what_is_written_for_gpus_gives_the_bits_of_all(monkeypatch):
    gradient = jax.random.normal(jax.random.key(0), (8, 16)).at[2, 3].set(jnp.inf).at[5].set(0)
    means, results = (jnp.zeros((8, 1)), jnp.zeros((1, 16)), jnp.zeros((1, 1))), []
    for platform in ("cuda", "default"):

        def choose(*args, default, p=platform, **branches):
            return branches.get(p, default)(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
        results.append(jax.jit(lambda g: _first(g, means))(gradient))
    chex.assert_trees_all_equal(*results)
    assert all(float(mean.max()) > 0 for mean in results[0])
