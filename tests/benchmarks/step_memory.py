"""Bytes per weight at the peak of a whole training step on a TPU v5e, read from the program that XLA compiles for it.

Needs no TPU: `pip install -e ".[tpu]"`, then

    python tests/benchmarks/step_memory.py

    optax.adamw              18.07
    8bit, from_grid           7.09
    8bit                      5.05
    factored                  4.05
    b1=0, 2-byte weight       4.10
    factored,  4 unrolled     3.21
    factored,  8 unrolled     2.65
    factored, 16 unrolled     3.20

A decoder of 12 stacked layers, 2048 wide, 604 million weights, scanned and rematerialised, with bfloat16 activations,
one sequence of 512; parameters and state are donated. The peak is what XLA's memory analysis counts: arguments, results
that do not take their places, and temporaries, activations included. In all rows except the first the gradients are
bfloat16: of `from_grid(params, bfloat16)`, or of `altgrad_jax.value_and_grad`, for which each layer is decoded where it
is used. If layers are unrolled, as in Flax nnx, XLA updates a layer before all gradients are there; it chooses for how
many layers at once.
"""

import argparse
import functools
import json

import targets  # Before jax.

# isort: split
import jax
import jax.numpy as jnp
import optax

import altgrad_jax as ag

VOCABULARY, HEAD, BATCH, CONTEXT = 1024, 128, 1, 512
BFLOAT16 = jnp.bfloat16


def shapes(layers, width):
    """Parameters, float32, as shapes."""
    stack = {
        "attention": (layers, width, 3 * width),
        "mix": (layers, width, width),
        "up": (layers, width, 4 * width),
        "down": (layers, 4 * width, width),
    }
    tree = {"layers": stack, "embedding": (VOCABULARY, width), "head": (width, VOCABULARY)}
    described = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return jax.tree.map(described, tree, is_leaf=lambda x: isinstance(x, tuple))


def matrix(kernel):
    return kernel.value(BFLOAT16) if isinstance(kernel, ag.GridArray) else kernel.astype(BFLOAT16)


def normalised(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.float32(x) ** 2, -1, keepdims=True) + 1e-6).astype(x.dtype)


def layer_of(x, layer):
    qkv = (normalised(x) @ matrix(layer["attention"])).reshape(*x.shape[:2], 3, -1, HEAD)
    attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
    x = x + attended.reshape(x.shape) @ matrix(layer["mix"])
    return x + jax.nn.gelu(normalised(x) @ matrix(layer["up"])) @ matrix(layer["down"]), None


def loss_of(params, tokens, unrolled=False):
    x = params["embedding"][tokens[:, :-1]].astype(BFLOAT16)
    layer = jax.checkpoint(layer_of)
    if unrolled:
        for one in params["layers"]:
            x, _ = layer(x, one)
    else:
        x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = (normalised(x) @ matrix(params["head"])).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def of_float32(params, tokens, **arguments):
    return jax.value_and_grad(functools.partial(loss_of, **arguments))(params, tokens)


def of_decoded(params, tokens, **arguments):
    return jax.value_and_grad(functools.partial(loss_of, **arguments))(ag.from_grid(params, BFLOAT16), tokens)


def of_stored(params, tokens, **arguments):
    return ag.value_and_grad(functools.partial(loss_of, **arguments), dtype=BFLOAT16)(params, tokens)


WAYS = {
    "optax.adamw": (optax.adamw(1e-3), None, of_float32),
    "8bit, from_grid": (ag.grid_adamw(1e-3, second_moment="8bit"), 0, of_decoded),
    "8bit": (ag.grid_adamw(1e-3, second_moment="8bit"), 0, of_stored),
    "factored": (ag.grid_adamw(1e-3), 0, of_stored),
    "b1=0, 2-byte weight": (ag.grid_adamw(1e-3, b1=0), 8, of_stored),
}


def peak(way, layers, width, device, unrolled=False):
    """Bytes per weight."""
    tx, fraction_bits, value_and_grad = WAYS[way]
    params = shapes(layers, width)
    if unrolled:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params["layers"])
        params["layers"] = [one] * layers
    weights = sum(x.size for x in jax.tree.leaves(params))
    if fraction_bits is not None:
        params = ag.to_grid(params, fraction_bits=fraction_bits)

    def step(params, state, tokens):
        loss, grads = value_and_grad(params, tokens, unrolled=unrolled)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def placed(tree):
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    tokens = jax.ShapeDtypeStruct((BATCH, CONTEXT + 1), jnp.int32)
    arguments = map(placed, (params, jax.eval_shape(tx.init, params), tokens))
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    memory = program.memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (resident + memory.temp_size_in_bytes) / weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one line of JSON, of 12 layers that are 1024 wide")
    arguments = parser.parse_args()
    device = targets.devices("v5e:2x2")[0]
    if arguments.json:
        print(json.dumps({way: peak(way, 12, 1024, device) for way in ("8bit", "factored")}))
        return
    for way in WAYS:
        print(f"{way:24}{peak(way, 12, 2048, device):6.2f}", flush=True)
    for layers in (4, 8, 16):
        print(
            f"factored, {layers:2} unrolled   {peak('factored', layers, 2048, device, unrolled=True):6.2f}", flush=True
        )


if __name__ == "__main__":
    main()
