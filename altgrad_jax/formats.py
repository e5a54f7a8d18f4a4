"""Which numbers exist: floating-point formats as data."""

import dataclasses
import math
import re
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """A floating-point format: the finite list of numbers that a weight can take.

    The positive values are `k * 2**(minexp - mantissa_bits)` for `k <= 2**mantissa_bits` and have `mantissa_bits` bits
    after the leading one from there to `max`; zero and, if signed, the negatives complete the list. The properties mean
    the same as in `numpy.finfo`; values are exact Python floats.

    Attributes:
        name: Name of the format; formats that differ only in name are different.
        exponent_bits: An integer (else a TypeError) >= 0 (else a ValueError); at 0 no number is normal, and at
            0 and 1 the grid is uniform: its numbers are evenly spaced.
        mantissa_bits: The same; at 0 all positive numbers are powers of two.
        bias: An integer; see `minexp`.
        max: The largest finite value; a ValueError if it is not a value of the format, or if a value is not a float64.
        signed: Whether there are negative numbers.

    Example:
        >>> import altgrad_jax as ag
        >>> tiny = ag.FloatFormat("tiny", exponent_bits=2, mantissa_bits=1, bias=1, max=6.0)
        >>> tiny.smallest_subnormal, tiny.eps, tiny.max_index
        (0.5, 0.5, 7)
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    signed: bool = True

    def __post_init__(self):
        for field in ("exponent_bits", "mantissa_bits", "bias"):
            if not isinstance(getattr(self, field), int):
                raise TypeError(f"{field} must be an integer, got {getattr(self, field)!r}.")
        if not (self.exponent_bits >= 0 and self.mantissa_bits >= 0):
            raise ValueError(
                f"exponent_bits and mantissa_bits must be >= 0, got {self.exponent_bits} and {self.mantissa_bits}."
            )
        if not (0 < self.max < math.inf and self.minexp - self.mantissa_bits >= -1074 and self.minexp <= 1023):
            raise ValueError(f"every value of a format must be a positive, finite float64, got {self}.")
        if not (self._steps_to_max.is_integer() and self.max_index < 2 ** (self.bits - self.signed)):
            raise ValueError(
                f"max must be a value of the format, got max={self.max} with {self.exponent_bits} exponent bits, "
                f"{self.mantissa_bits} mantissa bits and bias {self.bias}."
            )

    @property
    def bits(self) -> int:
        """Width of a code: sign, if there is one, exponent and mantissa."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def minexp(self) -> int:
        """Exponent of the lowest binade, which the subnormal numbers share."""
        return 1 - self.bias if self.exponent_bits else -self.bias

    @property
    def maxexp(self) -> int:
        """Exponent of the smallest power of two beyond `max`."""
        return math.frexp(self.max)[1]

    @property
    def min(self) -> float:
        """The smallest value: the negative of the largest one, or 0."""
        return -self.max if self.signed else 0.0

    @property
    def eps(self) -> float:
        """Gap that the grid has at 1.0, or would have if its range reached there."""
        return 2.0**-self.mantissa_bits

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value; with `mantissa_bits == 0` it is also the smallest normal one."""
        return math.ldexp(1.0, self.minexp - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float | None:
        """The smallest value with a full mantissa; None without exponent bits."""
        return math.ldexp(1.0, self.minexp) if self.exponent_bits else None

    @property
    def max_index(self) -> int:
        """Index of `max`: how many positive values there are."""
        return (self._top_binade << self.mantissa_bits) + int(self._steps_to_max)

    def refined(self, fraction_bits: int) -> "FloatFormat":
        """The grid with evenly spaced numbers added between neighbours: index k becomes k * 2**fraction_bits."""
        if fraction_bits == 0:
            return self
        name, mantissa_bits = f"{self.name}+{fraction_bits}", self.mantissa_bits + fraction_bits
        return dataclasses.replace(self, name=name, mantissa_bits=mantissa_bits)

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype that has this name and these numbers, or None."""
        return jnp.dtype(self.name) if _DTYPE_FORMATS.get(self.name) == self else None

    @property
    def _top_binade(self) -> int:
        return max(self.maxexp - 1 - self.minexp, 0)

    @property
    def _steps_to_max(self) -> float:
        return math.ldexp(self.max, self.mantissa_bits - self.minexp - self._top_binade)


