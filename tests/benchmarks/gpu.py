"""Time, memory and bits of an update on an accelerator, beside Optax's.

    python tests/benchmarks/gpu.py                  # 2**28 weights; a minute on an H100
    python tests/benchmarks/gpu.py --log2 16        # tiny, also on a CPU

Per arm: milliseconds of a jitted, donated update with `optax.apply_updates`, the least bytes that it can move (each
input read once, each output written once), the share that these are of a copy at the bandwidth measured in the same
run, and XLA's temporary bytes per weight. Then the integers of five updates here and on the CPU of the same machine:
how many differ. JSON goes beside the table with `--json FILE`. With `flashoptim-jax` its AdamW is measured
too, on bfloat16 weights; its kernels are for GPUs.
"""

import argparse
import functools
import importlib.util
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import altgrad_jax as ag

RATE = 1e-3
STORED = {
    "grid_adamw, factored": (ag.grid_adamw, {}),
    "grid_adamw, 8bit": (functools.partial(ag.grid_adamw, second_moment="8bit"), {}),
    "grid_adamw, float32": (functools.partial(ag.grid_adamw, second_moment="float32"), {}),
    "grid_adamw, b1 = 0, 16 bits": (functools.partial(ag.grid_adamw, b1=0.0), {"fraction_bits": 8}),
    "grid_adamw, b1 = 0, 8 bits": (functools.partial(ag.grid_adamw, b1=0.0), {}),
    "grid_adamw, b1 = 0, bfloat16": (functools.partial(ag.grid_adamw, b1=0.0), {"format": "bfloat16"}),
    "compress_state(on_grid(lion))": (lambda rate: ag.compress_state(ag.on_grid(optax.lion(rate))), {}),
}
FLOATS = {
    "optax.adamw": optax.adamw,
    "optax.lion": optax.lion,
    "optax.adafactor": optax.adafactor,
    "optax.sgd": optax.sgd,
}


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def seconds(step, carry, *rest, repeats: int) -> float:
    """Median over five rounds of the mean of some calls, after two that are not counted."""
    for _ in range(2):
        carry = step(*carry, *rest)
    jax.block_until_ready(carry)
    rounds = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(repeats):
            carry = step(*carry, *rest)
        jax.block_until_ready(carry)
        rounds.append((time.perf_counter() - begun) / repeats)
    return float(np.median(rounds))


def measured(name, tx, params, gradient, bandwidth: float, repeats: int) -> dict:
    """A row of the table. The parameters are donated."""
    weights = gradient.size

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        if hasattr(tx, "step"):
            return tx.step(params, state, gradient)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    least = 2 * nbytes((params, state)) + nbytes(gradient)
    resident = nbytes((params, state))
    program = step.lower(params, state, gradient).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    duration = seconds(program, (params, state), gradient, repeats=repeats)
    return {
        "arm": name,
        "gradient": str(gradient.dtype),
        "ms": round(1e3 * duration, 3),
        "ps_per_weight": round(1e12 * duration / weights, 2),
        "least_bytes_per_weight": round(least / weights, 3),
        "share_of_copy": round(least / bandwidth / duration, 3),
        "resident_bytes_per_weight": round(resident / weights, 3),
        "temporary_bytes_per_weight": round(temporary / weights, 3),
    }


def copy_bandwidth(size: int, repeats: int) -> float:
    """Bytes per second, read and written, of adding 1 to float32 numbers in a buffer of their own."""
    x = jnp.ones(size, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 8 * size / seconds(lambda x: (add(x),), (x,), repeats=repeats)


def different(make, options) -> tuple[int, int]:
    """Integers of weights and momentum after five updates that differ from those of the CPU, and all of them."""
    rng = np.random.default_rng(0)
    start = np.float32(0.02 * rng.standard_normal((384, 512)))
    gradients = np.float32(rng.standard_normal((5, 384, 512)))
    results = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            params, tx = ag.to_grid(jnp.asarray(start), **options), make(RATE)
            state, update = tx.init(params), jax.jit(tx.update)
            for gradient in gradients:
                updates, state = update(jnp.asarray(gradient), state, params)
                params = optax.apply_updates(params, updates)
            leaves = [np.asarray(x) for x in jax.tree.leaves((params, state))]
            results.append([x for x in leaves if x.dtype.kind in "iu" and x.size > 384])
    pairs = list(zip(*results, strict=True))
    return sum(int((a != b).sum()) for a, b in pairs), sum(a.size for a, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log2", type=int, default=28, help="of the number of weights; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10, help="updates per round; default: %(default)s")
    parser.add_argument("--json", help="file to which the rows go")
    args = parser.parse_args()
    rows, columns = 2 ** (args.log2 // 2), 2 ** (args.log2 - args.log2 // 2)
    bandwidth = copy_bandwidth(rows * columns, args.repeats)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, 2**{args.log2} weights, copy {bandwidth / 1e9:.0f} GB/s\n")
    header = ["arm", "gradient", "ms", "ps per weight", "least B", "of a copy", "resident B", "temporary B"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    lines = []
    for dtype in (jnp.float32, jnp.bfloat16):
        gradient = jax.random.normal(jax.random.key(0), (rows, columns), dtype)
        numbers = lambda: 0.02 * jax.random.normal(jax.random.key(1), (rows, columns))  # noqa: E731
        arms = [(name, make(RATE), {}) for name, make in FLOATS.items()] if dtype == jnp.float32 else []
        arms += [(name, make(RATE), options) for name, (make, options) in STORED.items()]
        flash = jax.default_backend() == "gpu" and importlib.util.find_spec("flashoptim_jax")
        if dtype == jnp.bfloat16 and flash:
            import flashoptim_jax

            arms.append(("flashoptim-jax, adamw", flashoptim_jax.flash_adamw(learning_rate=RATE), None))
        for name, tx, options in arms:
            floats = name in FLOATS or options is None
            params = numbers().astype(dtype) if floats else ag.to_grid(numbers(), **options)
            lines.append(measured(name, tx, params, gradient, bandwidth, args.repeats))
            print("| " + " | ".join(map(str, lines[-1].values())) + " |", flush=True)
    for name, (make, options) in STORED.items():
        number, whole = different(make, options)
        lines.append({"arm": name, "different_integers": number, "integers": whole})
        print(f"{name}: {number} of {whole} integers differ from the CPU's", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"device": device, "jax": jax.__version__, "log2": args.log2, "copy": bandwidth, "rows": lines}, file
            )


if __name__ == "__main__":
    main()
