"""Bytes per weight at the peak of a training step of Llama-2-7B's shapes, as XLA compiles it for a TPU or GPU.

Needs neither (`targets.py`):

    python tests/benchmarks/peak_memory.py --layers 1 2 --largest    # all ways; half an hour
    python tests/benchmarks/peak_memory.py --ways "layerwise, factored" --layers 32
    python tests/benchmarks/peak_memory.py --topology H200           # all ways; three minutes

Layers of 4096 x 11008 with 32 heads, vocabulary 32,000, one sequence of 2048 tokens, activations in bfloat16; attention
in groups of heads and the loss in parts of the sequence, so that activations do not decide. The peak is what XLA's
memory analysis counts: arguments, results that do not take their places, and temporaries, activations included.
Parameters and state are donated. The cycles are those that XLA's cost model estimates for each kernel, loops counted.
"""

import argparse
import dataclasses
import functools
import json
import re
import time

import targets  # Before jax.

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
from llama import BFLOAT16, Llama, whole

import altgrad_jax as ag

MODEL = Llama()
HBM_GIB = {"TPU v5 lite": 15.75, "TPU v6 lite": 31.25, "NVIDIA H100": 78, "NVIDIA H200": 139}
GATHER: list = []  # The mesh of all chips, in which layers gather their weights as integers.


def layer(p, x):
    return MODEL.layer(gathered(GATHER[0], p) if GATHER else p, x)


def loss(params, tokens):
    return MODEL.loss(params, tokens, layer)


def layerwise(tx):
    return ag.layerwise_update(tx, layer, embed=MODEL.embed, head=MODEL.head)


of_stored = ag.value_and_grad(loss, dtype=BFLOAT16)
of_decoded = lambda params, tokens: jax.value_and_grad(loss)(ag.from_grid(params, BFLOAT16), tokens)  # noqa: E731
# Format and fraction bits of the weights, or their dtype; init and update.
WAYS = {
    "optax.adamw, float32": (jnp.float32, lambda: whole(optax.adamw(1e-3), jax.value_and_grad(loss))),
    "optax.adamw, bfloat16": (BFLOAT16, lambda: whole(optax.adamw(1e-3), jax.value_and_grad(loss))),
    "from_grid, 8bit": (("float8_e3m4", 0), lambda: whole(ag.grid_adamw(1e-3, second_moment="8bit"), of_decoded)),
    "value_and_grad, 8bit": (("float8_e3m4", 0), lambda: whole(ag.grid_adamw(1e-3, second_moment="8bit"), of_stored)),
    "value_and_grad, factored": (("float8_e3m4", 0), lambda: whole(ag.grid_adamw(1e-3), of_stored)),
    "layerwise, 8bit": (("float8_e3m4", 0), lambda: layerwise(ag.grid_adamw(1e-3, second_moment="8bit"))),
    "layerwise, factored": (("float8_e3m4", 0), lambda: layerwise(ag.grid_adamw(1e-3))),
    "layerwise, bfloat16, b1 = 0": (("bfloat16", 0), lambda: layerwise(ag.grid_adamw(1e-3, b1=0))),
    "layerwise, optax.adamw": (jnp.float32, lambda: layerwise(optax.adamw(1e-3))),
}


def placed(params, state, tokens, devices) -> tuple:
    """The arguments as shapes with shardings: rows of matrices, of their moments, and sequences over all chips."""
    mesh = jax.sharding.Mesh(np.array(devices), ("chips",))
    of = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))  # noqa: E731

    def rows(leaf):
        stacked = leaf.ndim > 1 and leaf.shape[-2] % len(devices) == 0 and leaf.shape[-2] >= MODEL.width
        return of(*[None] * (leaf.ndim - 2), "chips", None) if stacked else of()

    shardings = jax.tree.leaves(ag.shardings(params, jax.tree.map(rows, params, is_leaf=is_stored)))
    leaves = zip(jax.tree.leaves(params), shardings, strict=True)
    known = {(leaf.shape, leaf.dtype): sharding for leaf, sharding in leaves}
    shaped = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    trees = jax.tree.map(lambda leaf: shaped(leaf, known.get((leaf.shape, leaf.dtype), of())), (params, state))
    return *trees, jax.tree.map(lambda leaf: shaped(leaf, of("chips")), tokens)


