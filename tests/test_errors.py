"""Bad input: what was expected, what came, what to do. One test per message."""

import jax.numpy as jnp
import numpy as np
import pytest

import altgrad_jax as ag

NAN, INF = float("nan"), float("inf")


def refuses(error, message):
    return pytest.raises(error, match=message)


class TestHyperparameters:
    """Numbers out of bounds are refused by name and value, before anything is traced."""

    @pytest.mark.parametrize(
        ("name", "interval", "bad"),
        [
            ("learning_rate", r"\[0, inf\)", (-1.0, NAN, INF)),
            ("b1", r"\[0, 1\)", (-0.1, 1.0, NAN)),
            ("b2", r"\[0, 1\)", (-0.1, 1.0, 2, NAN)),
            ("eps", r"\[0, inf\)", (-1e-8, NAN, INF)),
            ("weight_decay", r"\[0, inf\)", (-1, NAN, INF)),
            ("max_stiffness", r"\(0, inf\]", (0.0, -1.0, NAN)),
            ("mantissa_bits", r"\[0, 23\]", (-3, 24, NAN)),
            ("zero_stiffness", r"\[0, inf\)", (-1.0, NAN, INF)),
        ],
    )
    def test_of_manifold_adamw(self, name, interval, bad):
        for value in (*bad, np.float32(bad[0]), np.array(bad[0])):
            with refuses(ValueError, rf"{name} must be in {interval}, got {value}"):
                ag.manifold_adamw(**({"learning_rate": 1e-3} | {name: value}))

    def test_at_their_bounds_are_accepted(self):
        ag.manifold_adamw(0.0, 0.0, 0.0, 0.0, 0.0, mantissa_bits=0, max_stiffness=INF, zero_stiffness=0)
        ag.manifold_adamw(lambda count: 1e-3, mantissa_bits=23)
        ag.manifold_adamw(np.float32(1e-3), b1=np.array(0.9), mantissa_bits=np.int64(4))
        ag.manifold_adamw(jnp.float32(-1.0))  # Arrays pass, as with optax.inject_hyperparams.

    @pytest.mark.parametrize("value", ["0.1", None, 1j, True, [0.1]])
    def test_that_are_no_numbers(self, value):
        with refuses(TypeError, r"learning_rate must be a number in \[0, inf\), got"):
            ag.manifold_adamw(value)

    def test_mantissa_bits_that_are_not_whole(self):
        with refuses(ValueError, "mantissa_bits must be an integer, got 2.5"):
            ag.stiffness_precondition(2.5)

    @pytest.mark.parametrize("arguments", [{"mantissa_bits": 2}, {"zero_stiffness": 1.0}])
    def test_of_the_unbounded_grid_beside_a_format(self, arguments):
        (name,) = arguments
        for make in (ag.stiffness_precondition, lambda **kw: ag.manifold_adamw(1e-3, manifold_aware=False, **kw)):
            with refuses(
                ValueError,
                rf"{name} belongs to the unbounded grid and excludes a format, got {name}=.* and format=E4M3: leave",
            ):
                make(format="E4M3", **arguments)

    def test_manifold_aware_that_is_not_a_bool(self):
        with refuses(TypeError, "manifold_aware must be True or False, got 1"):
            ag.manifold_adamw(1e-3, manifold_aware=1)

    def test_unused_arguments_are_checked(self):
        with refuses(ValueError, r"max_stiffness must be in \(0, inf\], got -1"):
            ag.manifold_adamw(1e-3, manifold_aware=False, max_stiffness=-1)

    def test_unknown_formats(self):
        for make in (
            ag.track_ulp_position,
            lambda f: ag.stiffness_precondition(format=f),
            lambda f: ag.manifold_adamw(1e-3, format=f),
        ):
            with refuses(ValueError, "format must be one of .*got 'float7'"):
                make("float7")
            with refuses(TypeError, "format must be a FloatFormat, a dtype or a name"):
                make(3)


@pytest.mark.parametrize(
    ("name", "tx"),
    [
        ("stiffness_precondition", ag.stiffness_precondition()),
        ("track_ulp_position", ag.track_ulp_position()),
        ("stiffness_precondition", ag.manifold_adamw(1e-3)),
    ],
)
class TestParameters:
    """Missing, mismatched or unsupported parameters are refused where they first appear."""

    def test_missing(self, name, tx):
        w = jnp.ones(3)
        with refuses(ValueError, rf"{name} needs the parameters: call update\(updates, state, params\)"):
            tx.update(w, tx.init(w))

    def test_of_another_tree(self, name, tx):
        params, other = {"a": jnp.ones(3)}, {"b": jnp.ones(3)}
        with refuses(ValueError, rf"{name} needs .* of one tree structure, got updates .*'a'.* and params .*'b'"):
            tx.update(params, tx.init(params), other)

    def test_of_another_shape(self, name, tx):
        params = {"a": jnp.ones((3, 1))}
        with refuses(ValueError, rf"{name} needs .* shapes of the params, got \(3, 1\) for .*\(3,\) at params\['a'\]"):
            tx.update(params, tx.init(params), {"a": jnp.ones(3)})

    @pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.complex64, jnp.float8_e4m3fn, jnp.float8_e5m2, bool])
    def test_of_an_unsupported_dtype(self, name, tx, dtype):
        params = {"net": [jnp.zeros(2, dtype)]}
        with refuses(TypeError, rf"in float32, .*, got {jnp.dtype(dtype)} at params\['net'\]\[0\]: cast it, or"):
            tx.init(params)

    def test_with_updates_of_an_unsupported_dtype(self, name, tx):
        w = jnp.ones(3)
        with refuses(TypeError, rf"{name} needs updates in float32, .*got int32 at updates: cast it"):
            tx.update(jnp.ones(3, jnp.int32), tx.init(w), w)

    def test_with_a_scale_of_another_tree(self, name, tx):
        params = {"a": jnp.ones(3)}
        with refuses(ValueError, rf"{name} needs grid_scale and params of one tree structure"):
            tx.update(params, tx.init(params), params, grid_scale=jnp.ones(3))

    def test_with_a_scale_that_does_not_broadcast(self, name, tx):
        params = {"a": jnp.ones(3)}
        for scale in (jnp.ones((2, 3)), jnp.ones(2)):
            with refuses(ValueError, rf"{name} needs grid_scale that broadcast to .* at params\['a'\]"):
                tx.update(params, tx.init(params), params, grid_scale={"a": scale})

    def test_with_a_scale_that_is_not_positive(self, name, tx):
        params = {"a": jnp.ones(3)}
        with refuses(ValueError, r"grid_scale\['a'\] must be in \(0, inf\), got -1.0"):
            tx.update(params, tx.init(params), params, grid_scale={"a": -1.0})

    def test_that_turn_fp8_after_init(self, name, tx):
        w = jnp.ones(3)
        with refuses(TypeError, rf"{name} needs params in float32, .*got float8_e4m3fn at params"):
            tx.update(w, tx.init(w), w.astype(jnp.float8_e4m3fn))
