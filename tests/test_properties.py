"""Properties of a step for any format, shape, exponent, fraction bits, rounding, momentum and gradient.

A short profile runs with the suite; `HYPOTHESIS_PROFILE=long python -m pytest tests/test_properties.py` runs 20,000
cases.
"""

import dataclasses
import functools
import os

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import altgrad_jax as ag
from altgrad_jax.codec import exponent_range

_every = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "database": None}
hypothesis.settings.register_profile("short", max_examples=10, derandomize=True, **_every)
hypothesis.settings.register_profile("long", max_examples=5000, **_every)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

# Few of each, because every new combination is compiled.
GRIDS = [
    ("float8_e3m4", 0),
    ("float8_e4m3fn", 3),
    ("float8_e5m2", 0),
    ("float4_e2m1fn", 0),
    ("E0M7", 0),
    ("E7M0", 0),
    ("E2M5", 8),
    ("float16", 0),
]
SHAPES = [(2, 9), (1, 8), (3, 2, 4)]
METHODS = [{"rounding": "nearest"}, {}, {"momentum": 0.9}]
ANY = st.floats(width=32, allow_subnormal=False)


@functools.cache
def ends(name, fraction_bits):
    """The grid, all its numbers >= 0 in float64, and the least and the greatest exponent."""
    grid = ag.as_format(name).refined(fraction_bits)
    return grid, oracle.refined_table(name, fraction_bits), exponent_range(grid)


@functools.cache
def stepping(arguments):
    """A transformation that takes its updates as they are, its jitted init and its jitted update."""
    tx = ag.on_grid(optax.scale(1.0), **dict(arguments))
    return jax.jit(tx.init), jax.jit(tx.update)


def numbers(stored):
    """The numbers of a GridArray, float64, from the table; NaN at its index."""
    _, values, _ = ends(stored.format.name, stored.fraction_bits)
    index, exponent = np.asarray(stored.index, np.int64), np.asarray(stored.exponent, np.int64)
    nan = index == np.iinfo(stored.index.dtype).min
    steps = np.where(nan, 0, index)
    return np.where(nan, np.nan, np.sign(steps) * np.ldexp(values[np.abs(steps)], exponent))


@st.composite
def grid_arrays(draw):
    """GridArrays with any indices, NaN included, and any legal exponents."""
    (name, bits), shape = draw(st.sampled_from(GRIDS)), draw(st.sampled_from(SHAPES))
    grid, values, (low, high) = ends(name, bits)
    last = len(values) - 1
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    index = rng.integers(-last, last + 1, shape) if draw(st.booleans()) else rng.integers(-3, 4, shape)
    index = np.clip(index, -last, last)
    if draw(st.booleans()):
        index.flat[rng.integers(index.size)] = draw(st.sampled_from([0, last, -last, ag.codec.nan_index(grid)]))
    exponent = rng.integers(low, high + 1, (*shape[:-1], 1)) if draw(st.booleans()) else np.full((*shape[:-1], 1), 0)
    exponent = np.clip(exponent, low, high).astype(np.int8)
    index = index.astype(ag.codec.index_dtype(grid))
    return ag.GridArray(jnp.asarray(index), jnp.asarray(exponent), ag.as_format(name), bits)


@st.composite
def steps(draw):
    """A GridArray and an update for it: any float32 numbers, zeros, or some of the size of a step of each element."""
    stored = draw(grid_arrays())
    kind = draw(st.sampled_from(["any", "zeros", "steps", "huge"]))
    if kind == "any":
        return stored, draw(hnp.arrays(np.float32, stored.shape, elements=ANY))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "zeros":
        return stored, np.zeros(stored.shape, np.float32)
    if kind == "huge":
        return stored, np.clip(rng.normal(size=stored.shape) * 1e38, -3.4e38, 3.4e38).astype(np.float32)
    return stored, (rng.normal(size=stored.shape) * steps_at(stored, numbers(stored))).astype(np.float32)


def steps_at(stored, x):
    """The width of the grid's step away from zero at real numbers, float64; in the top binade that of its end."""
    _, values, _ = ends(stored.format.name, stored.fraction_bits)
    scale = np.ldexp(1.0, np.asarray(stored.exponent, np.int64))
    below = np.searchsorted(values, np.abs(np.nan_to_num(x)) / scale, side="right") - 1
    return np.append(np.diff(values), values[-1] - values[-2])[below] * scale


def momentum_numbers(stored):
    """Numbers, largest number and steps of a momentum in one byte, from the fields of its format; float64."""
    format, k = stored.format, np.abs(np.asarray(stored.index, np.int64))
    scale = np.ldexp(1.0, np.asarray(stored.exponent, np.int64) + format.minexp - format.mantissa_bits)
    binade = np.maximum(k >> format.mantissa_bits, 1) - 1
    mantissa = k - (binade << format.mantissa_bits)
    size = np.ldexp(mantissa.astype(np.float64), binade) * scale
    return np.sign(np.asarray(stored.index)) * size, format.max * np.ldexp(1.0, stored.exponent), 2.0**binade * scale


