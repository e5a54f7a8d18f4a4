"""GridArray, to_grid and from_grid: every index means one number, and comes back."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from quick import some

import altgrad_jax as ag
from altgrad_jax.codec import exponent_range

STORED = [(name, bits) for name in oracle.FORMAT_NAMES for bits in (0, 8)]


def every_index(name, fraction_bits, scale=0.25):
    """A GridArray that holds each index once."""
    format = ag.as_format(name)
    last = format.max_index * 2**fraction_bits
    dtype = next(d for d in (np.int8, np.int16, np.int32) if last <= np.iinfo(d).max)
    index = jnp.arange(-last, last + 1).astype(dtype)
    return ag.GridArray(index, jnp.full(1, np.log2(scale), jnp.int8), format, fraction_bits)


def exact_values(name, fraction_bits, scale=0.25):
    """The numbers of `every_index`, by linear interpolation of the table in float64, which is exact."""
    table = oracle.table(name)
    index = np.arange((len(table) - 1) * 2**fraction_bits + 1)
    positive = np.interp(index / 2**fraction_bits, np.arange(len(table)), table) * scale
    return np.concatenate([-positive[:0:-1], positive])


QUICK = ("float8_e3m4", "bfloat16", "E0M7")


def flushed(values):
    return np.where(np.abs(values) < 2.0**-126, 0, values)


@pytest.mark.parametrize(
    ("name", "fraction_bits"), some(STORED, lambda stored: stored[0] in QUICK and stored != ("bfloat16", 8))
)
class TestEveryIndex:
    """All indices of every format, with and without fraction bits."""

    def test_means_its_number(self, name, fraction_bits):
        scale = 1.0 if name == "bfloat16" else 0.25
        full = ag.from_grid(every_index(name, fraction_bits, scale), full=True)
        np.testing.assert_array_equal(np.asarray(full, np.float64), flushed(exact_values(name, fraction_bits, scale)))

    def test_is_encoded_as_itself(self, name, fraction_bits):
        scale = 1.0 if name == "bfloat16" else 4.0
        q = every_index(name, fraction_bits, scale)
        again = ag.to_grid(
            ag.from_grid(q, full=True), name, fraction_bits=fraction_bits, scale=q.scale, where=lambda path, leaf: True
        )
        # What XLA flushes is index 0; only bfloat16 reaches there.
        kept = np.abs(exact_values(name, fraction_bits, scale)) >= 2.0**-126
        np.testing.assert_array_equal(again.index, np.where(kept, q.index, 0))
        assert again.index.dtype == q.index.dtype
        assert (again.format, again.fraction_bits) == (q.format, q.fraction_bits)
        for arguments in ({"scale": q.scale}, {}):  # A GridArray of the same format keeps its scale.
            encoded = ag.to_grid(q, name, fraction_bits=fraction_bits, where=lambda path, leaf: True, **arguments)
            chex.assert_trees_all_equal(encoded.index, again.index)
            np.testing.assert_array_equal(encoded.exponent, q.exponent)
            assert encoded.exponent.dtype == jnp.int8

    def test_without_its_fraction_is_the_nearest_number_of_the_format(self, name, fraction_bits):
        q = every_index(name, fraction_bits, scale=1.0)
        full = np.asarray(ag.from_grid(q, full=True))
        steps = np.round(np.asarray(q.index) / 2**fraction_bits).astype(int)  # Ties to even, as numpy.
        wanted = np.sign(steps) * oracle.table(name)[np.abs(steps)]
        np.testing.assert_array_equal(ag.from_grid(q), flushed(wanted))
        if fraction_bits == 0:
            np.testing.assert_array_equal(ag.from_grid(q), full)


class TestStorage:
    """One byte with no fraction bits, two with eight; scales of rows."""

    @pytest.mark.parametrize(("bits", "dtype"), [(0, jnp.int8), (8, jnp.int16), (9, jnp.int32), (17, jnp.int32)])
    def test_takes_the_smallest_dtype(self, bits, dtype):
        q = ag.to_grid(jnp.ones((2, 3)), fraction_bits=bits)
        assert q.index.dtype == dtype
        assert q.exponent.dtype == jnp.int8
        assert q.nbytes == 6 * jnp.dtype(dtype).itemsize + 1
        assert (q.shape, q.ndim, q.size) == ((2, 3), 2, 6)

    @pytest.mark.parametrize(
        ("name", "fraction_bits"),
        [
            *((name, 0) for name in oracle.FORMAT_NAMES if name != "bfloat16"),
            ("float8_e4m3fn", 5),
            ("E0M7", 5),
            ("E1M6", 5),
        ],
    )
    def test_scale_of_a_row_is_the_smallest_that_leaves_its_share(self, name, fraction_bits):
        """Half of the largest number, which is first rounded down to an eighth of its octave.

        If all steps are equal, an eighth of the octave less than the largest number: 7/8 of 1 in E0M7, of 4 in E1M6.
        """
        numbers = oracle.table(name)
        largest, uniform = numbers[-1], np.ptp(np.diff(numbers)) == 0
        assert uniform == (name in ("E0M7", "E1M6"))
        octave = 2.0 ** np.floor(np.log2(largest))
        limit = np.floor(8 * largest / octave) / 8 * octave
        limit = limit - octave / 8 if uniform else limit / 2
        edges = np.float32(limit) * np.exp2(np.arange(-8, 1, dtype=np.float32))
        rng = np.random.default_rng(0)
        amax = np.concatenate(
            [edges, np.nextafter(edges, np.float32(0)), np.exp2(rng.uniform(-20, 10, 50)).astype(np.float32)]
        )
        x = rng.uniform(-1, 1, (amax.size, 8)).astype(np.float32) * amax[:, None]
        x[np.arange(amax.size), rng.integers(0, 8, amax.size)] = amax * rng.choice([-1, 1], amax.size)
        q = jax.vmap(lambda row: ag.to_grid(row[None], name, fraction_bits=fraction_bits))(x)
        assert q.scale.shape == (amax.size, 1, 1)
        assert (q.scale.dtype, q.exponent.dtype) == (jnp.float32, jnp.int8)
        scale = np.asarray(q.scale, np.float64)[:, 0, 0]
        np.testing.assert_array_equal(scale, np.exp2(np.asarray(q.exponent, np.float64))[:, 0, 0])
        stored = np.asarray(ag.round_nearest(amax / scale, q.grid))
        assert (stored < limit).all()
        least = 2.0 ** exponent_range(q.grid)[0]
        finer = np.asarray(ag.round_nearest(amax / (scale / 2), q.grid))
        assert ((finer >= limit) | (scale == least)).all()
        assert (scale > least).all() or name == "E7M0"
        assert (amax / (scale * largest) < (1.0 if uniform else 0.5)).all()

    @pytest.mark.parametrize(
        ("fields", "scale"),
        [
            ((0, 3, 0, 7 / 8), 1.0),
            ((1, 3, 7, 1.75 * 2.0**-6), 1.0),
            ((4, 3, 7, 1.875 * 2.0**-6), 1.0),
            ((2, 0, 1, 2.0), 1.0),
            ((4, 3, 7, 1.125 * 2.0**-5), 2.0),
            ((2, 0, 1, 4.0), 2.0),
        ],
    )
    def test_scale_of_a_row_at_seven_tenths_of_the_largest_number(self, fields, scale):
        """It fits if all steps are equal, in a format of any widths."""
        format = ag.FloatFormat("users", *fields)
        numbers = np.asarray(ag.value(jnp.arange(format.max_index + 1.0), format), np.float64)
        assert (np.ptp(np.diff(numbers)) == 0) == (scale == 1)
        np.testing.assert_array_equal(ag.to_grid(jnp.full((1, 8), 0.7 * format.max), format).scale, scale)

    def test_scale_of_bfloat16_is_one(self):
        np.testing.assert_array_equal(ag.to_grid(jnp.array([[1e-30], [1.0], [3e38]]), "bfloat16").scale, 1.0)

    def test_scale_of_a_row_stays_legal(self):
        for name in ("float8_e4m3fn", "E0M7", "E7M0", "float16"):
            format = ag.as_format(name)
            low, high = exponent_range(format)
            largest = format.max * 2.0**high
            q = jax.vmap(lambda row: ag.to_grid(row[None], name))(jnp.float32([[2.0**-126, 0.0], [largest, 0.0]]))  # noqa: B023
            np.testing.assert_array_equal(q.exponent[:, 0, 0], [low, high])
            np.testing.assert_array_equal(ag.from_grid(q)[1, 0], [largest, 0.0])

    def test_scale_of_zeros(self):
        """A row takes that of the largest row, an array that of 1/4."""
        x = jnp.zeros((3, 8)).at[1].set(100.0)
        scale = ag.to_grid(x).scale
        assert scale[0] == scale[1] == scale[2]
        np.testing.assert_array_equal(ag.to_grid(jnp.zeros((3, 8))).scale, ag.to_grid(jnp.full((3, 8), 0.25)).scale)
        assert scale[1] == ag.to_grid(jnp.full((1, 1), 100.0)).scale[0]

    def test_scale_of_a_row_is_at_least_a_thousandth_of_the_largest(self):
        """Rows that become 0 are named; nonzero ones stay below their scale."""
        x = jnp.float32([1.0, 2.0**-9, 2.0**-10, 2.0**-30, 0.0, 2.0**-28])[:, None] * jnp.ones((6, 8))
        with pytest.warns(UserWarning, match=r"2 of 6 rows of params\['a'\] became 0, the first at \(3, 0\): below"):
            q = ag.to_grid({"a": x}, "float8_e3m4")["a"]
        np.testing.assert_array_equal(q.exponent[0, 0] - q.exponent[:, 0], [0, 9, 10, 10, 0, 10])
        np.testing.assert_array_equal(ag.from_grid(q), jnp.where(x < 2.0**-20, 0, x))
        jax.jit(lambda x: ag.to_grid(x, "float8_e3m4"))(x)  # Cannot know, and does not warn.
        ag.to_grid(x, "float8_e3m4", scale=1.0)
        with pytest.warns(UserWarning, match="3 of 6 rows of params became 0") as caught:
            ag.to_grid(x.at[4].set(2.0**-40), "float8_e3m4")
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    def test_scale_of_a_row_is_not_that_of_one_that_is_not_finite(self, bad):
        """Under jit, where nothing can be raised."""
        x = jnp.ones((3, 8)).at[0, 0].set(bad)
        q = jax.jit(ag.to_grid)(x)
        np.testing.assert_array_equal(q.exponent[1:], ag.to_grid(jnp.ones((2, 8))).exponent)
        np.testing.assert_array_equal(ag.from_grid(q)[1:], x[1:])

    @pytest.mark.parametrize(
        ("shape", "exponents"),
        some(
            [
                ((8,), (1,)),
                ((5, 8), (5, 1)),
                ((5, 7), (1, 1)),
                ((4096, 1), (1, 1)),
                ((6, 4, 4), (6, 1, 1)),
                ((3, 3, 5, 8), (3, 3, 5, 1)),
                ((3, 3, 1, 7), (3, 3, 1, 1)),
                ((16, 2, 64), (16, 2, 1)),
                ((2, 0), (1, 1)),
                ((), ()),
            ],
            lambda shapes: shapes[0] in ((8,), (5, 7), (6, 4, 4), (2, 0)),
        ),
    )
    def test_rows_of_less_than_eight_elements_merge_with_the_axis_before(self, shape, exponents):
        q = ag.to_grid(jnp.ones(shape), where=lambda path, leaf: True)
        assert q.exponent.shape == exponents
        given = ag.to_grid(jnp.ones(shape), where=lambda path, leaf: True, scale=0.5)
        assert given.exponent.shape == exponents

    def test_scale_of_the_user(self):
        x = {"a": jnp.full((2, 2), 0.3), "c": jnp.full((2, 3), 0.3)}
        for scale in (0.5, {"a": 0.5, "c": np.float32(0.5)}, {"a": jnp.full((2, 1), 0.5), "c": jnp.full((3,), 0.5)}):
            q = ag.to_grid(x, "E2M5", scale=scale)
            for leaf in ag.from_grid(q).values():
                np.testing.assert_array_equal(leaf, 0.5 * ag.round_nearest(jnp.full(leaf.shape, 0.6), "E2M5"))

    def test_takes_matrices_by_default(self):
        params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "table": jnp.ones((2, 2), jnp.int32), "none": None}
        stored = ag.to_grid(params)
        assert isinstance(stored["kernel"], ag.GridArray)
        assert stored["bias"] is params["bias"]
        assert stored["table"] is params["table"]

    @pytest.mark.parametrize("where", [{"a": False, "b": True}, lambda path, leaf: path[0].key == "b"])
    def test_takes_what_where_says(self, where):
        stored = ag.to_grid({"a": jnp.ones((2, 2)), "b": jnp.ones(2)}, where=where)
        assert not isinstance(stored["a"], ag.GridArray)
        assert stored["b"].scale.shape == (1,)

    def test_scale_has_the_dimensions_of_the_array_and_is_its_own(self):
        one = jnp.float32(0.5)
        q = ag.to_grid({"a": jnp.ones((2, 3, 8)), "c": jnp.ones((2, 8))}, "E2M5", scale=one)
        assert (q["a"].scale.shape, q["c"].scale.shape) == ((2, 3, 1), (2, 1))
        again = ag.to_grid(
            ag.from_grid(q), "E2M5", scale=jax.tree.map(lambda x: x.scale, q, is_leaf=lambda x: hasattr(x, "scale"))
        )
        jax.jit(lambda tree: tree, donate_argnums=0)(again)
        np.testing.assert_array_equal(ag.from_grid(q)["c"], jnp.ones((2, 8)))
        jax.jit(lambda tree: tree, donate_argnums=0)(q)
        assert one == 0.5

    def test_takes_every_legal_scale_and_no_other(self):
        for name, fraction_bits, low, high in [
            ("float8_e4m3fn", 0, -117, 119),
            ("float8_e4m3fn", 8, -109, 119),
            ("E0M7", 0, -119, 126),
            ("E7M0", 8, -56, 63),
            ("float16", 0, -102, 112),
            ("bfloat16", 0, 0, 0),
        ]:
            format = ag.as_format(name)
            step, largest = format.refined(fraction_bits).smallest_subnormal, format.max
            for exponent in (low, high):
                x = jnp.float32([[largest * 2.0**exponent, max(step * 2.0**exponent, 2.0**-126)]])
                q = ag.to_grid(x, name, fraction_bits=fraction_bits, scale=2.0**exponent)
                np.testing.assert_array_equal(q.exponent, exponent)
                np.testing.assert_array_equal(ag.from_grid(q, full=True), x)
            for exponent in (low - 1, high + 1):
                message = rf"scale must be a power of two from 2\*\*{low} to 2\*\*{high}, got {2.0**exponent}"
                with pytest.raises(ValueError, match=message.replace("+", r"\+")):
                    ag.to_grid(jnp.zeros((2, 2)), name, fraction_bits=fraction_bits, scale=2.0**exponent)

    @pytest.mark.parametrize(("max_index", "dtype"), [(254, jnp.uint8), (255, jnp.uint16)])
    def test_without_a_sign(self, max_index, dtype):
        format = ag.FloatFormat("u", 0, 8, 0, max_index / 256, signed=False)
        numbers = np.arange(max_index + 1, dtype=np.float32)[None] / 256
        q = ag.to_grid(numbers, format, scale=1.0)
        assert q.index.dtype == dtype
        np.testing.assert_array_equal(q.index[0], np.arange(max_index + 1))
        np.testing.assert_array_equal(ag.from_grid(q), numbers)
        with pytest.raises(ValueError, match="is not finite or exceeds"):
            ag.to_grid(-numbers, format, scale=1.0)

    def test_stacks(self):
        a, b = (ag.to_grid(jnp.ones((2, 2)), scale=scale) for scale in (0.5, 0.25))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), a, b)
        np.testing.assert_array_equal(ag.from_grid(stacked), jnp.ones((2, 2, 2)))

    def test_of_other_dtypes(self):
        for dtype in (jnp.bfloat16, jnp.float16):
            q = ag.to_grid(jnp.full((2, 2), 0.3, dtype), "float16")
            np.testing.assert_array_equal(ag.from_grid(q, dtype), jnp.full((2, 2), 0.3, dtype))
            assert ag.from_grid(q, dtype).dtype == dtype

    def test_remembers_the_dtype_of_its_leaf(self):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            q = ag.to_grid(jnp.full((2, 2), 0.3, dtype))
            again = ag.to_grid(jax.jit(lambda tree: tree)(q), "E3M4")
            assert q.dtype == again.dtype == q.value().dtype == again.value().dtype == dtype
            assert q.value(jnp.float32).dtype == ag.from_grid(q).dtype == jnp.float32
            np.testing.assert_array_equal(q.value(), ag.from_grid(q, dtype))
        assert ag.GridArray(q.index, q.exponent, q.format).value().dtype == jnp.float32

    @pytest.mark.parametrize(("bits", "dtype"), [(0, jnp.int8), (8, jnp.int16), (17, jnp.int32)])
    def test_most_negative_index_is_nan(self, bits, dtype):
        index = jnp.array([[np.iinfo(dtype).min, 0, 8 << bits]], dtype)
        q = ag.GridArray(index, jnp.zeros((1, 1), jnp.int8), ag.as_format("float8_e4m3fn"), bits)
        for full in (False, True):
            np.testing.assert_array_equal(ag.from_grid(q, full=full), [[np.nan, 0, 2.0**-6]])
        np.testing.assert_array_equal(np.asarray(q.fp8()[0]).astype(np.float32), [[np.nan, 0, 2.0**-6]])


class TestFp8:
    """The hardware's codes straight from the index."""

    @pytest.mark.parametrize("name", [n for n in oracle.DTYPE_NAMES if n.startswith("float8")])
    @pytest.mark.parametrize("fraction_bits", [0, 8])
    def test_is_the_number_of_every_index(self, name, fraction_bits):
        q = every_index(name, fraction_bits)
        codes, scale = jax.jit(ag.GridArray.fp8)(q)
        assert codes.dtype == jnp.dtype(name)
        np.testing.assert_array_equal(np.asarray(codes).astype(np.float32) * scale, ag.from_grid(q))

    @pytest.mark.parametrize("name", ["E4M3", "float16", "float6_e2m3fn"])
    def test_needs_a_hardware_dtype(self, name):
        with pytest.raises(TypeError, match=rf"fp8\(\) needs one of the formats float8_e4m3fn .*, got {name}"):
            ag.to_grid(jnp.ones((2, 2)), name).fp8()


