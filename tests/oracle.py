"""The numbers of a format without the library: from ml_dtypes and from the PyTorch reference.

The exact functions work on Fractions, one number at a time; `at_points`, which they validate for 8-bit formats, and
`nearest_by_table` on float64, in which every number and every midpoint of a format of up to 16 bits is exact.
"""

import functools
import json
import pathlib
from fractions import Fraction

import ml_dtypes
import numpy as np

DTYPE_NAMES = [
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float4_e2m1fn",
    "float16",
    "bfloat16",
]
ALTGRAD_NAMES = ["E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"]
FORMAT_NAMES = DTYPE_NAMES + ALTGRAD_NAMES
# Of the many formats those that the suite tests wherever all would be slow.
QUICK = ("float8_e4m3fn", "float8_e3m4", "float4_e2m1fn", "bfloat16", "E0M7", "E7M0")
EIGHT_BIT_NAMES = [name for name in FORMAT_NAMES if name.startswith(("float8", "E"))]

TINY = Fraction(2) ** -126  # XLA flushes smaller float32 numbers to zero.
GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "pytorch_golden.json").read_text())


def numbers(hexes):
    """float64 array of C99 hexadecimal floats, "nan" and "inf" included; plain numbers pass."""
    return np.array([float.fromhex(h) if isinstance(h, str) else h for h in hexes])


@functools.cache
def table(name: str) -> np.ndarray:
    """All numbers >= 0 of a format, ascending, float64."""
    if name in ALTGRAD_NAMES:
        decoded = numbers(GOLDEN["formats"][f"FP8_{name}"]["decode_0_127"])
    else:
        info = ml_dtypes.finfo(np.dtype(name))
        codes = np.arange(2 ** (info.bits - 1), dtype=np.uint8 if info.bits <= 8 else np.uint16)
        with np.errstate(invalid="ignore"):  # Some codes are signalling NaNs.
            decoded = codes.view(np.dtype(name)).astype(np.float64)
    return decoded[np.isfinite(decoded)]


def mantissa_bits(name: str) -> int:
    return GOLDEN["formats"][f"FP8_{name}"]["M"] if name in ALTGRAD_NAMES else ml_dtypes.finfo(np.dtype(name)).nmant


def top_gap(name: str) -> Fraction:
    """Gap of the binade that holds the largest number."""
    largest = table(name)[-1]
    if name == "E0M7":
        return Fraction(1, 128)
    return Fraction(2) ** (np.frexp(largest)[1].item() - 1 - mantissa_bits(name))


def flush(x: Fraction) -> Fraction:
    return x if x >= TINY else Fraction(0)


@functools.cache
def exact_table(name: str) -> list[Fraction]:
    """The table as Fractions."""
    return [Fraction(float(value)) for value in table(name)]


class Exact:
    """The functions of the grid at one x >= 0 between the numbers k and k + 1 of a table, in exact arithmetic."""

    def __init__(self, name: str, x: float, k: int):
        values = exact_table(name)
        self.x, self.k, self.last = flush(Fraction(x)), k, len(values) - 1
        self.at = values[max(k - 1, 0) : k + 2]
        self.below, self.low, self.high = [None, *self.at] if k == 0 else [*self.at, None][:3]
        self.gap = top_gap(name) if k == self.last else self.high - self.low

    def spacing(self) -> Fraction:
        return max(self.gap, TINY)

    def position(self) -> Fraction:
        return Fraction(self.last) if self.k == self.last else self.k + (self.x - self.low) / self.gap

    def nearest(self) -> Fraction:
        if self.k == self.last:
            return self.low
        middle = (self.low + self.high) / 2
        up = self.x > middle or (self.x == middle and self.k % 2 == 1)
        return self.high if up else self.low

    def above(self) -> Fraction:
        return self.low if self.k == self.last else max(self.high, TINY)

    def under(self) -> Fraction:
        return flush(self.low if self.x > self.low else self.below)


def as_float32(x: Fraction) -> np.float32:
    """Rounds once, to nearest-even: all Fractions of these tests are exact in float64."""
    assert Fraction(float(x)) == x
    return np.float32(float(x))