def legal(stored):
    _, values, (low, high) = ends(stored.format.name, stored.fraction_bits)
    index = np.asarray(stored.index, np.int64)
    nan = index == np.iinfo(stored.index.dtype).min
    assert ((np.abs(index) < len(values)) | nan).all()
    assert ((low <= np.asarray(stored.exponent)) & (np.asarray(stored.exponent) <= high)).all()


@hypothesis.given(grid_arrays())
def test_numbers_are_stored_as_themselves(stored):
    """`from_grid` gives the numbers of the table, and `to_grid` with their scales the same integers."""
    whole = ag.from_grid(stored, full=True)
    exact = numbers(stored)
    np.testing.assert_array_equal(np.asarray(whole, np.float64), np.where(np.abs(exact) < 2.0**-126, 0, exact))
    kept = jnp.where(jnp.isnan(whole), 0, whole)
    again = ag.to_grid(
        kept, stored.format, fraction_bits=stored.fraction_bits, scale=stored.scale, where=lambda *_: True
    )
    np.testing.assert_array_equal(again.index, jnp.where(jnp.isnan(whole), 0, stored.index))
    np.testing.assert_array_equal(again.exponent, stored.exponent)


@hypothesis.given(steps(), st.sampled_from(METHODS))
def test_a_step_goes_to_its_target(step, arguments):
    """Legal integers; NaN where the movement is not finite; else at most a step, or half, from where it should be."""
    stored, update = step
    init, apply = stepping(tuple(arguments.items()))
    state = init(stored)._replace(grid_step=jnp.uint32(10**6))  # So late that no bias is corrected.
    updates, after_state = apply(jnp.asarray(update), state, stored)
    after = optax.apply_updates(stored, updates)
    legal(after)
    legal(dataclasses.replace(after, exponent=after_state.exponent))
    before, now = numbers(stored), numbers(after)
    nan = np.isnan(before) | ~np.isfinite(update)
    assert np.isnan(now)[nan].all()
    scale = np.ldexp(1.0, np.asarray(after.exponent, np.int64))
    within = np.abs(before) + np.abs(np.where(nan, 0, update.astype(np.float64))) < 2.0**126 * np.minimum(scale, 1)
    assert not np.isnan(now)[~nan & within].any()
    counts = ~nan & within
    _, values, _ = ends(stored.format.name, stored.fraction_bits)
    end = values[-1] * scale
    if "momentum" in arguments:
        owed, left = (momentum_numbers(s.momentum) for s in (state, after_state))
        # Weight and what it owes gain the update, except for the rounding of what is owed, and for what saturates.
        target = before + owed[0] + update.astype(np.float64)
        error = np.abs(now + left[0] - target)
        counts &= (np.abs(now) < end) & (np.abs(left[0]) < left[1])
        bound = left[2] + np.abs(target) * 1e-6 + 2.0**-120 * np.maximum(scale, 1)
    else:
        target = np.clip(before + update.astype(np.float64), -end, end)
        error = np.abs(now - target)
        width = np.maximum(steps_at(after, target), steps_at(after, now))
        bound = (0.5 if arguments else 1.0) * width + np.abs(target) * 2e-7 + 2.0**-125
    assert (error <= bound)[counts].all()


@hypothesis.given(grid_arrays(), st.sampled_from(METHODS[:2]))
def test_zero_updates_move_nothing(stored, arguments):
    """Once the exponents have followed the largest elements. With a momentum, what is owed shows on a finer grid."""
    init, apply = stepping(tuple(arguments.items()))
    state, zeros = init(stored), jnp.zeros(stored.shape)
    for _ in range(200):
        updates, state = apply(zeros, state, stored)
        if not np.asarray(updates.exponent).any() and not np.asarray(state.exponent != stored.exponent).any():
            break
        stored = optax.apply_updates(stored, updates)
    assert not np.asarray(updates.index).any()


@hypothesis.given(steps(), st.sampled_from(METHODS))
def test_a_row_does_not_see_the_others(step, arguments):
    """The same row beside other rows: the same integers, random words included."""
    stored, update = step
    init, apply = stepping(tuple(arguments.items()))
    both, _ = apply(jnp.asarray(update), init(stored), stored)
    changed = jnp.asarray(update).at[1:].set(7.0) if len(update) > 1 else jnp.asarray(update)
    one, _ = apply(changed, init(stored), stored)
    np.testing.assert_array_equal(both.index[0], one.index[0])
    np.testing.assert_array_equal(both.exponent[0], one.exponent[0])