def test_storing_and_reading_compile_one_program_each():
    """For a new shape; operations by themselves would be dozens, and seconds."""
    compiled, listener = [], lambda event, *_, **__: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listener)
    x = jnp.asarray(np.linspace(-1, 1, 23 * 41, dtype=np.float32).reshape(23, 41))

    def programs(function):
        compiled.clear()
        result = function()
        return result, sum("backend_compile" in event for event in compiled)

    stored, of_storing = programs(lambda: ag.to_grid(x))
    _, of_reading = programs(lambda: ag.from_grid(stored))
    jax.monitoring.unregister_event_duration_listener(listener)
    assert (of_storing, of_reading) == (1, 1)


class TestPytree:
    """A GridArray is a node of two leaves for every transformation of JAX."""

    def test_describes_itself(self):
        assert repr(ag.to_grid(jnp.ones((2, 3)), "E3M4", fraction_bits=8)) == (
            "GridArray(E3M4 + 8 bits, shape=(2, 3), int16 + int8[1,1])"
        )
        assert "index=None" in repr(jax.tree.map(lambda leaf: None, ag.to_grid(jnp.ones((2, 3)))))

    def test_keeps_its_grid_through_jit_vmap_scan_and_shapes(self):
        q = ag.to_grid(jax.random.normal(jax.random.key(0), (4, 3)), "E3M4", fraction_bits=2)
        chex.assert_trees_all_equal(jax.jit(lambda q: q)(q), q)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
        chex.assert_trees_all_equal(jax.vmap(ag.from_grid)(stacked)[1], ag.from_grid(q))
        _, outs = jax.lax.scan(lambda carry, q: (carry, ag.from_grid(q)), 0, stacked)
        chex.assert_trees_all_equal(outs[0], ag.from_grid(q))
        shapes = jax.eval_shape(ag.to_grid, jax.ShapeDtypeStruct((4, 3), jnp.float32))
        assert shapes.index == jax.ShapeDtypeStruct((4, 3), jnp.int8)

    def test_encodes_the_same_eager_jitted_and_sharded(self):
        x = jax.random.normal(jax.random.key(0), (8, 16))
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("d")))
        eager = ag.to_grid(x)
        chex.assert_trees_all_equal(jax.jit(ag.to_grid)(x), eager)
        chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (jax.jit(ag.to_grid)(sharded), eager)))

    def test_moves_to_a_sharding(self):
        q = ag.to_grid(jnp.ones((4, 8)))
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        moved = jax.device_put(q, jax.NamedSharding(mesh, jax.P("d")))
        assert len(moved.index.sharding.device_set) == len(moved.exponent.sharding.device_set) == 2
        shared = ag.to_grid(jnp.ones((4, 2)))  # One exponent.
        shardings = dataclasses.replace(
            shared, index=jax.NamedSharding(mesh, jax.P("d")), exponent=jax.NamedSharding(mesh, jax.P())
        )
        assert not jax.device_put(shared, shardings).index.sharding.is_fully_replicated

    def test_refuses_specs_of_more_axes_than_a_shape(self):
        with pytest.raises(ValueError, match=r"at most 2 axes for shape \(4, 8\), got P"):
            ag.shardings({"kernel": ag.to_grid(jnp.ones((4, 8)))}, jax.P(None, None, "x"))

    @pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
    def test_adds_steps_exactly(self, dtype):
        """The sum modulo 2**bits is the intended index for all pairs of int8, and 2**16 of int16."""
        info = np.iinfo(dtype)
        values = (
            np.arange(info.min, info.max + 1)
            if dtype == jnp.int8
            else np.random.default_rng(0).integers(-32512, 32513, 256)
        )
        old, new = (a.ravel().astype(dtype) for a in np.meshgrid(values, values))
        fields = ag.as_format("E3M4"), 0 if dtype == jnp.int8 else 8
        param = ag.GridArray(jnp.asarray(old), jnp.full(1, 3, jnp.int8), *fields)
        update = ag.GridArray(jnp.asarray(new) - jnp.asarray(old), jnp.full(1, -5, jnp.int8), *fields)
        after = optax.apply_updates(param, update)
        np.testing.assert_array_equal(after.index, new)
        np.testing.assert_array_equal(after.exponent, -2)
        assert (after.index.dtype, after.exponent.dtype) == (dtype, jnp.int8)


