"""Encodes 2**24 float32 patterns per grid and compares every index with a float64 oracle that shares no code with it.

    python tests/benchmarks/codec_patterns.py     (4 minutes on one core)

The patterns are the stratified ones of tests/test_codec.py, which encodes 2**18: random bits, numbers of the grid,
their midpoints and the floats next to either, a quarter of them at each of four exponents, with 0 and 8 fraction bits.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import oracle
from test_codec import STORED, ends_and_middle, flushed, grid_of

from altgrad_jax.codec import encode, nan_index

PATTERNS = 2**24


def mismatches(name: str, fraction_bits: int) -> int:
    """How many of the patterns become another index than the nearest, ties to even."""
    grid, values, wrong = grid_of(name, fraction_bits), oracle.refined_table(name, fraction_bits), 0
    exponents = ends_and_middle(grid)
    for exponent in exponents:
        x = oracle.patterns(PATTERNS // len(exponents), values, exponent, seed=exponent % 2**16)
        index = np.asarray(jax.jit(encode, static_argnums=2)(x, jnp.int8(exponent), grid))
        finite = np.isfinite(x)
        exact = oracle.nearest_index(values, np.ldexp(flushed(x[finite].astype(np.float64)), -exponent))
        wrong += np.sum(index[~finite] != nan_index(grid)) + np.sum(index[finite] != exact)
    return int(wrong)


def main():
    total = 0
    for name, fraction_bits in STORED:
        wrong = mismatches(name, fraction_bits)
        print(f"{name:20} + {fraction_bits} bits: {PATTERNS} patterns, {wrong} mismatches", flush=True)
        total += wrong
    sys.exit(f"{total} mismatches" if total else 0)


if __name__ == "__main__":
    main()
