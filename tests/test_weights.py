"""Which leaves `to_grid` stores when it is told nothing."""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import altgrad_jax as ag
from altgrad_jax.weights import _NAMES, reasons_against


def stored_names(params):
    """Paths of the leaves that to_grid stores, which may be described by shapes."""
    stored = jax.eval_shape(ag.to_grid, params)
    with_path = jax.tree_util.tree_leaves_with_path(stored, is_leaf=lambda leaf: isinstance(leaf, ag.GridArray))
    return {jax.tree_util.keystr(path) for path, leaf in with_path if isinstance(leaf, ag.GridArray)}


class Block(linen.Module):
    """A block of a transformer, as nn.scan stacks it."""

    @linen.compact
    def __call__(self, x, _):
        x = x + linen.MultiHeadDotProductAttention(2, normalize_qk=True)(linen.LayerNorm()(x))
        x = x + linen.Dense(8)(linen.RMSNorm()(x))
        return x, None


class Decoder(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(7, 8)(tokens)
        x, _ = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        return linen.GroupNorm(2)(linen.Conv(8, (3,))(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Norm:
    """As in Equinox, where a norm has a weight."""

    weight: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layers:
    norm: Norm
    linear: Norm
    conv: Norm


class TestModels:
    """Kernels and embeddings are stored, biases and the scales of norms are not, stacked or not."""

    def test_of_linen_with_stacked_layers(self):
        params = jax.eval_shape(Decoder().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        kernels = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        kernels = {name for name in kernels if name.endswith(("['kernel']", "['embedding']"))}
        assert len(kernels) == 7
        assert stored_names(params) == kernels
        scales = {leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "scale" in str(path[-1])}
        assert scales == {1, 2}

    def test_of_nnx(self):
        """State of variables, and plain arrays."""
        model = nnx.eval_shape(lambda: nnx.MultiHeadAttention(2, 8, normalize_qk=True, rngs=nnx.Rngs(0), decode=False))
        state = nnx.state(model, nnx.Param)
        assert {name.split("'")[1] for name in stored_names(state)} == {"query", "key", "value", "out"}
        assert len(stored_names(state)) == len(stored_names(nnx.to_pure_dict(state))) == 4

    def test_of_dataclasses_with_norms_that_have_weights(self):
        norm, linear = Norm(jnp.ones((3, 8)), jnp.ones((3, 8))), Norm(jnp.ones((3, 8, 8)), jnp.ones((3, 8)))
        conv = Norm(jnp.ones((8, 4, 3)), jnp.ones((8, 1)))
        assert stored_names(Layers(norm, linear, conv)) == {".linear.weight", ".conv.weight"}

    @pytest.mark.parametrize("separator", ["/", ".", None])
    def test_of_flattened_dictionaries(self, separator):
        tree = {"upscale": {"kernel": jnp.ones((2, 8)), "bias": jnp.ones((2, 8))}, "scale": {"w": jnp.ones((2, 8))}}
        flat = flax.traverse_util.flatten_dict(tree, sep=separator)
        join = (lambda *names: names) if separator is None else (lambda *names: separator.join(names))
        assert stored_names(flat) == {f"[{join('scale', 'w')!r}]"}  # The kernel has a bias of its shape.
        flat.pop(join("upscale", "bias"))
        assert stored_names(flat) == {f"[{join('scale', 'w')!r}]", f"[{join('upscale', 'kernel')!r}]"}

    def test_of_matrices_that_are_called_b(self):
        """In LoRA, beside another of as many dimensions; in Haiku it is a bias."""
        assert stored_names({"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))}) == {"['a']", "['b']"}
        assert stored_names({"w": jnp.ones((3, 8, 2)), "b": jnp.ones((3, 2))}) == {"['w']"}

    def test_of_layers_in_a_sequence(self):
        """The bias of one is not that of another."""
        norm, linear = Norm(jnp.ones((3, 8)), jnp.ones((3, 8))), Norm(jnp.ones((3, 8, 8)), jnp.ones((3, 8)))
        assert stored_names([norm, linear]) == {"[1].weight"}
        assert stored_names({0: linear, 1: norm}) == {"[0].weight"}

    def test_without_names(self):
        assert stored_names([jnp.ones((2, 2)), (jnp.ones(2), jnp.ones((3, 2)))]) == {"[0]", "[1][1]"}
        assert stored_names({"scale": [jnp.ones((2, 2))]}) == {"['scale'][0]"}
        assert stored_names(jnp.ones((2, 2))) == {""}


class TestReasons:
    """One for each leaf that is not a weight."""

    @pytest.mark.parametrize(
        ("leaf", "reason"),
        [
            ({"kernel": jnp.ones((2, 2))}, None),
            ({"kernel": np.ones((2, 2), np.float16)}, None),
            ({"table": jnp.ones((2, 2), jnp.int32)}, "of dtype int32"),
            ({"kernel": jnp.ones(3)}, "of 1 dimensions"),
            ({"kernel": 1.0}, "of 0 dimensions"),
            *[({name: jnp.ones((2, 2))}, f"named {name}") for name in _NAMES if name != "b"],
            ({"rescale": jnp.ones((2, 2))}, None),
            ({"bias": {"kernel": jnp.ones((2, 2))}}, None),
            ({"input_layernorm": {"weight": jnp.ones((2, 2))}}, "in input_layernorm"),
            ({"ln_1": {"g": jnp.ones((2, 2))}}, "in ln_1"),
            ({"norm1": {"linear": {"weight": jnp.ones((2, 2))}}}, None),
            ({"w": jax.nn.relu}, "of 0 dimensions"),
            ({"w": "relu"}, "of 0 dimensions"),
            ({"key": jax.random.split(jax.random.key(0), (2, 2))}, "of dtype key<fry>"),
        ],
    )
    def test_of_a_leaf(self, leaf, reason):
        [(path, leaf)] = jax.tree_util.tree_leaves_with_path(leaf)
        assert reasons_against([path], [leaf]) == [reason]

    def test_do_not_hold_against_what_is_stored_already(self):
        """By `where` of the user; to_grid rounds it to another format."""
        stored = ag.to_grid({"scale": jnp.ones((2, 8))}, where=lambda path, leaf: True)
        assert ag.to_grid(stored, "E2M5")["scale"].format == ag.as_format("E2M5")


class TestStorage:
    """A table for people: what became of each leaf, and why."""

    def test_names_every_leaf(self):
        params = {"a": jnp.ones((64, 8)), "bias": jnp.ones((2, 8)), "c": jnp.ones((4, 8)), "n": np.int32(3)}
        stored = ag.to_grid(params, "E2M5", fraction_bits=8, where=lambda path, leaf: path[0].key == "a")
        assert ag.diagnostics.storage(stored).splitlines() == [
            "['a']     (64, 8)  E2M5 + 8 bits  2.12",
            "['bias']  (2, 8)   float32        4.00  named bias",
            "['c']     (4, 8)   float32        4.00  left out",
            "['n']     ()       int32          4.00  of 0 dimensions",
            "all                               2.29",
        ]

    def test_takes_what_is_no_array(self):
        model = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
        assert "key<fry>" in ag.diagnostics.storage(model)
        for tree in ({"f": jax.nn.relu, "x": 1.0}, {}):
            assert ag.diagnostics.storage(tree).splitlines()[-1].split() == ["all", "0.00"]

    def test_takes_shapes(self):
        params = {"kernel": jnp.ones((64, 8)), "bias": jnp.ones(8)}
        shapes = jax.eval_shape(ag.to_grid, params)
        assert ag.diagnostics.storage(shapes) == ag.diagnostics.storage(ag.to_grid(params))