class TestBadInput:
    """What cannot be stored is refused where it is known."""

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"format": "float32"}, ValueError, "formats of up to 16 bits, got float32"),
            (
                {"fraction_bits": 18},
                ValueError,
                "float8_e3m4 has 111 numbers and takes up to 17 fraction_bits, got 18",
            ),
            ({"fraction_bits": -1}, ValueError, r"fraction_bits must be in \[0, 24\], got -1"),
            ({"fraction_bits": jnp.float32(7.9)}, ValueError, "fraction_bits must be an integer, got 7.9"),
            ({"fraction_bits": True}, TypeError, r"fraction_bits must be a number in \[0, 24\], got True"),
            ({"fraction_bits": 0.5}, ValueError, "fraction_bits must be an integer, got 0.5"),
            ({"scale": 0.3}, ValueError, "scale must be a power of two from .*, got 0.3"),
            ({"scale": -1.0}, ValueError, "scale must be a power of two from .*, got -1.0"),
            ({"scale": 2.0**200}, ValueError, r"scale must be a power of two from 2\*\*-120 to 2\*\*124, got 1.6"),
            ({"scale": 2.0**-140}, ValueError, r"scale must be a power of two from 2\*\*-120 to 2\*\*124, got 7.1"),
            ({"format": "bfloat16", "scale": 0.5}, ValueError, r"power of two from 2\*\*0 to 2\*\*0, got 0.5"),
            ({"scale": np.array([0.5, 0.75])}, ValueError, r"scale must be a power of two from .*, got \[0.5 *0.75\]"),
            ({"scale": 0.0}, ValueError, "scale must be a power of two from .*, got 0.0"),
            ({"scale": np.nan}, ValueError, "scale must be a power of two from .*, got nan"),
            (
                {"format": "E0M7", "fraction_bits": 17},
                ValueError,
                "E0M7 has 127 numbers and takes up to 16 fraction_bits, got 17",
            ),
            ({"scale": np.ones((3, 1))}, ValueError, r"scale must broadcast to \(2, 2\), got shape \(3, 1\)"),
            ({"scale": np.ones((1, 2, 1))}, ValueError, r"scale must broadcast to \(2, 2\), got shape \(1, 2, 1\)"),
            ({"where": {"w": 1, "n": False}}, TypeError, r"where must be a bool at params\['w'\], got 1"),
            ({"fraction_bits": np.int64(18)}, ValueError, "takes up to 17 fraction_bits, got 18"),
            ({"scale": 2.0**-10}, ValueError, r"params\['w'\] is not finite or exceeds 15.5 times its scale: clip it"),
            ({"where": lambda path, leaf: False}, ValueError, "given nothing to store"),
            ({"where": {"w": True, "n": True}}, TypeError, r"floating dtype, got int32 at params\['n'\]: leave it out"),
        ],
    )
    def test_of_to_grid(self, arguments, error, message):
        params = {"w": jnp.ones((2, 2)), "n": jnp.ones((2, 2), jnp.int32)}
        with pytest.raises(error, match=message):
            ag.to_grid(params, **arguments)

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    def test_of_parameters_that_are_not_finite(self, bad):
        with pytest.raises(ValueError, match="is not finite or exceeds"):
            ag.to_grid(jnp.full((2, 2), bad))