# IEEE 754, the OCP 8-bit and microscaling specifications, and ml_dtypes (for the fnuz and b11 variants).
_DTYPES = (
    FloatFormat("float8_e4m3fn", 4, 3, 7, 448.0),
    FloatFormat("float8_e5m2", 5, 2, 15, 57344.0),
    FloatFormat("float8_e3m4", 3, 4, 3, 15.5),
    FloatFormat("float8_e4m3", 4, 3, 7, 240.0),
    FloatFormat("float8_e4m3b11fnuz", 4, 3, 11, 30.0),
    FloatFormat("float8_e4m3fnuz", 4, 3, 8, 240.0),
    FloatFormat("float8_e5m2fnuz", 5, 2, 16, 57344.0),
    FloatFormat("float6_e2m3fn", 2, 3, 1, 7.5),
    FloatFormat("float6_e3m2fn", 3, 2, 3, 28.0),
    FloatFormat("float4_e2m1fn", 2, 1, 1, 6.0),
    FloatFormat("float16", 5, 10, 15, 65504.0),
    FloatFormat("bfloat16", 8, 7, 127, float.fromhex("0x1.fep127")),
    FloatFormat("float32", 8, 23, 127, float.fromhex("0x1.fffffep127")),
)

# Names, biases and maxima of the AltGrad project; all except E4M3 and E5M2 use every code.
_FAMILY = (
    FloatFormat("E0M7", 0, 7, 0, 127 / 128),
    FloatFormat("E1M6", 1, 6, 0, 3.96875),
    FloatFormat("E2M5", 2, 5, 1, 7.875),
    FloatFormat("E3M4", 3, 4, 3, 31.0),
    FloatFormat("E4M3", 4, 3, 7, 480.0),
    FloatFormat("E5M2", 5, 2, 15, 57344.0),
    FloatFormat("E6M1", 6, 1, 31, 1.5 * 2.0**32),
    FloatFormat("E7M0", 7, 0, 63, 2.0**64),
)

_DTYPE_FORMATS, _ALTGRAD_FORMATS = ({format.name: format for format in formats} for formats in (_DTYPES, _FAMILY))

FormatLike: TypeAlias = FloatFormat | str | DTypeLike

_FLOAT64 = FloatFormat("float64", 11, 52, 1023, float.fromhex("0x1.fffffffffffffp1023"))


def as_format(spec: FormatLike) -> FloatFormat:
    """Returns the format that a name, a dtype or a format stands for.

    Args:
        spec: A `FloatFormat`; a dtype or scalar type such as `jnp.float8_e4m3fn`; the full name of a dtype,
            `"float8_e4m3fn"`; or a name of AltGrad's family in capitals, `"E4M3"`, which has AltGrad's own bias and
            maximum and is in general another grid than the dtype with the same widths. Anything else is a TypeError.

    Raises:
        ValueError: If it is unknown, ambiguous, beyond float32, or `float8_e8m0fnu`: a format for scales, not weights.

    Example:
        >>> import altgrad_jax as ag
        >>> ag.as_format("float8_e4m3fn").max, ag.as_format("E4M3").max
        (448.0, 480.0)
    """
    if isinstance(spec, FloatFormat):
        if not (spec.minexp >= -126 and spec.maxexp <= 128 and spec.mantissa_bits <= 23):
            raise ValueError(f"format must have no more range and precision than float32, got {spec}.")
        return spec
    name = spec if isinstance(spec, str) else _dtype_name(spec)
    known = _DTYPE_FORMATS | _ALTGRAD_FORMATS
    if name in known:
        return known[name]
    if name == "float8_e8m0fnu":
        raise ValueError("float8_e8m0fnu has neither a zero nor a sign, so it cannot hold weights; it is for scales.")
    if candidates := _same_widths(name, known):
        raise ValueError(f"format {name!r} is not a full name: use one of {', '.join(map(repr, candidates))}.")
    raise ValueError(f"format must be one of {', '.join(known)} or a FloatFormat, got {name!r}.")


def label(format: FloatFormat) -> str:
    """The name of a format, and if `as_format` does not know it, also what tells it from others of that name."""
    if (_DTYPE_FORMATS | _ALTGRAD_FORMATS).get(format.name) == format:
        return format.name
    sign = "s" if format.signed else "u"
    return f"{format.name}_{sign}{format.exponent_bits}_{format.mantissa_bits}_{format.bias}_{format.max_index}"


def own_format(dtype: Any) -> FloatFormat:
    """Returns the format of a parameter's own dtype: one of `as_format`, or float64's."""
    return _FLOAT64 if dtype == np.float64 else as_format(jnp.dtype(dtype))


def _dtype_name(spec: Any) -> str:
    try:
        if spec is None:  # numpy reads None as float64.
            raise TypeError
        return jnp.dtype(spec).name
    except TypeError:
        raise TypeError(
            f"format must be a FloatFormat, a dtype or a name such as 'float8_e4m3fn' or 'E4M3', got {spec!r}."
        ) from None


def _same_widths(name: str, known: dict[str, FloatFormat]) -> list[str]:
    widths = re.fullmatch(r"(?:float\d+_)?e(\d)m(\d)\w*", name, re.IGNORECASE)
    wanted = widths and tuple(map(int, widths.groups()))
    return [k for k, format in known.items() if (format.exponent_bits, format.mantissa_bits) == wanted]
