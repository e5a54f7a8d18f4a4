"""Bytes that an optimizer step moves on a GPU, read from the program that XLA compiles for it.

Needs no GPU (`targets.py`):

    python tests/benchmarks/gpu_bytes.py
    python tests/benchmarks/gpu_bytes.py --kernels "grid_adamw, factored"

    optax.adamw                      28.00 bytes per weight,   0.00 temporary,  1 kernels
    optax.lion                       20.00 bytes per weight,   0.00 temporary,  1 kernels
    grid_adamw, factored             12.04 bytes per weight,   1.00 temporary,  4 kernels

Per arm of `gpu.py`: what the kernels read and write, with bfloat16 gradients for stored weights, and the most temporary
bytes. Kernels of less than 0.1 bytes per weight are left out, and so are the conditionals of a first step; their
temporary bytes count. At commit 3dea01e the temporary bytes were those of a run on an H200 (`gpu.py`).
"""

import argparse
import functools
import json
import math
import re

import targets  # Before jax.

# isort: split
import jax
import jax.numpy as jnp
import optax
from gpu import FLOATS, RATE, STORED

import altgrad_jax as ag

SHAPE = (16384, 16384)
WIDTH = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (\([^)]*\)|\S+) ([\w\-]+)\((.*)")
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "conditional"}


def nbytes(type: str) -> int:
    """Of a type of HLO, which may be a tuple."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", type)
    return sum(WIDTH[dtype] * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in shapes)


def kernels(text: str) -> list[tuple[str, int, int]]:
    """Name, bytes read and bytes written of each instruction of the entry that runs as a kernel."""
    types, result = {}, []
    for line in text[text.index("ENTRY") :].splitlines():
        if found := INSTRUCTION.match(line):
            name, types[found[1]], kind, rest = found[1], found[2], found[3], found[4]
            if kind not in NO_KERNEL:
                operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                result.append((name, sum(nbytes(types.get(operand, "")) for operand in operands), nbytes(found[2])))
    return result


def compiled(tx, store, dtype, device):
    """The jitted step of `gpu.py` on one matrix."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
    params = placed(jax.eval_shape(store, jax.ShapeDtypeStruct(SHAPE, jnp.float32)))
    state = placed(jax.eval_shape(tx.init, params))

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    gradient = placed(jax.ShapeDtypeStruct(SHAPE, dtype))
    return targets.compiled(jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradient), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=targets.HOPPER, default="H200", help="default: %(default)s")
    parser.add_argument("--kernels", metavar="ARM", choices=[*FLOATS, *STORED], help="shows those of one arm")
    parser.add_argument("--json", action="store_true", help="prints JSON")
    args = parser.parse_args()
    (device,), weights = targets.devices(args.device), math.prod(SHAPE)
    arms = {name: (make(RATE), lambda w: w, jnp.float32) for name, make in FLOATS.items()}
    for name, (make, options) in STORED.items():
        arms[name] = make(RATE), functools.partial(ag.to_grid, **options), jnp.bfloat16
    for name in [args.kernels] if args.kernels else arms:
        program = compiled(*arms[name], device)
        large = [row for row in kernels(program.as_text()) if sum(row[1:]) > 0.1 * weights]
        line = {
            "arm": name,
            "bytes": round(sum(read + written for _, read, written in large) / weights, 2),
            "temporary": round(program.memory_analysis().temp_size_in_bytes / weights, 2),
            "kernels": len(large),
        }
        text = "{arm:<32} {bytes:5.2f} bytes per weight,  {temporary:5.2f} temporary, {kernels:2} kernels"
        print(json.dumps(line) if args.json else text.format(**line), flush=True)
        for kernel, read, written in large if args.kernels else ():
            print(f"    {kernel:<40} reads {read / weights:5.2f}, writes {written / weights:5.2f}")


if __name__ == "__main__":
    main()
