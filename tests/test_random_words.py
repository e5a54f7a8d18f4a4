"""Random words: a function of seed, step, path and position, and as random as a sample of a million can tell."""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import altgrad_jax as ag
from altgrad_jax.codec import encode
from altgrad_jax.random_words import _strides, leaf_keys, mix, random_words, second_word

KEY = jnp.array([0x243F6A88, 0x85A308D3], jnp.uint32)


def bit_table(words):
    """The bits of words, least significant first, `[words, 32]`."""
    return (np.asarray(words)[:, None] >> np.arange(32, dtype=np.uint32)) & 1


def centred(words):
    return np.asarray(words) / 2.0**32 - 0.5


def assert_uniform(values, cells):
    """Chi squared of integers in [0, cells), within five standard deviations."""
    counts, expected = np.bincount(values, minlength=cells), values.size / cells
    assert counts.size == cells
    chi2 = np.sum((counts - expected) ** 2) / expected
    assert abs(chi2 - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))


class TestRandomWords:
    """32 bits of a counter: fair, independent, and a function of key and position."""

    def test_are_32_bits_each_of_them_fair(self):
        words = random_words(KEY, (2**20,))
        assert words.dtype == jnp.uint32
        np.testing.assert_allclose(bit_table(words).mean(0), 0.5, atol=5 * 0.5 / 2**10)

    def test_have_bits_that_are_uncorrelated(self):
        signs = 2.0 * bit_table(random_words(KEY, (2**20,))) - 1
        correlation = signs.T @ signs / 2**20
        np.testing.assert_allclose(correlation, np.eye(32), atol=5 / 2**10)

    @pytest.mark.parametrize("shift", [0, 5, 11, 16, 22])
    def test_are_uniform(self, shift):
        words = np.asarray(random_words(KEY, (2**20,)))
        assert_uniform((words >> shift) & 1023, 1024)

    @pytest.mark.parametrize("stride", [1, 2, 64, 1024, 4096])
    def test_of_neighbours_are_uncorrelated(self, stride):
        words = random_words(KEY, (2**20,))
        u = centred(words)
        assert abs(np.mean(u[:-stride] * u[stride:])) * 12 < 5 / 2**10
        flips = bit_table(words[:-stride] ^ words[stride:])[:, 8:]  # The bits that formats of 8 bits use.
        np.testing.assert_allclose(flips.mean(0), 0.5, atol=5 * 0.5 / 2**10)

    @pytest.mark.parametrize("change", [(0, 1), (0, 1 << 16)])
    def test_of_neighbouring_keys_are_uncorrelated(self, change):
        word, delta = change
        other = KEY.at[word].set(KEY[word] ^ jnp.uint32(delta))
        u, v = (centred(random_words(key, (2**20,))) for key in (KEY, other))
        assert abs(np.mean(u * v)) * 12 < 5 / 2**10

    def test_of_consecutive_steps_are_uncorrelated(self):
        keys = jnp.concatenate([leaf_keys(0, jnp.uint32(step), [()]) for step in range(65)])
        u = [centred(random_words(key, (2**16,))) for key in keys]
        worst = max(abs(np.mean(a * b)) for a, b in itertools.pairwise(u))
        assert worst * 12 < 5 / 2**8

    def test_depend_on_the_flat_position_alone(self):
        flat = random_words(KEY, (24,))
        for shape in ((24, 1), (4, 6), (2, 3, 4)):
            np.testing.assert_array_equal(random_words(KEY, shape).ravel(), flat)
        assert random_words(KEY, ()) == flat[0]
        assert random_words(KEY, (0,)).shape == (0,)

    def test_use_a_second_word_beyond_2_to_the_32_elements(self):
        assert _strides((2**20, 2**20)) == ([(1, 1)], [(0, 1)])
        assert _strides((3, 2**31, 2)) == ([(2, 1), (1, 2)], [(0, 1)])
        assert _strides((2**20, 2**12)) == ([(1, 1), (0, 2**12)], [])
        some = jax.jit(lambda: random_words(KEY, (2**20, 2**20))[3:6, 7:9])()  # Only these are made.
        first, second = (np.asarray(key, np.uint32) for key in KEY)
        with np.errstate(over="ignore"):
            row = mix(first + np.arange(3, 6, dtype=np.uint32)[:, None])
            wanted = (mix(row + np.arange(7, 9, dtype=np.uint32)) ^ second) * np.uint32(0x9E3779B1)
        np.testing.assert_array_equal(some, wanted)
        with pytest.raises(ValueError, match=r"2\*\*32 elements by 2\*\*32, got shape"):
            jax.eval_shape(lambda: random_words(KEY, (2**33,)))


