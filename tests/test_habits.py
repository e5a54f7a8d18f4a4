"""Every line of docs/guides/habits.md: what to do with stored parameters, and what happens where it is not done."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import altgrad_jax as ag

FLOATS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (16, 32)), "bias": jnp.zeros(32)},
    "b": {"kernel": jax.random.normal(jax.random.key(1), (32, 8)), "bias": jnp.zeros(8)},
}
PARAMS = ag.to_grid(FLOATS)
GRADIENTS = jax.tree.map(jnp.ones_like, FLOATS)


def same(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def stepped(tx, params=PARAMS, steps=2, gradients=GRADIENTS):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_every_line_of_the_table_is_here():
    table = pathlib.Path(__file__).parents[1].joinpath("docs", "guides", "habits.md").read_text()
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    tests = [name.removeprefix("test_").replace("_", " ") for name in vars(TestInstead) if name.startswith("test_")]
    short = lambda line: line.removeprefix("a ").removeprefix("an ").removeprefix("the ").lower()  # noqa: E731
    assert [short(line) for line in lines if line != "Equinox"] == tests  # Equinox is in test_frameworks.


class TestInstead:
    """The right-hand column does what the left-hand one does for floating parameters."""

    def test_gradients(self):
        loss = lambda params: jnp.sum(params["a"]["kernel"] @ params["b"]["kernel"])  # noqa: E731
        with pytest.raises(TypeError, match="int8"):
            jax.value_and_grad(loss)(PARAMS)
        same(ag.value_and_grad(loss)(PARAMS), jax.value_and_grad(loss)(ag.from_grid(PARAMS)))

    def test_penalty_in_the_loss(self):
        with pytest.raises(TypeError, match=r"need from_grid\(params\)"):
            ag.value_and_grad(optax.tree.norm)(PARAMS)
        penalty = lambda params: optax.tree.norm(ag.from_grid(params), squared=True)  # noqa: E731
        same(ag.value_and_grad(penalty)(PARAMS), jax.value_and_grad(penalty)(ag.from_grid(PARAMS)))

    def test_penalty_by_hand(self):
        squares = lambda tree: sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))  # noqa: E731
        wrong, gradients = ag.value_and_grad(squares)(PARAMS)
        right, expected = ag.value_and_grad(lambda params: squares(ag.from_grid(params)))(PARAMS)
        np.testing.assert_allclose(right, squares(FLOATS), rtol=0.01)
        assert abs(float(wrong) - float(right)) > 0.5 * float(right)
        assert not np.any(gradients["a"]["kernel"])
        same(expected, jax.tree.map(lambda w: 2 * w, ag.from_grid(PARAMS)))

    def test_product(self):
        kernel, dimensions = PARAMS["a"]["kernel"], (((1,), (0,)), ((), ()))
        with pytest.raises(ValueError, match="__jax_array__"):
            jax.lax.dot_general(jnp.ones((2, 16)), kernel, dimensions)
        assert jax.lax.dot_general(jnp.ones((2, 16)), kernel.value(), dimensions).shape == (2, 32)

    def test_global_norm(self):
        norm = float(optax.tree.norm(ag.from_grid(PARAMS)))
        np.testing.assert_allclose(norm, float(optax.tree.norm(FLOATS)), rtol=0.01)
        with pytest.raises(TypeError, match=r"norms, averages and casts of parameters need from_grid\(params\)"):
            optax.tree.norm(PARAMS)

    def test_check_for_nan(self):
        tx = ag.grid_adamw(1e-2)
        bad = {**GRADIENTS, "a": {**GRADIENTS["a"], "kernel": GRADIENTS["a"]["kernel"].at[3, 4].set(jnp.nan)}}
        params = stepped(tx, gradients=bad, steps=1)
        finite = lambda tree: all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))  # noqa: E731
        assert finite(params)
        assert not finite(ag.from_grid(params))

    def test_number_of_weights(self):
        shapes = jax.eval_shape(ag.from_grid, PARAMS)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == optax.tree.size(FLOATS)
        assert optax.tree.size(PARAMS) > optax.tree.size(FLOATS)

    def test_bytes(self):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
        assert size == 16 * 32 + 16 + 32 * 8 + 32 + 4 * (32 + 8)
        assert PARAMS["a"]["kernel"].nbytes == 16 * 32 + 16

    def test_average_of_weights(self):
        mean = ag.from_grid(PARAMS)
        params = stepped(ag.grid_adamw(1e-2))
        with pytest.raises(TypeError, match="scaled, averaged"):
            optax.incremental_update(params, PARAMS, 0.25)
        mean = optax.incremental_update(ag.from_grid(params), mean, 0.25)
        expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, ag.from_grid(params), ag.from_grid(PARAMS))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), mean, expected)

    def test_start_of_an_average_beside_donation(self):
        def step(params, mean):
            params = jax.tree.map(lambda x: x + 0, params)
            return params, optax.incremental_update(ag.from_grid(params), mean, 0.5)

        step = jax.jit(step, donate_argnums=(0, 1))
        fresh = lambda: jax.tree.map(jnp.array, PARAMS)  # noqa: E731
        params = fresh()
        with pytest.raises((ValueError, RuntimeError), match=r"donate.*twice"):
            step(params, ag.from_grid(params))
        params = fresh()
        params, mean = step(params, jax.tree.map(jnp.array, ag.from_grid(params)))
        same(mean, ag.from_grid(PARAMS))

    def test_another_dtype(self):
        with pytest.raises(TypeError, match="or cast its integers"):
            optax.tree.cast(PARAMS, jnp.bfloat16)
        cast = ag.from_grid(PARAMS, jnp.bfloat16)
        assert cast["a"]["kernel"].dtype == jnp.bfloat16
        same(cast["a"]["kernel"].astype(jnp.float32), ag.from_grid(PARAMS)["a"]["kernel"])

    def test_bounded_weights(self):
        bounded = ag.to_grid(jax.tree.map(lambda x: jnp.clip(x, -0.5, 0.5), ag.from_grid(PARAMS)))
        assert float(jnp.max(jnp.abs(bounded["a"]["kernel"].value()))) == 0.5
        assert jax.tree.structure(bounded) == jax.tree.structure(PARAMS)

    def test_clipped_gradients(self):
        with pytest.raises(TypeError, match="inside of on_grid"):
            stepped(optax.chain(ag.grid_adamw(1e-2), optax.clip_by_global_norm(1e-3)))
        tx = optax.chain(optax.clip_by_global_norm(1e-3), ag.grid_adamw(1e-2))
        ours = ag.from_grid(stepped(tx))
        clipped = optax.projections.projection_l2_ball(GRADIENTS, 1e-3)
        expected = ag.from_grid(stepped(ag.grid_adamw(1e-2), gradients=clipped))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, expected)

    def test_scaled_update(self):
        tx = ag.on_grid(optax.sgd(0.5))
        updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
        with pytest.raises(TypeError, match="inside of on_grid"):
            updates["a"]["kernel"] * 0.5
        same(stepped(ag.on_grid(optax.chain(optax.sgd(1.0), optax.scale(0.5)))), stepped(tx))

    def test_numbers_after_a_step(self):
        tx = ag.on_grid(optax.sgd(0.5))
        updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
        after = ag.from_grid(optax.apply_updates(PARAMS, updates))["a"]["kernel"]
        moved = after - ag.from_grid(PARAMS)["a"]["kernel"]
        np.testing.assert_allclose(float(moved.mean()), -0.5, rtol=0.02)
        wrong = optax.apply_updates(ag.from_grid(PARAMS), updates)["a"]["kernel"]
        assert bool((wrong != after).any())

    def test_masks_and_labels(self):
        rule = lambda x: x.ndim >= 2  # noqa: E731
        of_floats, of_stored = jax.tree.map(rule, ag.from_grid(PARAMS)), jax.tree.map(rule, PARAMS)
        decayed = [stepped(ag.grid_adamw(1e-2, weight_decay=1.0, mask=mask)) for mask in (of_floats, of_stored, None)]
        same(decayed[0], decayed[1])
        assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), decayed[0], decayed[2])))
        same(ag.to_grid(FLOATS, where=of_stored), ag.to_grid(FLOATS, where=of_floats))
        # Others say what to make it from.
        with pytest.raises(ValueError, match="GridArray") as caught:
            ag.on_grid(optax.masked(optax.sgd(0.1), of_stored)).init(PARAMS)
        assert "from_grid(params)" in str(caught.value.__notes__)
        labels = jax.tree.map(lambda x: "matrix" if x.ndim >= 2 else "other", PARAMS)
        with pytest.raises(ValueError, match=r"from_grid\(params\)"):
            optax.partition({"matrix": ag.on_grid(optax.sgd(0.1)), "other": ag.grid_adamw(0.1)}, labels).init(PARAMS)

    def test_frozen_weights(self):
        labels = {"a": "frozen", "b": "trained"}
        with pytest.raises(ValueError, match="GridArray"):
            stepped(optax.partition({"frozen": optax.set_to_zero(), "trained": ag.grid_adamw(1e-2)}, labels))
        frozen = ag.on_grid(optax.set_to_zero())
        after = stepped(optax.partition({"frozen": frozen, "trained": ag.grid_adamw(1e-2)}, labels))
        same(after["a"], PARAMS["a"])
        assert bool((after["b"]["kernel"].index != PARAMS["b"]["kernel"].index).any())

    def test_sharding(self):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        kernel, sharding = PARAMS["a"]["kernel"], jax.NamedSharding(mesh, jax.P(None, "x"))
        with pytest.raises(ValueError, match=r"size is 1|divisible"):
            jax.device_put(kernel, sharding)
        placed = jax.device_put(kernel, ag.shardings(kernel, sharding))
        assert placed.index.sharding == sharding
        same(placed, kernel)


class TestPartition:
    """Groups of parameters with optimizers of their own."""

    def test_two_learning_rates(self):
        labels = {"a": "slow", "b": "fast"}
        after = stepped(optax.partition({"slow": ag.grid_adamw(1e-3), "fast": ag.grid_adamw(1e-1)}, labels))
        for name, rate in (("a", 1e-3), ("b", 1e-1)):
            same(after[name], stepped(ag.grid_adamw(rate))[name])

    @pytest.mark.parametrize("second_moment", ["factored", "8bit", "float32"])
    def test_a_group_without_stored_leaves(self, second_moment):
        labels = jax.tree.map(lambda x: "matrix" if x.ndim >= 2 else "vector", FLOATS)
        tx = ag.grid_adamw(1e-2, second_moment=second_moment)
        after = stepped(optax.partition({"matrix": tx, "vector": tx}, labels))
        both = stepped(tx)
        same(after["a"]["bias"], both["a"]["bias"])
        assert bool((after["a"]["kernel"].index != PARAMS["a"]["kernel"].index).any())

    def test_nothing_stored_at_all_is_an_error(self):
        tx = ag.grid_adamw(1e-2)
        with pytest.raises(ValueError, match="no parameter that is stored"):
            tx.update(GRADIENTS, tx.init(FLOATS), FLOATS)
