"""position, value, spacing and nextafter against exact rational arithmetic, for every format."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from quick import some

import altgrad_jax as ag
from altgrad_jax import grid


def functions(name):
    """The functions of a grid at x, each to be compared with that of `oracle.Exact`."""
    return {
        "spacing": lambda x: ag.spacing(x, name),
        "position": lambda x: ag.position(x, name),
        "nearest": lambda x: ag.round_nearest(x, name),
        "above": lambda x: ag.nextafter(x, jnp.float32(jnp.inf), name),
        "under": lambda x: ag.nextafter(x, jnp.float32(-jnp.inf), name),
    }


@functools.cache
def evaluate(name):
    """All functions of a format at all points and their negatives, in one compiled program."""
    x, _ = oracle.points(name)
    x = np.concatenate([x, -x])
    return {k: np.asarray(v) for k, v in jax.jit(lambda x: {k: f(x) for k, f in functions(name).items()})(x).items()}


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32))


QUICK = ("float8_e4m3fn", "float4_e2m1fn", "bfloat16", "E0M7", "E7M0")


@pytest.mark.parametrize("name", some(oracle.FORMAT_NAMES, QUICK.__contains__))
class TestExactness:
    """Zero mismatches at every code, quarter point, midpoint and float32 neighbour."""

    def test_equals_the_oracle(self, name):
        """Below 0, where no number under it is positive, lie the negatives."""
        for function, wanted in oracle.at_points(name).items():
            first = 1 if function == "under" else 0
            values = evaluate(name)[function][first : len(wanted)]
            np.testing.assert_array_equal(values, wanted[first:].astype(np.float32), err_msg=function)

    def test_is_odd(self, name):
        x, _ = oracle.points(name)
        n, values = len(x), evaluate(name)
        np.testing.assert_array_equal(values["spacing"][:n], values["spacing"][n:])
        for function in ("position", "nearest"):
            assert_same_bits(values[function][n:], -values[function][:n])
        np.testing.assert_array_equal(values["under"][n:], -values["above"][:n])
        np.testing.assert_array_equal(values["above"][n + 1 :], -values["under"][1:n])

    def test_value_inverts_position(self, name):
        values = oracle.table(name)
        flushed = np.where(values < 2.0**-126, 0, values).astype(np.float32)
        index = np.arange(len(values), dtype=np.float32)
        np.testing.assert_array_equal(ag.value(index, name), flushed)
        np.testing.assert_array_equal(ag.value(-index, name), -flushed)
        np.testing.assert_array_equal(ag.position(flushed, name), np.where(flushed == 0, 0, index))

    def test_value_is_linear_between_neighbours(self, name):
        values = oracle.table(name)
        for quarters in (0.25, 0.5, 0.75):
            between = values[:-1] + quarters * np.diff(values)
            between = np.where(between < 2.0**-126, 0, between)
            position = np.arange(len(values) - 1, dtype=np.float32) + np.float32(quarters)
            np.testing.assert_array_equal(np.asarray(ag.value(position, name), np.float64), between)

    def test_eager_jit_and_vmap_agree_to_the_bit(self, name):
        # One shape for all formats, so that their eager operations compile once.
        points = np.random.default_rng(0).permutation(np.concatenate([x := oracle.points(name)[0], -x]))
        x = np.resize(points, (8, 2048))
        last = ag.as_format(name).max_index
        every = {**functions(name), "value": lambda x: ag.value(x / (1 + jnp.abs(x)) * last, name)}
        jitted = jax.jit(lambda x: {key: function(x) for key, function in every.items()})(x)
        for key, function in every.items():
            eager = function(x)
            assert_same_bits(jitted[key], eager)
            assert_same_bits(jax.vmap(function)(x), eager)


@pytest.mark.parametrize(
    "name", some(sorted(set(oracle.FORMAT_NAMES) - {"float16", "bfloat16"}), oracle.QUICK.__contains__)
)
def test_the_oracle_equals_fractions(name):
    x, below = oracle.points(name)
    exact = [oracle.Exact(name, float(x), k) for x, k in zip(x, below, strict=True)]
    for function, values in oracle.at_points(name).items():
        first = 1 if function == "under" else 0
        wanted = [oracle.as_float32(getattr(e, function)()) for e in exact[first:]]
        np.testing.assert_array_equal(values[first:].astype(np.float32), wanted, err_msg=function)


@pytest.mark.parametrize("name", some(oracle.EIGHT_BIT_NAMES, oracle.QUICK.__contains__))
class TestRandomFloats:
    """2**22 random float32 bit patterns against a table in float64."""

    @np.errstate(invalid="ignore")  # Signalling NaNs among the patterns.
    def test_equal_the_table(self, name):
        x = np.random.default_rng(0).integers(0, 2**32, 2**22, dtype=np.uint32).view(np.float32)
        program = jax.jit(lambda x: (ag.round_nearest(x, name), ag.spacing(x, name), ag.position(x, name)))
        nearest, spacing, position = map(np.asarray, program(x))
        np.testing.assert_array_equal(nearest, oracle.nearest_by_table(name, x).astype(np.float32))
        values, magnitude, nan = oracle.table(name), np.abs(x.astype(np.float64)), np.isnan(x)
        magnitude[magnitude < 2.0**-126] = 0
        below = np.searchsorted(values, magnitude, side="right") - 1
        gaps = np.append(np.diff(values), float(oracle.top_gap(name)))[below]
        np.testing.assert_array_equal(spacing, np.where(nan, np.nan, gaps).astype(np.float32))
        exact = below + np.where(magnitude > values[-1], 0, (magnitude - values[below]) / gaps)
        np.testing.assert_array_equal(position, np.where(nan, np.nan, np.sign(x) * exact).astype(np.float32))


class TestDerivatives:
    """The stiffness is the derivative of the value with respect to the position."""

    X = jnp.array([0.3, -1.03, 5.0, 1e-3, 0.0, 448.0])

    def test_of_value_is_the_spacing(self):
        slope = jax.vmap(jax.grad(lambda p: ag.value(p, "float8_e4m3fn")))(ag.position(self.X, "float8_e4m3fn"))
        np.testing.assert_array_equal(slope, ag.spacing(self.X, "float8_e4m3fn"))

    def test_of_position_is_its_inverse(self):
        slope = jax.vmap(jax.grad(lambda x: ag.position(x, "float8_e4m3fn")))(self.X)
        np.testing.assert_array_equal(slope, 1 / ag.spacing(self.X, "float8_e4m3fn"))

    def test_is_zero_beyond_the_end(self):
        assert jax.grad(lambda x: ag.position(x, "E4M3"))(481.0) == 0.0
        assert jax.grad(lambda p: ag.value(p, "E4M3"))(-127.5) == 0.0


class TestSpacing:
    """The gap away from zero, as numpy's."""

    def test_agrees_with_numpy_in_float16(self):
        x = np.arange(0x7BFF, dtype=np.uint16).view(np.float16)  # numpy overflows at the largest value.
        np.testing.assert_array_equal(ag.spacing(x, "float16"), np.spacing(x).astype(np.float32))
        np.testing.assert_array_equal(ag.spacing(-x, "float16"), np.spacing(x).astype(np.float32))

    def test_agrees_with_numpy_in_float32(self):
        x = np.random.default_rng(0).integers(0x0C000000, 0x7F7FFFFF, 2**16).astype(np.int32).view(np.float32)
        np.testing.assert_array_equal(ag.spacing(x, "float32"), np.spacing(x))
        np.testing.assert_array_equal(ag.spacing(-x, "float32"), np.abs(np.spacing(-x)))

    def test_at_zero_is_the_smallest_positive_value(self):
        for name in set(oracle.FORMAT_NAMES) - {"bfloat16"}:
            assert float(ag.spacing(0.0, name)) == float(ag.spacing(-0.0, name)) == oracle.table(name)[1]

    def test_beyond_the_largest_value_is_that_of_the_top_binade(self):
        for name in oracle.FORMAT_NAMES:
            assert_same_bits(ag.spacing(jnp.array([jnp.inf, -jnp.inf]), name), [np.float32(oracle.top_gap(name))] * 2)

    def test_of_nan_is_nan(self):
        assert np.isnan(ag.spacing(jnp.nan, "E4M3"))

    def test_is_never_flushed_to_zero(self):
        for name in ("bfloat16", "float32"):
            assert float(ag.spacing(0.0, name)) == float(ag.spacing(2.0**-126, name)) == 2.0**-126