class TestSecondWord:
    """Another word of the same element: no word is lost, and its upper bits say nothing about those of the first."""

    def test_is_a_bijection(self):
        inverse = pow(int(second_word(jnp.uint32(1))), -1, 2**32)
        first = random_words(KEY, (2**20,))
        np.testing.assert_array_equal(second_word(first) * np.uint32(inverse), first)
        every_low = jnp.arange(2**20, dtype=jnp.uint32)
        for words in (every_low, every_low << 12):
            assert np.unique(second_word(words)).size == 2**20

    def test_has_upper_bits_that_are_uncorrelated_with_those_of_the_first(self):
        first = random_words(KEY, (2**20,))
        second = second_word(first)
        assert abs(np.mean(centred(first) * centred(second))) * 12 < 5 / 2**10
        one, two = (2.0 * bit_table(words)[:, 8:] - 1 for words in (first, second))
        correlation = one.T @ two / 2**20
        # The lower a bit of a product, the more it depends on the same bit of the factor.
        np.testing.assert_allclose(correlation[8:], 0, atol=5 / 2**10)
        np.testing.assert_allclose(correlation[:, 8:], 0, atol=5 / 2**10)
        np.testing.assert_allclose(correlation, 0, atol=2.0**-5)

    @pytest.mark.parametrize("bits", [1, 3, 5, 8])
    def test_is_uniform_together_with_the_first(self, bits):
        first = random_words(KEY, (2**20,))
        one, two = (np.asarray(words) >> (32 - bits) for words in (first, second_word(first)))
        assert_uniform((one << bits) | two, 4**bits)

    @pytest.mark.parametrize("x", [0.3, -1.7, 97.3, 440.1])
    @pytest.mark.parametrize("low", [0, 1, 0x5A, 0xFF])
    def test_rounds_without_bias_over_all_words(self, x, low):
        """Of the words with one low byte, 2**24 each: their upper bits are those that count."""
        x, format = np.float32(x), ag.as_format("float8_e4m3fn")
        words = (jnp.arange(2**24, dtype=jnp.uint32) << 8) | jnp.uint32(low)
        steps = jax.jit(lambda word: encode(jnp.full(word.shape, x), 0, format, second_word(word)))(words)
        values = oracle.table(format.name)
        k = np.searchsorted(values, abs(np.float64(x)), side="right") - 1
        position = np.sign(x) * (k + (abs(np.float64(x)) - values[k]) / (values[k + 1] - values[k]))
        assert np.asarray(steps).sum(dtype=np.int64) / 2.0**24 == position
        assert (steps.min(), steps.max()) == (np.floor(position), np.ceil(position))


class TestLeafKeys:
    """Two words per path, which differ from seed to seed, step to step and path to path."""

    PATHS = tuple(path for path, _ in jax.tree_util.tree_leaves_with_path({"a": [0, 1], "b": {"c": 2}, "d": 3}))

    def test_are_two_words_of_their_own(self):
        keys = [leaf_keys(seed, jnp.uint32(step), self.PATHS) for seed in range(16) for step in range(64)]
        assert all(key.shape == (4, 2) and key.dtype == jnp.uint32 for key in keys)
        assert len({tuple(key) for key in np.concatenate(keys).tolist()}) == 16 * 64 * 4

    def test_are_those_of_version_1(self):
        """A restart under a later version draws the same words: the hash, written out with Python's integers."""

        def mixed(x):
            for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
                x = (x ^ (x >> shift)) * factor % 2**32
            return x ^ (x >> 15)

        seed, step = 3, 5
        for path, key in zip(self.PATHS, leaf_keys(seed, jnp.uint32(step), self.PATHS), strict=True):
            name = zlib.crc32(jax.tree_util.keystr(path).encode())
            words = mixed(mixed(mixed(seed) ^ name) ^ mixed(step)), mixed(mixed((step + name) % 2**32) ^ 0x9E3779B9)
            assert tuple(map(int, key)) == words
            drawn = [(mixed((mixed(words[0]) + i) % 2**32) ^ words[1]) * 0x9E3779B1 % 2**32 for i in range(6)]
            np.testing.assert_array_equal(random_words(key, (2, 3)), np.reshape(drawn, (2, 3)))

    def test_depend_on_their_own_path_alone(self):
        keys = leaf_keys(3, jnp.uint32(5), self.PATHS)
        for i, path in enumerate(self.PATHS):
            np.testing.assert_array_equal(leaf_keys(3, jnp.uint32(5), (path,))[0], keys[i])

    def test_are_the_same_for_a_traced_seed_and_step(self):
        keys = leaf_keys(3, jnp.uint32(5), self.PATHS)
        traced = jax.jit(lambda seed, step: leaf_keys(seed, step, self.PATHS))(jnp.uint32(3), jnp.uint32(5))
        np.testing.assert_array_equal(traced, keys)

    def test_give_words_that_are_uncorrelated_from_step_to_step_and_path_to_path(self):
        words = [
            centred(random_words(key, (2**18,))) for t in (0, 1) for key in leaf_keys(0, jnp.uint32(t), self.PATHS)
        ]
        correlation = 12 * np.stack(words) @ np.stack(words).T / 2**18
        np.testing.assert_allclose(correlation, np.eye(8), atol=5 / 2**9)