def at_points(name: str) -> dict[str, np.ndarray]:
    """The functions of `Exact` at all `points`, in float64, in which those of formats of up to 16 bits are exact."""
    values, (x, k) = table(name), points(name)
    x, end, tiny = x.astype(np.float64), k == len(values) - 1, float(TINY)
    gap, low, high = np.append(np.diff(values), float(top_gap(name)))[k], values[k], np.append(values, np.inf)[k + 1]
    middle = (low + high) / 2
    under = np.where(x > low, low, values[k - 1])
    return {
        "spacing": np.maximum(gap, tiny),
        "position": np.where(end, k, k + (x - low) / gap),
        "nearest": np.where((x > middle) | ((x == middle) & (k % 2 == 1)), high, low),
        "above": np.where(end, low, np.maximum(high, tiny)),
        "under": np.where(under < tiny, 0.0, under),
    }


@functools.cache
def points(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decisive float32 numbers: all values, quarter points, midpoints, beyond the end, and the floats next to
    each of them; with the index of the number below."""
    values = table(name)
    step = np.append(np.diff(values), float(top_gap(name)))
    exact = np.concatenate([values + q * step for q in (0.0, 0.25, 0.5, 0.75, 1.0)])
    with np.errstate(over="ignore"):  # bfloat16 ends next to float32.
        x = exact.astype(np.float32)
        x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    x = np.unique(np.where(x < 2.0**-126, 0, x)[np.isfinite(x)])
    return x, np.searchsorted(values, x.astype(np.float64), side="right") - 1


def nearest_by_table(name: str, x: np.ndarray) -> np.ndarray:
    """Nearest number of a format, ties to the even index, saturating, for float32 x; float64."""
    values = table(name)
    magnitude = np.where(np.abs(x) < 2.0**-126, 0.0, np.abs(x.astype(np.float64)))
    middles = (values[1:] + values[:-1]) / 2
    low = np.searchsorted(middles, magnitude, side="left")  # Ties go down here ...
    tie = (low < len(middles)) & (magnitude == middles[np.minimum(low, len(middles) - 1)]) & (low % 2 == 1)
    return np.where(np.isnan(x), np.nan, np.copysign(values[np.minimum(low + tie, len(values) - 1)], x))


@functools.cache
def refined_table(name: str, fraction_bits: int) -> np.ndarray:
    """All numbers >= 0 of a format and those between, evenly spaced, that fraction bits add; float64, exact."""
    values = table(name)
    return np.interp(np.arange((len(values) - 1) * 2**fraction_bits + 1) / 2**fraction_bits, range(len(values)), values)


def nearest_index(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index of the number of a table nearest to float64 x, ties to the even one, saturating; NaN is 0."""
    magnitude = np.abs(np.nan_to_num(x))
    middles = (values[1:] + values[:-1]) / 2
    low = np.searchsorted(middles, magnitude, side="left")  # Ties go down here ...
    tie = (low < len(middles)) & (magnitude == middles[np.minimum(low, len(middles) - 1)]) & (low % 2 == 1)
    return np.where(x < 0, -1, 1) * (low + tie)


def patterns(count: int, values: np.ndarray, exponent: int, seed: int) -> np.ndarray:
    """float32 numbers: half of all bit patterns, half near the numbers of a scaled table and their midpoints."""
    rng = np.random.default_rng(seed)
    bits = (np.arange(count // 2, dtype=np.uint64) * (2**32 // (count // 2))).astype(np.uint32)
    bits += rng.integers(0, 2**32 // (count // 2), count // 2, dtype=np.uint32)
    k = rng.integers(0, len(values) - 1, count - count // 2)
    share = rng.choice([0.0, 0.5, 0.25, 1.0, rng.random()], k.size)
    near = np.ldexp(values[k] + share * (values[k + 1] - values[k]), exponent)
    with np.errstate(over="ignore"):
        near = near.astype(np.float32).view(np.uint32) + rng.integers(-2, 3, k.size).astype(np.uint32)
    near ^= rng.integers(0, 2, k.size, dtype=np.uint32) << 31
    return np.concatenate([bits, near]).view(np.float32)
