"""layerwise_update: the step of a stack of layers whose gradients exist one layer at a time."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from quick import some

import altgrad_jax as ag
from altgrad_jax.random_words import part_of_a_stack

LAYERS, WIDTH, VOCABULARY = 4, 64, 32
TOKENS = jax.random.randint(jax.random.key(9), (4, 9), 0, VOCABULARY)
CHAINS = {
    "factored": lambda: ag.grid_adamw(1e-2),
    "8bit": lambda: ag.grid_adamw(1e-2, second_moment="8bit"),
    "float32": lambda: ag.grid_adamw(1e-2, second_moment="float32"),
    "lion": lambda: ag.compress_state(ag.on_grid(optax.lion(1e-3)), min_size=1),
    "optax.adamw": lambda: optax.adamw(1e-2),
}


def floats():
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / 8  # noqa: E731
    outer = {
        "embed": {"table": normal(keys[0], VOCABULARY, WIDTH)},
        "head": {"kernel": normal(keys[1], WIDTH, VOCABULARY), "bias": jnp.zeros(VOCABULARY)},
    }
    layers = {
        "up": {"kernel": normal(keys[2], LAYERS, WIDTH, 2 * WIDTH)},
        "down": {"kernel": normal(keys[3], LAYERS, 2 * WIDTH, WIDTH), "bias": jnp.zeros((LAYERS, WIDTH))},
    }
    return outer, layers


def layer(p, x):
    return x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"] + p["down"]["bias"]


def embed(p, tokens):
    return jnp.asarray(p["table"])[tokens[:, :-1]]


def head(outer, x, tokens):
    logits = x @ outer["head"]["kernel"] + outer["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def tied_head(outer, x, tokens):
    logits = x @ jnp.asarray(outer["embed"]["table"]).T + outer["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def loss(params, tokens, head=head):
    outer, layers = params
    x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), embed(outer["embed"], tokens), layers)
    return head(outer, x, tokens)


def stored(name):
    return floats() if name.startswith("optax") else ag.to_grid(floats())


def run(tx, params, steps=3, head=head, wrap=jax.jit, **how):
    """Parameters, state and losses after some steps."""
    init, update = ag.layerwise_update(tx, layer, embed=embed, head=head, dtype=jnp.float32, **how)
    state, update, losses = init(params), wrap(update), []
    for _ in range(steps):
        params, state, value = update(params, state, TOKENS)
        losses.append(float(value))
    return params, state, losses


def outside(tx, params, steps=3, head=head):
    """The same by gradients of the whole loss, with `tx` applied to one part after the other."""
    outer, layers = params
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731

    @jax.jit
    def one(part, state, gradient, i=None):
        with part_of_a_stack(i):
            updates, state = tx.update(gradient, state, part)
            return optax.apply_updates(part, updates), state

    def start(i):
        with part_of_a_stack(i):
            return tx.init({"layers": at(layers, i)})

    states = [tx.init({name: outer[name]}) for name in ("embed", "head")] + [start(jnp.int32(i)) for i in range(LAYERS)]
    losses, gradients = [], jax.jit(ag.value_and_grad(functools.partial(loss, head=head), dtype=jnp.float32))
    for _ in range(steps):
        value, (g_outer, g_layers) = gradients((outer, layers), TOKENS)
        losses.append(float(value))
        for k, name in enumerate(("embed", "head")):
            part, states[k] = one({name: outer[name]}, states[k], {name: g_outer[name]})
            outer = outer | part
        for i in range(LAYERS):
            given = {"layers": at(layers, i)}, states[2 + i], {"layers": at(g_layers, i)}
            part, states[2 + i] = one(*given, jnp.int32(i))
            layers = jax.tree.map(lambda x, new, i=i: x.at[i].set(new), layers, part["layers"])
    return (outer, layers), losses


class TestUpdate:
    @pytest.mark.parametrize("name", some(CHAINS, ("factored", "optax.adamw").__contains__))
    def test_is_that_of_tx_layer_by_layer(self, name):
        """Another program may contract float32 otherwise: at most one integer in 100,000 differs."""
        ours, _, losses = run(CHAINS[name](), stored(name))
        expected, others = outside(CHAINS[name](), stored(name))
        np.testing.assert_allclose(losses, others, rtol=1e-4)
        assert losses[0] == pytest.approx(float(loss(stored(name), TOKENS)), rel=1e-6)
        different = total = 0
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            if a.dtype == jnp.float32:
                np.testing.assert_allclose(a, b, atol=1e-4)
            else:
                different, total = different + int(jnp.sum(a != b)), total + a.size
        assert different <= 1e-5 * total

    def test_of_a_tied_head(self):
        ours, _, _ = run(optax.adamw(1e-2), floats(), head=tied_head)
        expected, _ = outside(optax.adamw(1e-2), floats(), head=tied_head)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, expected)

    @pytest.mark.parametrize("part", some([{"bias": jnp.zeros(VOCABULARY)}, {}], {}.__eq__))
    @pytest.mark.parametrize("second_moment", some(["factored", "8bit"], "factored".__eq__))
    def test_of_parts_without_stored_weights(self, second_moment, part):
        """A tied head may have norms alone, or nothing."""
        outer, layers = ag.to_grid(floats())
        tx = ag.grid_adamw(1e-2, second_moment=second_moment)
        of_tied = lambda outer, x, tokens: tied_head(  # noqa: E731
            outer | {"head": {"bias": jnp.zeros(VOCABULARY)} | outer["head"]}, x, tokens
        )
        (after, _), _, losses = run(tx, (outer | {"head": part}, layers), steps=4, head=of_tied)
        assert losses[-1] < losses[0]
        assert (after["embed"]["table"].index != outer["embed"]["table"].index).any()

    def test_without_stored_weights_on_grid_says_so(self):
        with pytest.raises(ValueError, match="no parameter that is stored"):
            run(ag.grid_adamw(1e-2), floats(), steps=1)

    def test_of_bfloat16_keeps_its_dtypes(self):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), floats())
        after, state, _ = run(optax.adamw(1e-2), params, microbatches=2)
        start, _ = ag.layerwise_update(optax.adamw(1e-2), layer, embed=embed, head=head)
        chex.assert_trees_all_equal_shapes_and_dtypes((after, state), (params, start(params)))

    @pytest.mark.parametrize("microbatches", some([2, 4], (2).__eq__))
    def test_of_microbatches_is_that_of_the_batch(self, microbatches):
        whole, _, losses = run(optax.sgd(0.1), floats())
        parts, _, others = run(optax.sgd(0.1), floats(), microbatches=microbatches)
        np.testing.assert_allclose(losses, others, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)

    @pytest.mark.parametrize("microbatches", some([1, 2], (2).__eq__))
    def test_of_a_tree_between_layers(self, microbatches):
        """Layers pass on a mask, a key of dropout, and what all of them read, which has gradients of its own."""

        def of_batch(p, batch):
            tokens, keys = batch
            x = embed(p, tokens)
            return {"x": x, "memory": 1 + x.mean((1, 2), keepdims=True), "mask": tokens[:, :-1] != 0, "keys": keys}

        def drop(p, x):
            keys = jax.vmap(lambda key: jax.random.split(key)[0])(x["keys"])
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (WIDTH,)))(keys)[:, None] & x["mask"][..., None]
            return x | {"x": x["x"] + kept * layer(p, x["memory"] * x["x"]), "keys": keys}

        def of_x(outer, x, batch):
            return head(outer, x["x"] * x["memory"], batch[0])

        def whole(params, batch):
            x, _ = jax.lax.scan(lambda x, p: (drop(p, x), None), of_batch(params[0]["embed"], batch), params[1])
            return of_x(params[0], x, batch)

        batch, params = (TOKENS, jax.random.split(jax.random.key(3), len(TOKENS))), floats()
        _, update = ag.layerwise_update(optax.sgd(0.1), drop, embed=of_batch, head=of_x, microbatches=microbatches)
        init, _ = ag.layerwise_update(optax.sgd(0.1), drop, embed=of_batch, head=of_x)
        after, _, value = jax.jit(update)(params, init(params), batch)
        expected, gradient = jax.jit(jax.value_and_grad(whole))(params, batch)
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        assert all(float(jnp.abs(g).max()) > 1e-4 for g in jax.tree.leaves(gradient))
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, moved)

    def test_equal_layers_draw_other_bits(self):
        """Layers without an effect have the same gradient, zero, and decay by less than a step."""
        tx = ag.on_grid(optax.chain(optax.add_decayed_weights(0.01), optax.scale(-1.0)))
        outer, layers = stored("factored")
        same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), layers)
        init, update = ag.layerwise_update(tx, lambda p, x: x, embed=embed, head=head)
        (_, after), _, _ = jax.jit(update)((outer, same), init((outer, same)), TOKENS)
        kernels = np.asarray(after["up"]["kernel"].index, int)
        moved = kernels != np.asarray(same["up"]["kernel"].index)
        assert 0.02 < moved.mean() < 0.98
        pairs = [np.corrcoef(moved[i].ravel(), moved[j].ravel())[0, 1] for i in range(LAYERS) for j in range(i)]
        assert np.abs(pairs).max() < 0.05

    @pytest.mark.slow
    def test_trains(self):
        losses = run(ag.grid_adamw(1e-2), stored("factored"), steps=40)[2]
        twin = run(optax.adamw(1e-2), floats(), steps=40)[2]
        assert losses[-1] < 0.2 * losses[0]
        assert abs(losses[-1] - twin[-1]) < 0.1 * losses[0]


class TestErrors:
    """Say what was expected and what came."""

    def start(self, params, **how):
        how = {"embed": embed, "head": head} | how
        init, update = ag.layerwise_update(ag.grid_adamw(1e-2), how.pop("layer", layer), **how)
        return update(params, init(params), TOKENS)

    def test_params_of_another_form(self):
        outer, layers = stored("factored")
        with pytest.raises(ValueError, match=r"params must be \(outer, layers\), got dict"):
            self.start({"outer": outer, "layers": layers})
        with pytest.raises(ValueError, match=r"outer must be a dictionary of \"embed\" and \"head\", got \['embed'\]"):
            self.start(({"embed": outer["embed"]}, layers))

    def test_layers_of_different_lengths(self):
        outer, layers = floats()
        layers["down"]["bias"] = layers["down"]["bias"][:2]
        with pytest.raises(ValueError, match="must have the same leading axis"):
            self.start(ag.to_grid((outer, layers)))

    def test_layers_that_change_their_input(self):
        with pytest.raises(
            ValueError, match=r"layer must give what it takes, float32\[4, 8, 64\], got float32\[4, 8, 3\]"
        ):
            self.start(stored("factored"), layer=lambda p, x: x[..., :3])

    @pytest.mark.parametrize(("microbatches", "batch"), [(3, TOKENS), (2, (TOKENS, TOKENS[:2])), (2, (TOKENS, 1))])
    def test_a_batch_that_microbatches_do_not_divide(self, microbatches, batch):
        params = stored("factored")
        _, update = ag.layerwise_update(ag.grid_adamw(1e-2), layer, embed=embed, head=head, microbatches=microbatches)
        with pytest.raises(ValueError, match=rf"one length that microbatches={microbatches} divides, got"):
            update(params, ({"embed": None, "head": None}, None), batch)

    def test_integers(self):
        outer, layers = floats()
        layers["number"] = jnp.arange(LAYERS)
        with pytest.raises(TypeError, match=r"must be floating or stored, got int32 at \[1\]\['number'\]"):
            self.start(ag.to_grid((outer, layers)))

    def test_a_compiled_transformation(self):
        tx = ag.grid_adamw(1e-2)
        compiled = optax.GradientTransformation(tx.init, jax.jit(tx.update))
        with pytest.raises(TypeError, match="tx must not be compiled by itself"):
            ag.layerwise_update(compiled, layer, embed=embed, head=head)

    @pytest.mark.parametrize("microbatches", [0, 1.5])
    def test_microbatches(self, microbatches):
        with pytest.raises(ValueError, match="microbatches must be a positive int"):
            self.start(stored("factored"), microbatches=microbatches)

    def test_dtype(self):
        with pytest.raises(TypeError, match="dtype must be a floating dtype"):
            self.start(stored("factored"), dtype=jnp.int8)


class TestSharded:
    """Rows or columns on 8 devices, as under FSDP: the same integers, and weights that travel in one byte."""

    MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gathered(self, p):
        """Stored weights on every device, before they are decoded. Their gradients stay sharded."""
        whole = lambda x: jax.lax.with_sharding_constraint(x, jax.NamedSharding(self.MESH, jax.P()))  # noqa: E731
        is_stored = lambda leaf: isinstance(leaf, ag.GridArray)  # noqa: E731
        gather = lambda q: dataclasses.replace(q, index=whole(q.index), exponent=whole(q.exponent))  # noqa: E731
        return jax.tree.map(lambda q: gather(q) if is_stored(q) else q, p, is_leaf=is_stored)

    def step(self, kind):
        """Initial state and a step."""
        tx, gathered_layer = ag.grid_adamw(1e-2), lambda p, x: layer(self.gathered(p), x)
        if kind == "layerwise":
            return ag.layerwise_update(tx, gathered_layer, embed=embed, head=head, dtype=jnp.float32)

        def loss(params, tokens):
            outer, layers = params
            x, _ = jax.lax.scan(lambda x, p: (gathered_layer(p, x), None), embed(outer["embed"], tokens), layers)
            return head(outer, x, tokens)

        def update(params, state, tokens):
            value, grads = ag.value_and_grad(loss, dtype=jnp.float32)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return tx.init, update

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["layerwise", "value_and_grad"])
    @pytest.mark.parametrize("axis", [-2, -1])
    def test_gathers_integers(self, kind, axis):
        params, tokens = (
            stored("factored"),
            jnp.concatenate([TOKENS, TOKENS])[:, :7],
        )  # No activation of the size of a kernel.

        def spec(leaf):
            sharded = leaf.ndim > 1 and leaf.shape[axis] % 8 == 0 and leaf.shape[-2:] != (LAYERS, WIDTH)
            axes = ["data" if sharded and i == leaf.ndim + axis else None for i in range(leaf.ndim)]
            return jax.NamedSharding(self.MESH, jax.P(*axes))

        placed = jax.device_put(params, ag.shardings(params, jax.tree.map(spec, ag.from_grid(params))))
        init, update = self.step(kind)
        state = init(placed)
        for momentum in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, ag.GridArray)):
            if isinstance(momentum, ag.GridArray) and momentum.ndim == 3:
                name = "up" if momentum.shape[-1] == 2 * WIDTH else "down"
                assert momentum.index.sharding == placed[1][name]["kernel"].index.sharding
        batch = jax.device_put(tokens, jax.NamedSharding(self.MESH, jax.P("data")))
        program = jax.jit(update).lower(placed, state, batch).compile()
        ours = program(placed, state, batch)
        expected = jax.jit(update)(params, init(params), tokens)
        pairs = zip(jax.tree.leaves(ours[0]), jax.tree.leaves(expected[0]), strict=True)
        integers = [(a, b) for a, b in pairs if a.dtype != jnp.float32]
        assert sum(int(jnp.sum(a != b)) for a, b in integers) <= 1e-3 * sum(a.size for a, _ in integers)
        gathers = re.findall(r"= \(?(\w+)\[([\d,]*)\].* all-gather(?:-start)?\(", program.as_text())
        sizes = {(dtype, int(np.prod([int(n) for n in shape.split(",") if n]))) for dtype, shape in gathers}
        kernel = 2 * WIDTH * WIDTH
        assert ("s8", kernel) in sizes
        assert not [size for size in sizes if size[0] != "s8" and size[1] % kernel == 0]


class TestFrameworks:
    """Stacks of Flax: the parameters of a scanned linen module, and the state of vmapped nnx modules."""

    def trained(self, layers, one):
        outer, _ = floats()
        params = ag.to_grid((outer, layers))
        tx = ag.grid_adamw(1e-2)
        init, update = ag.layerwise_update(tx, one, embed=embed, head=head, dtype=jnp.float32)
        state, update, losses = init(params), jax.jit(update), []
        for _ in range(30):
            params, state, value = update(params, state, TOKENS)
            losses.append(float(value))
        assert losses[-1] < 0.3 * losses[0]
        leaves = jax.tree.leaves(params[1], is_leaf=lambda leaf: isinstance(leaf, ag.GridArray))
        assert sum(isinstance(leaf, ag.GridArray) for leaf in leaves) == 2
        return losses[0]

    @pytest.mark.slow
    def test_linen(self):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _=None):
                return x + nn.Dense(WIDTH)(jnp.tanh(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))), None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        stack = nn.scan(Block, **axes, length=LAYERS)()
        x = jnp.zeros((1, 1, WIDTH))
        layers = stack.init(jax.random.key(0), x, None)["params"]
        first = self.trained(layers, lambda p, x: Block().apply({"params": p}, x)[0])
        outer, _ = ag.from_grid(ag.to_grid(floats()))
        stored = ag.from_grid(ag.to_grid(layers))
        x, _ = stack.apply({"params": stored}, embed(outer["embed"], TOKENS), None)
        assert first == pytest.approx(float(head(outer, x, TOKENS)), rel=1e-5)

    @pytest.mark.slow
    def test_nnx(self):
        class Block(nnx.Module):
            def __init__(self, rngs):
                self.up, self.down = (nnx.Linear(*s, rngs=rngs) for s in ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)))

            def __call__(self, x):
                return x + self.down(jnp.tanh(self.up(x)))

        stack = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), LAYERS))
        graph, layers = nnx.split(stack)
        self.trained(layers, lambda p, x: nnx.merge(graph, p)(x))
