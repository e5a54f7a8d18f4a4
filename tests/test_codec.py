"""The codec: every index, both ends of the exponents, against exact arithmetic that shares no code with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from quick import some

import altgrad_jax as ag
from altgrad_jax.codec import decode, encode, exponent_range, index_dtype, nan_index, rest_bits_of
from altgrad_jax.compress_state import SECOND
from altgrad_jax.on_grid import momentum_format

STORED = [(name, bits) for name in oracle.FORMAT_NAMES for bits in (0, 8)]
jitted_encode = jax.jit(encode, static_argnums=2)
jitted_decode = jax.jit(decode, static_argnums=2)


def grid_of(name, fraction_bits):
    return ag.as_format(name).refined(fraction_bits)


def ends_and_middle(grid):
    low, high = exponent_range(grid)
    return sorted({low, (low + high) // 2, 0, high})


def flushed(x):
    return np.where(np.abs(x) < 2.0**-126, 0.0, x)


class TestOracle:
    """The vectorised oracle agrees with Fractions, at every index, midpoint and float32 next to them."""

    @pytest.mark.parametrize("name", some(oracle.EIGHT_BIT_NAMES, oracle.QUICK.__contains__))
    def test_agrees_with_fractions(self, name):
        x, below = oracle.points(name)
        index = oracle.nearest_index(oracle.table(name), x.astype(np.float64))
        exact = [float(oracle.Exact(name, float(v), int(k)).nearest()) for v, k in zip(x, below, strict=True)]
        np.testing.assert_array_equal(oracle.table(name)[index], exact)


@pytest.mark.parametrize(("name", "fraction_bits"), some(STORED, lambda stored: stored[0] in oracle.QUICK))
class TestEveryFormat:
    """All indices, and a quarter of a million numbers, at the ends and in the middle of the legal exponents."""

    def test_every_index_is_its_number(self, name, fraction_bits):
        grid, values = grid_of(name, fraction_bits), oracle.refined_table(name, fraction_bits)
        index = np.arange(-grid.max_index, grid.max_index + 1).astype(index_dtype(grid))
        for exponent in ends_and_middle(grid):
            exact = np.ldexp(np.concatenate([-values[:0:-1], values]), exponent)
            numbers = np.asarray(jitted_decode(index, jnp.int8(exponent), grid))
            np.testing.assert_array_equal(numbers.astype(np.float64), flushed(exact))

    def test_encoding_agrees_with_the_oracle(self, name, fraction_bits):
        grid, values = grid_of(name, fraction_bits), oracle.refined_table(name, fraction_bits)
        for exponent in ends_and_middle(grid):
            x = oracle.patterns(2**16, values, exponent, seed=exponent % 2**16)
            index = np.asarray(jitted_encode(x, jnp.int8(exponent), grid))
            finite = np.isfinite(x)
            assert (index[~finite] == nan_index(grid)).all()
            exact = oracle.nearest_index(values, np.ldexp(flushed(x[finite].astype(np.float64)), -exponent))
            np.testing.assert_array_equal(index[finite], exact)

    def test_exponents_have_normal_steps_and_numbers(self, name, fraction_bits):
        grid = grid_of(name, fraction_bits)
        low, high = exponent_range(grid)
        if name == "bfloat16":
            assert (low, high) == (0, 0)
            return
        assert grid.smallest_subnormal * 2.0**low == 2.0**-126
        assert grid.max * 2.0**high < 2.0**128
        assert high == 126 or grid.max * 2.0 ** (high + 1) >= 2.0**128


class TestStochastic:
    """Over all words that differ in the bits that count, the mean is the number, or 2**-20 steps below it."""

    @pytest.mark.parametrize(("name", "fraction_bits"), [("float8_e3m4", 8), ("E0M7", 8), ("bfloat16", 0)])
    def test_expectation_over_all_words(self, name, fraction_bits):
        grid, values = grid_of(name, fraction_bits), oracle.refined_table(name, fraction_bits)
        bits = rest_bits_of(grid)
        words = jnp.arange(2**bits, dtype=jnp.uint32) << (32 - bits)
        ups = jax.jit(lambda x: jnp.sum(encode(jnp.full(words.shape, x), 0, grid, words) - encode_down(x)))
        encode_down = functools.partial(encode, exponent=0, format=grid, word=jnp.uint32(0))
        rng = np.random.default_rng(0)
        for k in rng.integers(len(values) // 2, len(values) - 1, 4):  # In the normal range, if there is one.
            x = np.float32(values[k] + rng.random() * (values[k + 1] - values[k]))
            rest = (np.float64(x) - values[k]) / (values[k + 1] - values[k])
            # Only below the normal range may a rest have more bits than an int16 index leaves.
            below = 2.0**-bits if grid.exponent_bits == 0 else 0.0
            assert 0 <= rest - int(ups(x)) / 2**bits <= below

    @pytest.mark.parametrize("name", some(oracle.EIGHT_BIT_NAMES, oracle.QUICK.__contains__))
    def test_bias_below_the_normal_range(self, name):
        """One step of the format is 2**fraction_bits of the grid: its bias is at most 2**-20 of that."""
        for fraction_bits in (0, 8):
            assert 2.0 ** -(rest_bits_of(grid_of(name, fraction_bits)) + fraction_bits) <= 2.0**-20

    def test_no_word_moves_a_number(self):
        for name in ("float8_e4m3fn", "E0M7", "E7M0"):
            format = ag.as_format(name)
            index = jnp.arange(-format.max_index, format.max_index + 1)
            x = decode(index, -5, format)
            for word in (0, 1, 2**31, 2**32 - 1):
                np.testing.assert_array_equal(encode(x, -5, format, jnp.full(x.shape, word, jnp.uint32)), index)


class TestUnsigned:
    """Second moments have no sign: 254 positive numbers in a byte, and NaN."""

    def test_every_index(self):
        index = jnp.arange(256, dtype=jnp.uint8)
        steps = np.arange(255)
        exact = np.where(steps < 8, steps, (8 + steps % 8) * 2.0 ** (np.maximum(steps // 8, 1) - 1)) * 2.0**-33
        np.testing.assert_array_equal(decode(index, 4, SECOND), np.append(16 * exact, np.nan))
        np.testing.assert_array_equal(encode(decode(index, 4, SECOND), 4, SECOND), index)

    def test_a_negative_number_is_nan(self):
        x = jnp.array([-1.0, -1e-30, -0.0, 0.0, 1.0, 5.0])
        np.testing.assert_array_equal(encode(x, 0, SECOND), [255, 255, 0, 0, 248, 254])


class TestMomentumFormat:
    """Eight bits whose largest number is 31/16 of a quarter of the weights' top binade."""

    @pytest.mark.parametrize("name", some(oracle.EIGHT_BIT_NAMES, oracle.QUICK.__contains__))
    def test_of_every_format(self, name):
        weights, momentum = ag.as_format(name), momentum_format(ag.as_format(name))
        assert (momentum.bits, momentum.max_index, index_dtype(momentum)) == (8, 127, np.int8)
        assert momentum.max == 31 / 16 * 2.0 ** (weights.maxexp - 1) / 4

    def test_of_a_format_without_exponents(self):
        assert momentum_format(ag.as_format("bfloat16")) is None


def test_eager_jit_and_vmap_agree():
    x = jax.random.normal(jax.random.key(0), (8, 64)) * jnp.exp2(jnp.arange(8.0))[:, None]
    exponent, word = jnp.arange(-4, 4, dtype=jnp.int8)[:, None], jax.random.bits(jax.random.key(1), (8, 64))
    for format in (ag.as_format("float8_e3m4"), ag.as_format("E2M5").refined(8)):
        for words in (None, word):
            eager = encode(x, exponent, format, words)
            np.testing.assert_array_equal(jitted_encode(x, exponent, format, words), eager)
            batched = jax.vmap(lambda x, e, w, f=format: encode(x, e, f, w))(x, exponent, words)
            np.testing.assert_array_equal(batched, eager)
            np.testing.assert_array_equal(
                jax.vmap(lambda i, e, f=format: decode(i, e, f))(eager, exponent),
                jitted_decode(eager, exponent, format),
            )