def is_stored(leaf) -> bool:
    return isinstance(leaf, ag.GridArray)


def gathered(mesh, p):
    """Integers on every chip, before they are decoded; their gradients stay sharded."""
    whole = lambda x: jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P()))  # noqa: E731
    gather = lambda q: dataclasses.replace(q, index=whole(q.index), exponent=whole(q.exponent))  # noqa: E731
    return jax.tree.map(lambda q: gather(q) if is_stored(q) else q, p, is_leaf=is_stored)


def compiled(way: str, layers: int, devices: list) -> dict:
    kind, make = WAYS[way]
    params = MODEL.shapes(layers, jnp.float32 if isinstance(kind, tuple) else kind)
    weights = sum(x.size for x in jax.tree.leaves(params))
    if isinstance(kind, tuple):
        params = ag.to_grid(params, kind[0], fraction_bits=kind[1])
    init, update = make()
    state = jax.eval_shape(init, params)
    tokens = jax.ShapeDtypeStruct((len(devices), MODEL.context + 1), jnp.int32)
    arguments = placed(params, state, tokens, devices)
    GATHER[:] = [arguments[2].sharding.mesh] if len(devices) > 1 else []
    begun = time.perf_counter()
    program = targets.compiled(jax.jit(update, donate_argnums=(0, 1)).lower(*arguments), devices[0])
    memory = program.memory_analysis()
    try:
        million_cycles = round(cycles(program.as_text()) / 1e6, 1) or None  # XLA:GPU estimates none.
    except jax.errors.JaxRuntimeError:  # Jaxlib 0.10 cannot print some programs for v6e.
        million_cycles = None
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "way": way,
        "chips": f"{len(devices)} x {devices[0].device_kind}",
        "layers": layers,
        "weights": weights,
        "gradients": "float32" if kind == jnp.float32 else "bfloat16",
        "resident": round(resident / weights, 3),
        "peak": round((resident + memory.temp_size_in_bytes) / weights, 3),
        "GiB": round((resident + memory.temp_size_in_bytes) / 2**30, 2),
        "million_cycles": million_cycles,
        "compile_seconds": round(time.perf_counter() - begun),
    }


def cycles(text: str) -> int:
    """Cycles of all kernels of a compiled program, times the lengths of the loops around them."""
    computations, name = {}, ""
    for line in text.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "ENTRY" if begins[1] else begins[2]
        computations.setdefault(name, []).append(line)

    @functools.cache
    def total(name: str) -> int:
        result = 0
        for line in computations.get(name, ()):
            result += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)))
            if loop := re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                # The condition compares with the length.
                lengths = re.findall(r"constant\((\d+)\)", "\n".join(computations[loop[1]]))
                result += total(loop[2]) * max(map(int, lengths), default=1)
        return result

    return total("ENTRY")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", nargs="+", type=int, default=[32])
    parser.add_argument("--largest", action="store_true", help="goes on from two numbers of layers to the largest one")
    parser.add_argument("--sharded", action="store_true", help="rows and sequences over all chips of the topology")
    parser.add_argument("--topology", default="v5e:2x2", help="of TPUs, or H100 or H200; default: %(default)s")
    parser.add_argument("--json", help="file to which the lines go")
    args = parser.parse_args()
    if args.largest and len(args.layers) != 2:
        parser.error("--largest needs two numbers of layers that fit, such as --layers 1 2")
    devices = targets.devices(args.topology)
    devices = devices if args.sharded else devices[:1]

    def tried(way: str, layers: int) -> dict:
        try:
            line = compiled(way, layers, devices)
        except jax.errors.JaxRuntimeError as error:
            line = {
                "way": way,
                "chips": f"{len(devices)} x {devices[0].device_kind}",
                "layers": layers,
                "error": str(error).split("\n")[0][:200],
            }
        print(json.dumps(line), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    for way in args.ways:
        lines = [tried(way, layers) for layers in args.layers]
        if args.largest:
            first, second = lines
            each = (second["GiB"] - first["GiB"]) / (second["layers"] - first["layers"])
            layers = second["layers"] + int((HBM_GIB[devices[0].device_kind] - second["GiB"]) / each)
            fits = "error" not in tried(way, layers)
            while fits != ("error" in tried(way, layers := layers + (1 if fits else -1))):
                pass


if __name__ == "__main__":
    main()
