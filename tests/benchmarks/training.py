"""Memory, speed and loss of the largest GPT that trains on one device, with AdamW, the rival, and this library.

    python tests/benchmarks/training.py                   # shapes of Llama-2-7B: 32 layers, or the most that fit
    python tests/benchmarks/training.py --layers 8        # the same 8 layers every way
    python tests/benchmarks/training.py --size 25M        # for a CPU: minutes
    python tests/benchmarks/training.py --size tiny

Each way trains in a process of its own on the sources of Python's standard library, whose bytes are its vocabulary. The
peak is the allocator's, beside the one that XLA's memory analysis foretells. The number of layers is 32 or less: what
the analysis of two small programs extrapolates to the memory of the device, then a layer less until it runs. Losses
are the means of the first and the last ten steps at one learning rate: they show that it trains, not how well. The
rival is bfloat16 weights with stochastic rounding, factored, without a momentum (arXiv 2507.07101).
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from llama import BFLOAT16, Llama, whole

import altgrad_jax as ag

BYTES = 256  # The vocabulary.
SIZES = {  # And the most layers.
    "tiny": (Llama(64, 128, 4, BYTES, 64, 2, 32), 3),
    "25M": (Llama(512, 1376, 8, BYTES, 256, 8, 256), 8),
    "7B": (Llama(vocabulary=BYTES), 32),
}
STORED, BF16 = ("float8_e3m4", 0), ("bfloat16", 0)
WAYS = {
    "optax.adamw, float32": (jnp.float32, optax.adamw, False),
    "optax.adamw, bfloat16": (BFLOAT16, optax.adamw, False),
    "rival, all gradients at once": (BF16, functools.partial(ag.grid_adamw, b1=0.0), False),
    "rival, layer by layer": (BF16, functools.partial(ag.grid_adamw, b1=0.0), True),
    "grid_adamw, all gradients at once": (STORED, ag.grid_adamw, False),
    "grid_adamw, layer by layer": (STORED, ag.grid_adamw, True),
    "grid_adamw 8bit, layer by layer": (STORED, functools.partial(ag.grid_adamw, second_moment="8bit"), True),
}


def parts(way: str, model: Llama, rate: float):
    """Stored or float parameters from shapes or numbers, and init and update."""
    kind, optimizer, layerwise = WAYS[way]
    tx = optimizer(rate)
    if layerwise:
        steps = ag.layerwise_update(tx, model.layer, embed=model.embed, head=model.head)
    elif isinstance(kind, tuple):
        steps = whole(tx, ag.value_and_grad(model.loss, dtype=BFLOAT16))
    else:
        steps = whole(tx, jax.value_and_grad(model.loss))
    if not isinstance(kind, tuple):
        return lambda params: params, steps
    return lambda params: ag.to_grid(params, kind[0], fraction_bits=kind[1]), steps


def dtype_of(way: str):
    kind = WAYS[way][0]
    return jnp.float32 if isinstance(kind, tuple) else kind


def foretold(way: str, model: Llama, layers: int) -> int:
    """Bytes at the peak of a step, by XLA's memory analysis."""
    store, (init, update) = parts(way, model, 1e-3)
    params = jax.eval_shape(store, model.shapes(layers, dtype_of(way)))
    tokens = jax.ShapeDtypeStruct((1, model.context + 1), jnp.int32)
    program = jax.jit(update, donate_argnums=(0, 1)).lower(params, jax.eval_shape(init, params), tokens).compile()
    memory = program.memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return resident + memory.temp_size_in_bytes


def started(way: str, model: Llama, layers: int, store):
    """Stored parameters, made layer by layer: float32 numbers of all layers would not fit."""

    @jax.jit
    def one_layer(key):
        def leaf(path, shape):
            if (name := path[-1].key) == "scale":
                return jnp.ones(shape.shape, shape.dtype)
            std = 0.1 if name == "embedding" else shape.shape[-2] ** -0.5
            std /= (2 * layers) ** 0.5 if name in ("mix", "down") else 1
            return std * jax.random.normal(jax.random.fold_in(key, shape.size + ord(name[0])), shape.shape, shape.dtype)

        return store(jax.tree.map_with_path(leaf, model.shapes(1, dtype_of(way))))

    @functools.partial(jax.jit, donate_argnums=0)
    def put(stack, layer, i):
        return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x[0], i, 0), stack, layer)

    outer, layer = one_layer(jax.random.key(0))
    stack = jax.tree.map(lambda x: jnp.zeros((layers, *x.shape[1:]), x.dtype), layer)
    for i in range(layers):
        stack = put(stack, one_layer(jax.random.key(i))[1], i)
    return outer, stack


def trained(way: str, model: Llama, layers: int, steps: int, rate: float) -> dict:
    store, (init, update) = parts(way, model, rate)
    params = started(way, model, layers, store)
    state = init(params)
    shapes = model.shapes(layers, dtype_of(way))
    weights = sum(x.size for x in jax.tree.leaves(shapes))
    text = b"".join(file.read_bytes() for file in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data, rng = np.frombuffer(text, np.uint8), np.random.default_rng(0)
    update, losses, begun = jax.jit(update, donate_argnums=(0, 1)), [], 0.0
    for step in range(steps):
        if step == 2:  # Compiled, and run once.
            jax.block_until_ready(params)
            begun = time.perf_counter()
        place = rng.integers(len(data) - model.context)
        tokens = jnp.asarray(data[None, place : place + model.context + 1], jnp.int32)
        params, state, loss = update(params, state, tokens)
        losses.append(loss)
    jax.block_until_ready((params, losses))
    seconds = (time.perf_counter() - begun) / (steps - 2)
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "way": way,
        "layers": layers,
        "weights": weights,
        "allocator_GiB": peak and round(peak / 2**30, 2),
        "allocator_bytes_per_weight": peak and round(peak / weights, 3),
        "foretold_bytes_per_weight": round(foretold(way, model, layers) / weights, 3),
        "tokens_per_second": round(model.context / seconds),
        "first_loss": round(float(np.mean(losses[:10])), 4),
        "last_loss": round(float(np.mean(losses[-10:])), 4),
        "device": jax.devices()[0].device_kind,
    }


def fitting(way: str, model: Llama, most: int) -> int:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return most
    two, four = foretold(way, model, 2), foretold(way, model, 4)
    return max(1, min(most, 2 + int((limit - two) / ((four - two) / 2))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, help="default: 32 (25M: 8, tiny: 3), or the most that fit")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=3e-4, help="the learning rate; default: %(default)s")
    parser.add_argument("--size", choices=SIZES, default="7B", help="of a layer; default: %(default)s")
    parser.add_argument("--json", help="file to which the lines go")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model, most = SIZES[args.size]
    if args.here:
        (way,) = args.ways
        layers = args.layers or fitting(way, model, most)
        print(json.dumps({"trying": layers}), flush=True)
        print(json.dumps(trained(way, model, layers, args.steps, args.rate)), flush=True)
        return
    for way in args.ways:
        layers, line = args.layers, {}
        while not line.get("way"):
            command = [sys.executable, __file__, "--here", "--ways", way, "--steps", str(args.steps)]
            command += ["--rate", str(args.rate), "--size", args.size]
            command += ["--layers", str(layers)] if layers else []
            run = subprocess.run(command, capture_output=True, text=True)
            found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
            line = found[-1] if found else {}
            if "way" not in line and ("RESOURCE_EXHAUSTED" not in run.stderr or args.layers or layers == 1):
                line = {"way": way, "layers": layers or line.get("trying"), "error": run.stderr[-300:]}
            layers = line.get("trying", 2) - 1
        print(json.dumps(line), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
