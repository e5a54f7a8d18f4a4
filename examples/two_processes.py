"""Trains stored weights in two processes: each has half of the weights, of the momentum and of every batch.

    $ python examples/two_processes.py 0    # in one shell,
    $ python examples/two_processes.py 1    # and in another one, within a minute
    process 1: waiting for the other one
    process 1: float32 AdamW validation loss 2.2366, 364.7 kB here
    process 1: two bytes     validation loss 2.2240, 65.1 kB here
    process 1: fingerprint 4a9a0847, the other one's 4a9a0847

Both have the same bits. The same trainings in one process, over two devices and on one:

    $ python examples/two_processes.py alone
    alone, devices: 2, float32 AdamW validation loss 2.2366, fingerprint 7cac1485
    alone, devices: 1, float32 AdamW validation loss 2.2366, fingerprint 485878c7
    92.80% of these weights differ
    alone, devices: 2, two bytes     validation loss 2.2240, fingerprint 4a9a0847
    alone, devices: 1, two bytes     validation loss 2.2231, fingerprint 449a5489
    69.57% of these weights differ

(CPython 3.11, jax 0.10, two CPU cores.) The same gradients move stored weights by the same integers on any sharding,
except for the last bits of sums over a sharded axis. Two devices add the same two numbers in two processes as in one:
the bits are the same. One device adds over a batch in another order, in gradients and in the means of their squares:
after one step (`--steps 1`) 0.00 % of the stored weights differ and 13.03 % of the float32 ones, after 300 steps most.
"""

import argparse
import functools
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import altgrad_jax as ag

BATCH, CONTEXT, EMBEDDING, HIDDEN = 256, 8, 16, 256
# How weights are divided: rows or columns, whichever two divides.
SPECS = {"embedding": P(None, "data"), "kernel_in": P("data"), "kernel_out": P("data")}


ARMS = {
    "float32 AdamW": (lambda params: params, lambda rate: optax.adamw(rate, weight_decay=0.01)),
    "two bytes": (ag.to_grid, ag.grid_adamw),
}


def text() -> tuple[np.ndarray, int]:
    """Windows of CPython's help, shuffled, int32 `[windows, CONTEXT + 1]`, and the number of different characters."""
    characters, text = np.unique(list("".join(sorted(pydoc_data.topics.topics.values()))), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(text.astype(np.int32), CONTEXT + 1)
    return np.random.default_rng(0).permutation(windows), len(characters)


def start(vocabulary: int) -> optax.Params:
    """Initial weights, the same in every process."""
    shapes = (vocabulary, EMBEDDING), (CONTEXT * EMBEDDING, HIDDEN), (HIDDEN, vocabulary)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    weights = [np.asarray(jax.random.normal(key, (n, m)) / n**0.5) for key, (n, m) in zip(keys, shapes, strict=True)]
    return dict(zip(SPECS, weights, strict=True))


def loss_fn(params: optax.Params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the last character, nats."""
    hidden = params["embedding"][windows[:, :-1]].reshape(len(windows), -1) @ params["kernel_in"]
    logits = jnp.tanh(hidden) @ params["kernel_out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]).mean()


def train(arm: str, mesh: Mesh, steps: int, quiet: bool) -> tuple[tuple, float, int]:
    """All of the parameters and state at the end, the validation loss, and the bytes that this process held."""
    store, optimizer = ARMS[arm]
    windows, vocabulary = text()
    tx = optimizer(optax.cosine_decay_schedule(1e-2, steps))
    params = store(start(vocabulary))
    params = jax.device_put(params, ag.shardings(params, {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}))
    everywhere = NamedSharding(mesh, P())
    state = tx.init(params)  # Not jitted, so that the momentum takes the shardings of the parameters.
    is_placed = lambda x: isinstance(x.sharding, NamedSharding)  # noqa: E731
    state = jax.tree.map(lambda x: x if is_placed(x) else jax.device_put(x, everywhere), state)  # Counters and means.

    # The shardings at the end of a step are those at its start: otherwise the second step would compile again.
    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)))
    def step(params, state, batch):
        _, grads = ag.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def sharded(batch):
        """Every process reads the rows of its own devices."""
        sharding = NamedSharding(mesh, P("data"))
        return jax.make_array_from_callback(batch.shape, sharding, lambda rows: batch[rows])

    bar = tqdm(range(steps), desc=f"{arm}: compiling", unit="step", leave=False, disable=quiet)
    for i in bar:
        batch = sharded(windows[i * BATCH : (i + 1) * BATCH])
        params, state = jax.block_until_ready(step(params, state, batch))
        bar.set_description(arm, refresh=False)
    loss = jax.jit(loss_fn)(params, sharded(windows[-4096:]))
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves((params, state)) for shard in leaf.addressable_shards)
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)((params, state))
    return jax.tree.map(np.asarray, whole), float(loss), held


def two_processes(index: int, steps: int, port: int) -> None:
    """Trains with the other process, and compares the bits that both hold at the end."""
    print(f"process {index}: waiting for the other one", flush=True)
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, 2, index, initialization_timeout=60, coordinator_bind_address=address)
    mesh = Mesh(jax.devices(), ("data",), axis_types=(AxisType.Auto,))
    for name in ARMS:
        tree, loss, held = train(name, mesh, steps, quiet=index == 1)
        print(f"process {index}: {name:13} validation loss {loss:.4f}, {held / 1e3:.1f} kB here")
    fingerprints = multihost_utils.process_allgather(ag.diagnostics.fingerprint(tree))
    print(f"process {index}: fingerprint {fingerprints[index]:08x}, the other one's {fingerprints[1 - index]:08x}")
    assert fingerprints[0] == fingerprints[1]


def alone(steps: int) -> None:
    """The same trainings in one process, over two devices and on one."""
    for name in ARMS:
        weights = []
        for devices in (jax.devices(), jax.devices()[:1]):
            mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
            tree, loss, _ = train(name, mesh, steps, quiet=False)
            weights.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(ag.from_grid(tree[0]))]))
            print(f"alone, devices: {len(devices)}, {name:13} validation loss {loss:.4f}, ", end="")
            print(f"fingerprint {int(ag.diagnostics.fingerprint(tree)):08x}")
        print(f"{np.mean(weights[0] != weights[1]):.2%} of these weights differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("process", choices=("0", "1", "alone"), help="which of the two this is, or the comparison")
    parser.add_argument("--steps", type=int, default=300, help="of each training; default: %(default)s")
    parser.add_argument("--port", type=int, default=19_619, help="free, on the loopback; default: %(default)s")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2 if args.process == "alone" else 1)
    if args.process == "alone":
        alone(args.steps)
    else:
        two_processes(int(args.process), args.steps, args.port)


if __name__ == "__main__":
    main()
