"""Training steps that update each layer inside of the backward pass, so that gradients of one layer exist at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from altgrad_jax.gradients import deeper, slots_of, with_slots, without_slots
from altgrad_jax.grid_array import flatten_stored, is_grid_array, shardings
from altgrad_jax.random_words import part_of_a_stack


def layerwise_update(
    tx: optax.GradientTransformation,
    layer: Callable[[Any, Any], Any],
    *,
    embed: Callable[[Any, Any], Any],
    head: Callable[[Any, Any, Any], Array],
    microbatches: int = 1,
    dtype: DTypeLike | None = jnp.bfloat16,
) -> tuple[Callable, Callable]:
    """A training step of a stack of equal layers that holds the gradients of one layer at a time.

    It keeps the input of each layer, goes back layer by layer, computes a layer again, and updates it in place by `tx`
    before the next one (gradient release: Lv et al. 2023, arXiv 2306.09782). Parameters are `(outer, layers)`:
    `layers` is a tree whose leaves have a leading axis of layers, as `lax.scan` takes them; `outer` is a dictionary
    with the trees "embed" and "head". The head is updated before the layers, the embedding last. Weights that the head
    shares belong to "embed".

    `tx` sees the tree of "embed", "layers" (one of them) and "head" with one part at a time, and `optax.MaskedNode` in
    place of the others; each part has a state of its own, and those of the layers are stacked. So a norm is that of one
    layer. The random words of this library differ from layer to layer.

    Args:
        tx: Any transformation that needs no loss, not compiled by itself: `grid_adamw`, `on_grid`, `optax.adamw`.
        layer: `(parameters of a layer, x) -> x`, of the same shapes and dtypes. Like `embed` and `head` it gets
            GridArrays, and decodes them where it uses them, as under `value_and_grad`.
        embed: `(outer["embed"], batch) -> x`: an array, or a tree of all that layers need of the batch. Masks and keys
            have no gradient; a layer with dropout splits the key and passes a new one on.
        head: `(outer, x, batch) -> loss`, a scalar: the mean over the batch.
        microbatches: In how many equal parts the batch, along the first axis of all its leaves, goes through each layer
            one after the other before the layer is updated. Their gradients are summed in float32; each part counts the
            same, also if its loss is a mean over fewer tokens.
        dtype: Dtype of the gradients of GridArrays; None for the dtype of each, which `optax.apply_if_finite` wants.

    Returns:
        `init(params) -> state`, whose moments have the shardings of their parameters, and `update(params, state, batch)
        -> (params, state, loss)`. Compile the update, and donate parameters and state: `jax.jit(update,
        donate_argnums=(0, 1))`.

    Raises:
        ValueError: If the parameters are not of this form, a layer changes a shape or dtype of its input, or the
            batch cannot be divided.
        TypeError: If `tx` is compiled, a parameter is an integer that is not stored, or dtype is not floating.

    Example:
        >>> import altgrad_jax as ag, jax, jax.numpy as jnp
        >>> outer = {"embed": {"kernel": jnp.ones((4, 8))}, "head": {"kernel": jnp.ones((8, 1))}}
        >>> params = ag.to_grid((outer, {"kernel": 0.1 * jnp.ones((3, 8, 8))}))
        >>> init, update = ag.layerwise_update(
        ...     ag.grid_adamw(1e-2), lambda p, x: x + jnp.tanh(x @ p["kernel"]),
        ...     embed=lambda p, batch: batch @ p["kernel"],
        ...     head=lambda outer, x, batch: jnp.mean((x @ outer["head"]["kernel"]) ** 2))
        >>> params, state, loss = jax.jit(update)(params, init(params), jnp.ones((2, 4)))
        >>> params[1]["kernel"]
        GridArray(float8_e3m4, shape=(3, 8, 8), int8 + int8[3,8,1])
    """
    if not (isinstance(microbatches, int) and microbatches > 0):
        raise ValueError(f"microbatches must be a positive int, got {microbatches!r}.")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, because it is that of gradients, got {dtype}.")
    if hasattr(tx.update, "lower"):
        raise TypeError("tx must not be compiled by itself, where it would not see which layer it is: compile update.")

    def init(params):
        outer, layers, number, part = _checked(params)

        def of_layer(layer):
            with part_of_a_stack(layer[0]):
                return tx.init(part("layers", layer[1]))

        # One after the other: an inner transformation is initialised from decoded weights.
        start = lambda layers: lax.map(of_layer, (jnp.arange(number), layers))  # noqa: E731
        like = _shardings(jax.eval_shape(start, layers), part("layers", layers))
        stacked = jax.jit(start, out_shardings=like)(layers)
        return {name: tx.init(part(name, outer[name])) for name in ("embed", "head")}, stacked

    def update(params, state, batch):
        outer, layers, number, part = _checked(params)
        states, layer_states = state
        batch = split(batch)
        x = lax.map(functools.partial(embed, outer["embed"]), batch)
        _check_layer(layer, layers, x)

        def forward(x, p):
            return lax.map(functools.partial(layer, p), x), x

        x, inputs = lax.scan(forward, x, layers)
        (loss, gradient), g = summed(
            lambda slots, x, b: _value_and_vjp(head, (outer, slots), x, b), slots_of(outer, dtype), (x, batch)
        )
        updated = functools.partial(_updated, tx, part)
        new_head, head_state = updated("head", outer["head"], states["head"], gradient["head"])

        def backward(j, carry):
            layers, layer_states, g = carry
            i = number - 1 - j
            p, s, before = (_at(tree, i) for tree in (layers, layer_states, inputs))
            gradient, g = summed(
                lambda slots, before, g: _vjp(layer, (p, slots), before, g), slots_of(p, dtype), (before, g)
            )
            gradient = jax.tree.map(_row_major, gradient)
            with part_of_a_stack(i):
                p, s = updated("layers", p, s, gradient)
            # Everything reads the stacks before they are written: otherwise XLA copies whole stacks.
            p, s, g = lax.optimization_barrier((p, s, g))
            return _put(layers, i, p), _put(layer_states, i, s), g

        layers, layer_states, g = lax.fori_loop(0, number, backward, (layers, layer_states, g))
        from_layers, _ = summed(
            lambda slots, b, g: (_embed_vjp(embed, (outer["embed"], slots), b, g), ()),
            slots_of(outer["embed"], dtype),
            (batch, g),
        )
        gradient = jax.tree.map(jnp.add, gradient["embed"], from_layers)
        new_embed, embed_state = updated("embed", outer["embed"], states["embed"], gradient)
        outer = outer | {"embed": new_embed, "head": new_head}
        return (outer, layers), ({"embed": embed_state, "head": head_state}, layer_states), loss

    def summed(function, slots, parts):
        """The sum of the first results of the microbatches, and all second results."""
        if microbatches == 1:
            first, second = function(slots, *jax.tree.map(lambda x: x[0], parts))
            return first, jax.tree.map(lambda x: x[None], second)

        def add(total, part):
            first, second = function(slots, *part)
            return jax.tree.map(lambda t, f: t + f.astype(t.dtype), total, first), second

        one = jax.eval_shape(function, slots, *jax.tree.map(lambda x: x[0], parts))[0]
        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
        total, second = lax.scan(add, jax.tree.map(wide, one), parts)
        return jax.tree.map(lambda t, x: t.astype(x.dtype), total, one), second

    def split(batch):
        if microbatches == 1:
            return jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
        shapes = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
        lengths = {shape[:1] for shape in shapes.values()}
        if len(lengths) != 1 or () in lengths or next(iter(lengths))[0] % microbatches:
            raise ValueError(
                f"all leaves of the batch must have one length that microbatches={microbatches} divides, got {shapes}."
            )
        return jax.tree.map(lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:]), batch)

    def _value_and_vjp(head, outer, x, batch):
        """Loss and gradients, of which each microbatch has its share, and the gradient of x."""
        params, slots = outer
        with deeper() as depth:

            def loss(slots, floats):
                all_of_x = _with_floats(x, floats)
                return without_slots(head(with_slots(params, slots, depth), all_of_x, batch), depth) / microbatches

            value, (gradient, g) = jax.value_and_grad(loss, (0, 1))(slots, _floats(x))
        return (value, gradient), g

    return init, update


def _floats(x: Any) -> list[Array]:
    """The leaves that have gradients."""
    return [leaf for leaf in jax.tree.leaves(x) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _with_floats(x: Any, floats: list[Array]) -> Any:
    others = iter(floats)
    return jax.tree.map(lambda leaf: next(others) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, x)


def _vjp(layer: Callable, params: tuple, x: Any, g: list[Array]) -> tuple[Any, list[Array]]:
    """Gradients of a layer and of the floating leaves of its input, from those of its result."""
    stored, slots = params
    with deeper() as depth:

        def result(slots, floats):
            return _floats(without_slots(layer(with_slots(stored, slots, depth), _with_floats(x, floats)), depth))

        _, pull = jax.vjp(result, slots, _floats(x))
        return pull(g)


def _embed_vjp(embed: Callable, params: tuple, batch: Any, g: list[Array]) -> Any:
    return _vjp(lambda p, _: embed(p, batch), params, (), g)[0]


def _row_major(gradient: Array) -> Array:
    """On a TPU, where XLA would else transpose weights and moments to the layout in which a product is written."""
    row_major = Layout(tuple(range(gradient.ndim)))
    constrained = lambda gradient: with_layout_constraint(gradient, row_major)  # noqa: E731
    return lax.platform_dependent(gradient, tpu=constrained, default=lambda gradient: gradient)


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Any, i: Array, part: Any) -> Any:
    return jax.tree.map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 0), tree, part)


def _updated(tx: Any, part: Callable, name: str, params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
    params = part(name, params)
    updates, state = tx.update(part(name, gradient), state, params)
    after: Any = optax.apply_updates(params, updates)
    return after[name], state


def _checked(params: Any) -> tuple[dict, Any, int, Callable[[str, Any], dict]]:
    """Outer parameters, layers, their number, and what makes the tree that `tx` sees of a part and its name."""
    if not (isinstance(params, tuple) and len(params) == 2):
        raise ValueError(f"params must be (outer, layers), got {type(params).__name__}.")
    outer, layers = params
    if not (isinstance(outer, dict) and set(outer) == {"embed", "head"}):
        got = sorted(outer) if isinstance(outer, dict) else type(outer).__name__
        raise ValueError(f'outer must be a dictionary of "embed" and "head", got {got}.')
    paths, leaves, _ = flatten_stored(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not is_grid_array(leaf) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"parameters must be floating or stored, got {leaf.dtype} at {jax.tree_util.keystr(path)}.")
    lengths = {jnp.shape(leaf)[:1]: path for path, leaf in jax.tree_util.tree_leaves_with_path(layers)}
    if len(lengths) != 1 or () in lengths:
        found = {jax.tree_util.keystr(path): length for length, path in lengths.items()}
        raise ValueError(
            f"all leaves of layers must have the same leading axis, the layers, got lengths {found}: stack equal "
            "layers, and store them by jax.vmap(to_grid) if rows of fewer than 8 numbers share a scale."
        )
    # A part may hold no stored weight, but not all of them: then on_grid says so.
    stored = any(map(is_grid_array, leaves))
    others = dict.fromkeys(("embed", "layers", "head") if stored else (), optax.MaskedNode())
    return outer, layers, next(iter(lengths))[0], lambda name, tree: others | {name: tree}


def _shardings(state: Any, params: Any) -> Any:
    """Those of the parameters for state leaves at their paths, except in dimensions of one element; None for others."""
    paths, leaves, _ = flatten_stored(params)
    of = {path: (p.index if is_grid_array(p) else p) for path, p in zip(paths, leaves, strict=True)}
    paths, leaves, structure = flatten_stored(state)

    def leaf(path, leaf):
        places = [path[i:] for i in range(len(path)) if path[i:] in of]
        sharding = getattr(of[places[0]], "sharding", None) if places else None
        if isinstance(sharding, NamedSharding) and leaf.ndim == of[places[0]].ndim:
            spec = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
            kept = [axis if n > 1 else None for axis, n in zip(spec, leaf.shape, strict=True)]
            return shardings(leaf, sharding.update(spec=PartitionSpec(*kept)))
        return jax.tree.map(lambda _: None, leaf)

    return structure.unflatten(map(leaf, paths, leaves))


def _check_layer(layer: Callable, layers: Any, x: Any) -> None:
    one = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    takes, gives = jax.eval_shape(lambda layers, x: (one(x), layer(one(layers), one(x))), layers, x)
    written = lambda tree: jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)  # noqa: E731
    if written(takes) != written(gives):
        raise ValueError(f"layer must give what it takes, {written(takes)}, got {written(gives)}.")