class TestPosition:
    """Saturates, and keeps what is not a number."""

    def test_saturates(self):
        for name in oracle.FORMAT_NAMES:
            last = len(oracle.table(name)) - 1
            np.testing.assert_array_equal(ag.position(jnp.array([jnp.inf, -jnp.inf]), name), [last, -last])
            np.testing.assert_array_equal(
                ag.value(jnp.array([1e9, -jnp.inf]), name), oracle.table(name)[-1] * np.array([1, -1])
            )

    def test_of_nan_is_nan(self):
        assert np.isnan(ag.position(jnp.nan, "E4M3"))
        assert np.isnan(ag.value(jnp.nan, "E4M3"))

    def test_is_the_bit_pattern_of_float32(self):
        x = np.random.default_rng(1).integers(0x00800000, 0x7F800000, 10_000).astype(np.int32)
        np.testing.assert_array_equal(ag.position(x.view(np.float32), "float32"), x.astype(np.float32))

    def test_of_small_dtypes_is_that_of_their_values(self):
        x = jnp.arange(-8.0, 8.0, 0.5)
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
            assert_same_bits(ag.position(x.astype(dtype), "E5M2"), ag.position(x, "E5M2"))


class TestNextafter:
    """The next number of the format, as numpy's."""

    @pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float16"])
    def test_agrees_with_numpy(self, name):
        values = np.concatenate([-oracle.table(name)[::-1], oracle.table(name)[1:]])[1:-1]
        for toward in (-1.0, 0.0, 3.0):
            typed = values.astype(np.dtype(name))
            expected = np.nextafter(typed, np.full_like(typed, toward)).astype(np.float32)
            np.testing.assert_array_equal(ag.nextafter(values.astype(np.float32), jnp.float32(toward), name), expected)

    def test_agrees_with_numpy_in_float32(self):
        x = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
        np.testing.assert_array_equal(ag.nextafter(x, 0.1, "float32"), np.nextafter(x, np.float32(0.1)))

    def test_at_the_edges(self):
        x = jnp.array([448.0, 500.0, jnp.inf, jnp.inf, 0.0, -0.0, 1.03, jnp.nan, 1.0])
        toward = jnp.array([jnp.inf, jnp.inf, 0.0, jnp.inf, 0.0, 1.0, 1.03, 1.0, jnp.nan])
        expected = [448.0, 448.0, 448.0, jnp.inf, 0.0, 2.0**-9, 1.03, jnp.nan, jnp.nan]
        np.testing.assert_array_equal(ag.nextafter(x, toward, "float8_e4m3fn"), np.float32(expected))

    def test_passes_over_what_is_flushed(self):
        for name in ("bfloat16", "float32"):
            assert float(ag.nextafter(0.0, 1.0, name)) == 2.0**-126
            assert float(ag.nextafter(2.0**-126, 0.0, name)) == 0.0


