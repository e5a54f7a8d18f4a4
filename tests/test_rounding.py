"""Rounding to a format: nearest against other implementations, stochastic over all its random words."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from quick import some

import altgrad_jax as ag
from altgrad_jax.codec import encode, rest_bits_of


class TestRoundNearest:
    """Nearest value, ties to an even index, saturating at the largest. (Exhaustively: test_grid.py.)"""

    @pytest.mark.parametrize("name", some(oracle.DTYPE_NAMES, oracle.QUICK.__contains__))
    def test_agrees_with_a_cast_inside_the_finite_range(self, name):
        x = oracle.points(name)[0]
        x = np.concatenate([x, -x])
        x = x[np.abs(x) <= float(ml_dtypes.finfo(np.dtype(name)).max)]
        np.testing.assert_array_equal(ag.round_nearest(x, name), x.astype(np.dtype(name)).astype(np.float32))

    @pytest.mark.parametrize("name", oracle.ALTGRAD_NAMES)
    def test_agrees_with_the_reference(self, name):
        x = oracle.numbers(oracle.GOLDEN["quantize"]["x"])
        golden = oracle.numbers(oracle.GOLDEN["quantize"]["scale1"][f"FP8_{name}"])
        format = ag.as_format(name)
        # Known deviation: the reference cannot round up to its smallest normal number.
        start = (format.smallest_normal or np.inf) - format.smallest_subnormal
        known = (start < np.abs(x)) & (np.abs(x) < start + format.smallest_subnormal)
        rounded = np.asarray(ag.round_nearest(x.astype(np.float32), name), np.float64)
        np.testing.assert_array_equal(rounded[~known], golden[~known])
        assert known.sum() <= 1

    def test_decides_a_tie_by_the_parity_of_the_index(self):
        # Without mantissa bits the steps of every binade start at an even and an odd index in turn.
        np.testing.assert_array_equal(ag.round_nearest(jnp.array([1.5, 3.0, 6.0, 12.0]), "E7M0"), [2.0, 2.0, 8.0, 8.0])

    def test_keeps_nan_and_the_sign_of_zero_and_saturates_infinities(self):
        x = jnp.array([jnp.nan, -0.0, -1e-9, jnp.inf, -jnp.inf])
        rounded = np.asarray(ag.round_nearest(x, "float8_e4m3fn"))
        np.testing.assert_array_equal(rounded, [np.nan, 0, 0, 448, -448])
        np.testing.assert_array_equal(np.signbit(rounded[1:3]), True)

    def test_is_the_identity_in_float32(self):
        x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
        np.testing.assert_array_equal(ag.round_nearest(x, "float32"), x)


def exact_up_shares(name, xs):
    """The share of words under which each x is rounded away from zero, and the exact rest of x in steps.

    Counts only 24 upper bits where more are used: the rest of a normal number has fewer.
    """
    format = ag.as_format(name)
    bits = min(rest_bits_of(format), 24)
    words = jnp.arange(2**bits, dtype=jnp.uint32) << (32 - bits)

    @jax.jit
    def count(x):
        index = encode(jnp.full(words.shape, x), 0, format, words)
        low = index.min()
        return low, index.max(), jnp.sum(index != low)

    values = oracle.table(name)
    for x in xs:
        low, high, ups = map(int, count(np.float32(x)))
        k = int(np.searchsorted(values, np.float64(np.float32(x)), side="right")) - 1
        last = k == len(values) - 1
        rest = 0.0 if last else (np.float64(np.float32(x)) - values[k]) / (values[k + 1] - values[k])
        yield k, low, high, ups / 2**bits, rest


class TestRoundStochastic:
    """Unbiased between the two neighbours, exactly: over all random words: 2**24 for formats of 8 bits."""

    @pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "E0M7", "E7M0", "float4_e2m1fn", "bfloat16"])
    def test_expectation_is_exact_over_all_words(self, name):
        values = oracle.table(name)
        rng = np.random.default_rng(0)
        k = rng.integers(len(values) // 2, len(values) - 1, 4)
        stratified = values[k] + (np.arange(4) + rng.random(4)) / 4 * (values[k + 1] - values[k])
        assert rest_bits_of(ag.as_format(name)) == {"float4_e2m1fn": 28, "bfloat16": 16}.get(name, 24)
        for k, low, high, ups, rest in exact_up_shares(name, stratified):
            assert low == k
            assert high in (k, k + 1)
            assert ups == rest, "The rest of a normal number fits the bits that are used: the expectation is x."

    @pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "E7M0"])
    def test_rest_of_more_bits_is_rounded_down_by_less_than_one_word(self, name):
        step = oracle.table(name)[1]
        for k, low, high, ups, rest in exact_up_shares(name, step * np.array([1e-3, 0.1234567, 1 - 2.0**-20, 3e-8])):
            assert (k, low) == (0, 0)
            assert high in (0, 1)
            assert ups == np.floor(rest * 2**24) / 2**24

    def test_no_word_moves_a_number_of_the_format(self):
        values = oracle.table("float8_e4m3fn")
        for k, low, high, _, rest in exact_up_shares("float8_e4m3fn", values[[0, 1, 8, 56, 125, 126]]):
            assert low == high == k
            assert rest == 0

    def test_no_word_leaves_the_range(self):
        for name in ("float8_e4m3fn", "float8_e5m2", "E0M7"):
            for k, low, high, *_ in exact_up_shares(name, oracle.table(name)[-1] * np.array([1.01, 1e4])):
                assert low == high == k

    def test_result_is_one_of_the_two_neighbours_on_both_sides_of_zero(self):
        x = jax.random.normal(jax.random.key(0), (10_000,))
        rounded = ag.round_stochastic(jax.random.key(1), x, "float8_e3m4")
        toward = jnp.sign(rounded - x) * jnp.inf
        np.testing.assert_array_equal(rounded, jnp.where(rounded == x, x, ag.nextafter(x, toward, "float8_e3m4")))
        mirrored = ag.round_stochastic(jax.random.key(1), -x, "float8_e3m4")
        np.testing.assert_array_equal(mirrored, -rounded)
        assert abs(float(jnp.mean((rounded - x) / ag.spacing(x, "float8_e3m4")))) < 5 * 0.41 / 100

    def test_keeps_nan_and_saturates_infinities(self):
        x = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
        np.testing.assert_array_equal(ag.round_stochastic(jax.random.key(0), x, "E4M3"), [np.nan, 480, -480])

    def test_eager_jit_vmap_and_sharded_agree_to_the_bit(self):
        x = jax.random.normal(jax.random.key(0), (64, 32))
        keys = jax.random.split(jax.random.key(1), 3)
        each = jnp.stack([ag.round_stochastic(key, x, "E5M2") for key in keys])
        jitted = jax.jit(ag.round_stochastic, static_argnums=2)
        chex.assert_trees_all_equal(jnp.stack([jitted(key, x, "E5M2") for key in keys]), each)
        chex.assert_trees_all_equal(jax.vmap(lambda key: ag.round_stochastic(key, x, "E5M2"))(keys), each)
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        for spec in (jax.P("d"), jax.P(None, "d")):
            sharded = jax.device_put(x, jax.NamedSharding(mesh, spec))
            chex.assert_trees_all_equal(np.asarray(jitted(keys[0], sharded, "E5M2")), np.asarray(each[0]))

    @pytest.mark.parametrize("key", [jax.random.PRNGKey(3), jax.random.key(3), jax.random.key(3, impl="rbg")])
    def test_accepts_every_kind_of_key(self, key):
        assert ag.round_stochastic(key, jnp.full(64, 0.3), "E2M5").shape == (64,)


class TestFakeQuantize:
    """scale * round_nearest(x / scale), and a gradient that passes straight through."""

    def test_equals_its_definition(self):
        x = 3 * jax.random.normal(jax.random.key(0), (8, 16))
        for scale in (2.0**-3, 0.37, jnp.full((8, 1), 0.5), np.float32(2.0)):
            chex.assert_trees_all_equal(
                ag.fake_quantize(x, "float6_e2m3fn", scale), scale * ag.round_nearest(x / scale, "float6_e2m3fn")
            )
        assert not np.array_equal(ag.fake_quantize(x, "E4M3", 2.0**-8), ag.fake_quantize(x, "E4M3", 1.0))

    def test_default_scale_is_that_of_the_largest_magnitude(self):
        x = 300 * jax.random.normal(jax.random.key(0), (100,))
        scale = ag.power_of_two_scale(x, "float4_e2m1fn")
        chex.assert_trees_all_equal(ag.fake_quantize(x, "float4_e2m1fn"), ag.fake_quantize(x, "float4_e2m1fn", scale))

    def test_gradient_is_one_inside_and_zero_where_it_saturates(self):
        x = jnp.array([0.3, -7.5, 7.5, 7.6, -100.0, 0.0])
        inside = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
        f = lambda x: ag.fake_quantize(x, "float6_e2m3fn", 1.0)  # noqa: E731
        tangent = jnp.arange(1.0, 7.0)
        np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(tangent * f(x)))(x), tangent * inside)
        np.testing.assert_array_equal(jax.jvp(f, (x,), (tangent,))[1], tangent * inside)
        np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(ag.fake_quantize(x, "E4M3")))(x), jnp.ones(6))

    def test_gradient_saturates_at_the_end_of_the_scaled_range(self):
        x = jnp.array([0.3, -1.875, 1.9, 3.0])
        gradient = jax.grad(lambda x: jnp.sum(ag.fake_quantize(x, "float6_e2m3fn", jnp.full(4, 0.25))))(x)
        np.testing.assert_array_equal(gradient, [1.0, 1.0, 0.0, 0.0])

    def test_has_no_gradient_through_the_scale(self):
        assert jax.grad(lambda s: ag.fake_quantize(jnp.float32(0.3), "E4M3", s))(0.7) == 0.0

    def test_keeps_the_dtype(self):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            x = jnp.array([0.3, 1.7], dtype)
            assert ag.fake_quantize(x, "E4M3").dtype == dtype
            assert jax.grad(lambda x: ag.fake_quantize(x, "E4M3").sum().astype(jnp.float32))(x).dtype == dtype

    def test_of_what_is_not_finite_is_nan(self):
        assert np.isnan(ag.fake_quantize(jnp.array([1.0, jnp.inf]), "E4M3")).all()
        assert np.isnan(ag.fake_quantize(jnp.array([1.0, jnp.nan]), "E4M3")).all()

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    def test_refuses_a_scale_that_is_not_positive_and_finite(self, scale):
        with pytest.raises(ValueError, match=rf"scale must be positive and finite, got {scale}"):
            ag.fake_quantize(jnp.ones(3), "E4M3", scale)
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            ag.fake_quantize(jnp.ones(3), "E4M3", np.array([1.0, scale, 1.0]))

    def test_eager_jit_and_vmap_agree_to_the_bit(self):
        x = jax.random.normal(jax.random.key(0), (4, 32))
        f = lambda x: ag.fake_quantize(x, "E3M4", 0.37)  # noqa: E731
        chex.assert_trees_all_equal(jax.jit(f)(x), f(x), jax.vmap(f)(x))


class TestPowerOfTwoScale:
    """2**ceil(log2(amax / max)), exactly."""

    @pytest.mark.parametrize("name", some(oracle.FORMAT_NAMES, oracle.QUICK.__contains__))
    def test_is_the_smallest_that_reaches(self, name):
        largest = np.float32(oracle.table(name)[-1])
        rng = np.random.default_rng(0)
        amax = (largest * np.exp2(rng.uniform(-60, 0, 200))).astype(np.float32)
        edges = np.float32(largest * 2.0 ** np.arange(-20, 1))
        amax = np.concatenate(
            [amax, edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges[:-1], np.float32(np.inf))]
        )
        scale = np.asarray(ag.power_of_two_scale(amax[:, None], name, axis=-1))[:, 0].astype(np.float64)
        assert (np.frexp(scale)[0] == 0.5).all()
        assert (amax <= scale * largest).all()
        assert (amax > scale / 2 * largest).all()

    def test_of_zero_is_one_and_of_what_is_not_finite_nan(self):
        x = jnp.array([[0.0, -0.0], [jnp.inf, 1.0], [jnp.nan, 1.0], [-jnp.inf, 0.0], [2.0**-127, 0.0]])
        np.testing.assert_array_equal(ag.power_of_two_scale(x, "E4M3", axis=1)[:, 0], [1, np.nan, np.nan, np.nan, 1])
        assert ag.power_of_two_scale(jnp.zeros((0,)), "E4M3") == 1.0

    def test_stays_in_the_normal_range(self):
        for name in ("E0M7", "E7M0", "bfloat16"):
            scale = ag.power_of_two_scale(jnp.array([[2.0**-126], [3e38]]), name, axis=1)
            assert np.isfinite(scale).all()
            assert (scale >= 2.0**-126).all()
