"""FloatFormat and as_format: formats are data, and the data are right."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import altgrad_jax as ag


@pytest.mark.parametrize("name", oracle.FORMAT_NAMES)
class TestFloatFormat:
    """A format describes the numbers that its codes decode to."""

    def test_counts_its_positive_numbers(self, name):
        assert ag.as_format(name).max_index == len(oracle.table(name)) - 1

    def test_ends_where_its_codes_end(self, name):
        format, values = ag.as_format(name), oracle.table(name)
        assert (format.smallest_subnormal, format.max, format.min) == (values[1], values[-1], -values[-1])

    def test_has_the_reference_description(self, name):
        format = ag.as_format(name)
        if name in oracle.ALTGRAD_NAMES:
            golden = oracle.GOLDEN["formats"][f"FP8_{name}"]
            fields = (format.exponent_bits, format.mantissa_bits, format.bias)
            assert fields == (golden["E"], golden["M"], golden["bias"])
            assert (format.max, format.smallest_subnormal) == (golden["max"], golden["min_pos"])
            assert format.bits == 8
            assert format.dtype is None
        else:
            info = ml_dtypes.finfo(np.dtype(name))
            for attribute in ("bits", "eps", "max", "min", "smallest_normal", "smallest_subnormal", "minexp", "maxexp"):
                assert getattr(format, attribute) == float(getattr(info, attribute)), attribute
            assert (format.exponent_bits, format.mantissa_bits) == (info.nexp, info.nmant)
            assert format.dtype == np.dtype(name)

    def test_is_a_constant(self, name):
        format = ag.as_format(name)
        assert hash(format) == hash(dataclasses.replace(format))
        with pytest.raises(dataclasses.FrozenInstanceError):
            format.max = 1.0


class TestFloatFormatOfAUser:
    """Any widths, bias and maximum make a format, if they fit together."""

    def test_without_exponent_bits_no_number_is_normal(self):
        assert ag.as_format("E0M7").smallest_normal is None

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (("bad", -1, 3, 7, 1.0), r"must be >= 0, got -1 and 3"),
            (("bad", 4, -3, 7, 1.0), r"must be >= 0, got 4 and -3"),
            (("bad", 4, 3, 7, 449.0), r"max must be a value of the format, got max=449.0"),
            (("bad", 4, 3, 7, 512.0), r"max must be a value of the format, got max=512.0"),
            (("bad", 4, 3, 7, float("nan")), r"positive, finite float64, got .*max=nan"),
            (("bad", 4, 3, 7, -1.0), r"positive, finite float64, got .*max=-1.0"),
            (("bad", 4, 3, 2000, 1.0), r"positive, finite float64, got .*bias=2000"),
        ],
    )
    def test_refuses_what_does_not_fit(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ag.FloatFormat(*fields)

    def test_refuses_widths_that_are_not_whole(self):
        with pytest.raises(TypeError, match=r"mantissa_bits must be an integer, got 3\.0"):
            ag.FloatFormat("bad", 4, 3.0, 7, 1.0)

    def test_is_no_dtype_by_its_name_alone(self):
        assert ag.FloatFormat("float8_e4m3fn", 2, 1, 1, 6.0).dtype is None

    def test_without_a_sign_has_the_positive_numbers_alone(self):
        signed = ag.FloatFormat("u", 4, 3, 7, 448.0)
        format = dataclasses.replace(signed, signed=False)
        assert (signed.bits, format.bits) == (8, 7)
        assert (signed.min, format.min) == (-448.0, 0.0)
        for name in ("max_index", "max", "minexp", "maxexp", "eps", "smallest_normal", "smallest_subnormal"):
            assert getattr(format, name) == getattr(signed, name), name
        assert format != signed
        assert ag.as_format(format) is format
        refined = format.refined(2)
        assert (refined.signed, refined.bits, refined.max_index) == (False, 9, 4 * format.max_index)

    def test_without_a_sign_is_no_dtype(self):
        for format in map(ag.as_format, ("float8_e4m3fn", "float16")):
            assert dataclasses.replace(format, signed=False).dtype is None

    def test_without_a_sign_takes_every_code_and_no_more(self):
        last = 1.9375 * 2.0**8  # Index 255 of 8 bits.
        format = ag.FloatFormat("u", 4, 4, 7, last, signed=False)
        assert (format.bits, format.max_index) == (8, 255)
        for signed in (False, True):  # The width of the fields bounds the index, with a sign or without.
            with pytest.raises(ValueError, match=r"max must be a value of the format, got max=512\.0"):
                ag.FloatFormat("bad", 4, 4, 7, 512.0, signed=signed)

    def test_refuses_more_than_float32(self):
        for inside in ((8, 3, 127, 1.0), (9, 3, 127, 1.75 * 2.0**127), (2, 23, 1, 1.0)):
            ag.spacing(1.0, ag.FloatFormat("inside", *inside))
        for outside in ((8, 3, 128, 1.0), (9, 3, 127, 2.0**128), (2, 24, 1, 1.0)):
            with pytest.raises(ValueError, match=r"no more range and precision than float32.*name='wide'"):
                ag.spacing(1.0, ag.FloatFormat("wide", *outside))


class TestAsFormat:
    """One meaning for every accepted spelling, and no guesses."""

    def test_accepts_names_dtypes_scalar_types_and_formats(self):
        wanted = ag.as_format("float8_e5m2")
        for spec in (jnp.float8_e5m2, jnp.dtype("float8_e5m2"), jnp.zeros(1, jnp.float8_e5m2).dtype, wanted):
            assert ag.as_format(spec) == wanted

    def test_knows_every_signed_float8_of_jax(self):
        for name in dir(jnp):
            if name.startswith(("float8_", "float6_", "float4_")) and name != "float8_e8m0fnu":
                assert ag.as_format(name).dtype == jnp.dtype(name)

    def test_keeps_altgrad_formats_apart_from_dtypes(self):
        assert ag.as_format("E4M3").max == 480.0
        assert ag.as_format("E3M4").max == 31.0
        assert ag.as_format("float8_e3m4").max == 15.5

    @pytest.mark.parametrize(
        ("spec", "error", "message"),
        [
            ("e4m3", ValueError, r"'e4m3' is not a full name: use one of 'float8_e4m3fn', .*'E4M3'"),
            ("E3M2", ValueError, r"'E3M2' is not a full name: use one of 'float6_e3m2fn'"),
            ("float8_e4m3fnz", ValueError, r"'float8_e4m3fnz' is not a full name: use one of 'float8_e4m3fn'"),
            ("fp8_e4m3", ValueError, r"format must be one of float8_e4m3fn, .*got 'fp8_e4m3'"),
            ("E9M9", ValueError, r"format must be one of .*got 'E9M9'"),
            (jnp.float8_e8m0fnu, ValueError, r"float8_e8m0fnu has neither a zero nor a sign"),
            ("float8_e8m0fnu", ValueError, r"float8_e8m0fnu has neither a zero nor a sign"),
            (jnp.int8, ValueError, r"format must be one of .*got 'int8'"),
            (np.float64, ValueError, r"format must be one of .*got 'float64'"),
            (None, TypeError, r"must be a FloatFormat, a dtype or a name such as .*got None"),
            (4.3, TypeError, r"must be a FloatFormat, a dtype or a name such as .*got 4.3"),
        ],
    )
    def test_refuses_the_rest_with_a_reason(self, spec, error, message):
        with pytest.raises(error, match=message):
            ag.as_format(spec)