class TestInput:
    """Floating dtypes in, float32 out; float64 stays float64 under x64."""

    @pytest.mark.parametrize("bad", [1, np.arange(3), np.array([1j]), np.array([True])])
    def test_that_is_not_floating_is_refused(self, bad):
        for function in (ag.spacing, ag.position, ag.value, ag.round_nearest, ag.fake_quantize):
            with pytest.raises(
                TypeError, match=r"(x|position) must be of a floating dtype, got (int|complex|bool)\w* .*: cast"
            ):
                function(bad, "E4M3")
        with pytest.raises(TypeError, match="toward must be of a floating dtype, got int32 1"):
            ag.nextafter(1.0, 1, "E4M3")

    def test_that_is_no_array_is_refused(self):
        for bad in ([1.0, 2.0], "1.0", None):
            with pytest.raises(TypeError, match=r"x must be an array or a float, got .*: convert it with jnp.asarray"):
                ag.spacing(bad, "E4M3")

    def test_in_float64_computes_in_float64(self):
        with jax.enable_x64(True):
            x = jnp.float64(1.0 + 2.0**-40)
            assert ag.position(x, "E4M3") == 56.0 + 2.0**-37
            assert ag.value(ag.position(x, "E4M3"), "E4M3") == x
            assert ag.round_nearest(1.0625 + 2.0**-40, "E4M3") == 1.125
            chex.assert_type([f(x, "E4M3") for f in (ag.spacing, ag.position, ag.value, ag.round_nearest)], jnp.float64)

    def test_keeps_its_shape(self):
        for shape in ((), (0,), (2, 3)):
            chex.assert_shape([f(jnp.ones(shape), "E4M3") for f in (ag.spacing, ag.position, ag.value)], shape)


class TestFloorLog2:
    """Exact where a logarithm is not: at every power of two and next to it."""

    def test_at_and_just_below_every_power_of_two(self):
        powers = np.float32(2.0) ** np.arange(-126, 128, dtype=np.float32)
        np.testing.assert_array_equal(grid.floor_log2(jnp.asarray(powers)), np.arange(-126, 128))
        below = np.nextafter(powers[1:], np.float32(0))
        np.testing.assert_array_equal(grid.floor_log2(jnp.asarray(-below)), np.arange(-126, 127))

    def test_of_nothing_is_below_the_lowest(self):
        np.testing.assert_array_equal(grid.floor_log2(jnp.array([0.0, -0.0, 2.0**-126 / 2])), [-127] * 3)
