"""The same bits on any mesh, in several processes, and after any restart; checkpoints that were cut or changed."""

import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from chains import STORED
from flax import nnx
from jax.sharding import AxisType
from quick import some

import altgrad_jax as ag
import altgrad_jax.flax_support

CHAINS = STORED | {
    "on_grid(momentum)": lambda: ag.on_grid(optax.scale(-1e-2), momentum=0.9),
    "manifold_adamw": lambda: ag.manifold_adamw(1e-2),
}
SUMMED = ("grid_adamw", "grid_adamw, no momentum")  # They average over rows and columns.


QUICK = ("grid_adamw", "grid_adamw, 8bit", "grid_sgd", "on_grid(adamw)")
LAYOUTS = {
    "1": ((1,), ("a", None)),
    "2 rows": ((2,), ("a", None)),
    "4 rows": ((4,), ("a", None)),
    "8 rows": ((8,), ("a", None)),
    "2 columns": ((2,), (None, "a")),
    "4 columns": ((4,), (None, "a")),
    "8 columns": ((8,), (None, "a")),
    "2 x 4": ((2, 4), ("a", "b")),
    "4 x 2": ((2, 4), ("b", "a")),
}
FLOATS = {"kernel": jax.random.normal(jax.random.key(0), (64, 128)), "bias": jnp.zeros(128)}
UNEVEN = {"kernel": jax.random.normal(jax.random.key(0), (10, 27)), "bias": jnp.zeros(27)}


def start(name, floats=FLOATS):
    """Parameters and a state of a chain, and 100 steps towards a target."""
    tx = CHAINS[name]()
    params = floats if name == "manifold_adamw" else ag.to_grid(floats)
    return tx, params, tx.init(params)


@functools.cache
def trainer(name, shape=None, spec=None):
    """Jitted steps of a chain; with a mesh and a spec for kernels that no device_put divides."""
    tx = CHAINS[name]()

    @functools.partial(jax.jit, static_argnums=2)
    def steps(params, state, count):
        def step(carry, i):
            params, state = carry
            if spec is not None:
                mesh = mesh_of(shape)
                sharding = {"kernel": jax.NamedSharding(mesh, jax.P(*spec)), "bias": jax.NamedSharding(mesh, jax.P())}
                params = jax.lax.with_sharding_constraint(params, ag.shardings(params, sharding))
            gradients = jax.tree.map(lambda w: (w - 0.3) * (1 + 0.1 * jnp.sin(i)), ag.from_grid(params))
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jnp.arange(float(count)))[0]

    return steps


def mesh_of(shape):
    return jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def placed(params, layout):
    shape, spec = LAYOUTS[layout]
    mesh = mesh_of(shape)
    sharding = {"kernel": jax.NamedSharding(mesh, jax.P(*spec)), "bias": jax.NamedSharding(mesh, jax.P())}
    return jax.device_put(params, ag.shardings(params, sharding))


@functools.cache
def alone(name, uneven=False):
    _, params, state = start(name, UNEVEN if uneven else FLOATS)
    return jax.tree.map(np.asarray, trainer(name)(params, state, 100))


def agrees(name, ours, expected):
    """Bit for bit; but sums over a sharded axis, and what comes of them, agree to a few float32 ULPs."""
    with_path, wanted = jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected)
    different = set()
    for (path, one), other in zip(with_path, wanted, strict=True):
        if not np.array_equal(one, other):
            different |= {key.name for key in path if getattr(key, "name", "") in ("row", "column")} or {path}
            np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=2e-6)
    assert different <= ({"row", "column"} if name in SUMMED else set())
    return bool(different)


class TestMeshes:
    """100 steps on 1 to 8 devices, by rows, by columns and by both."""

    @pytest.mark.parametrize("layout", some(LAYOUTS, ("8 columns", "2 x 4").__contains__))
    @pytest.mark.parametrize("name", some(CHAINS, QUICK.__contains__))
    def test_same_bits(self, name, layout):
        tx, params, _ = start(name)
        params = placed(params, layout)
        ours = trainer(name)(params, jax.jit(tx.init)(params), 100)
        assert len(jax.tree.leaves(ours[0]["kernel"])[0].sharding.device_set) == np.prod(LAYOUTS[layout][0])
        differs = agrees(name, ours, alone(name))
        # The other side of the promise: sums over a sharded axis do differ in their last bits.
        assert differs == (name in SUMMED and layout != "1")

    @pytest.mark.parametrize("name", ["grid_adamw, 8bit", "on_grid(momentum)", "grid_sgd"])
    @pytest.mark.parametrize("layout", some(["8 rows", "4 columns", "2 x 4"], "2 x 4".__eq__))
    def test_of_lengths_that_devices_do_not_divide(self, name, layout):
        _, params, state = start(name, UNEVEN)
        ours = trainer(name, *LAYOUTS[layout])(params, state, 100)
        agrees(name, ours, alone(name, uneven=True))

    @pytest.mark.parametrize("layout", some(["8 rows", "8 columns", "2 x 4"], "2 x 4".__eq__))
    @pytest.mark.parametrize("name", some(CHAINS, "grid_adamw".__eq__))
    def test_communicate_nothing_but_sums_and_maxima_of_rows_and_columns(self, name, layout):
        floats = {"kernel": jnp.ones((512, 1024)), "bias": jnp.zeros(1024)}
        tx, params, _ = start(name, floats)
        params, gradients = placed(params, layout), placed(floats, layout)
        # Not jitted, because XLA would not shard what depends on no number.
        state = tx.init(params)
        text = jax.jit(tx.update).lower(gradients, state, params).compile().as_text()
        found = re.findall(r"= (.*) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
        assert {kind for _, kind in found} <= {"all-reduce", "all-gather"}
        shapes = [shape for shapes, _ in found for shape in re.findall(r"\[([\d,]*)\]", shapes)]
        counts = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
        # Of each device those of its rows or columns; a shard has 65,536 elements.
        assert all(count <= 8 * 1024 for count in counts)
        if layout == "8 rows" and name not in SUMMED:  # A row is on one device: what is left is whether one is new.
            assert set(counts) <= {1}


WORKER = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, sys.argv[3])
import test_sharding as test
import altgrad_jax as ag
tx, params, _ = test.start(sys.argv[4])
params = test.placed(params, "2 rows")
ours = test.trainer(sys.argv[4])(params, tx.init(params), 20)
assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
print(int(jax.jit(ag.diagnostics.fingerprint)(ours)))
"""


@pytest.mark.slow
class TestProcesses:
    """Two processes on the loopback, one device each."""

    @pytest.mark.parametrize("name", ["grid_adamw, 8bit"])
    def test_same_bits(self, name):
        _, params, state = start(name)
        expected = int(ag.diagnostics.fingerprint(trainer(name)(params, state, 20)))
        address = f"localhost:{20000 + os.getpid() % 20000}"
        command = [sys.executable, "-c", WORKER, address]
        rest = [str(pathlib.Path(__file__).parent), name]
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        workers = [
            subprocess.Popen([*command, str(i), *rest], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
            for i in range(2)
        ]
        outputs = [worker.communicate(timeout=120) for worker in workers]
        assert all(worker.returncode == 0 for worker in workers), outputs[0][1][-2000:]
        assert [int(out.split()[-1]) for out, _ in outputs] == [expected] * 2


class TestFingerprint:
    """A hash of bits and places, the same on any sharding."""

    @pytest.mark.parametrize("layout", ["8 rows", "2 x 4"])
    def test_is_that_of_one_device(self, layout):
        _, params, state = start("grid_adamw")
        whole = ag.diagnostics.fingerprint((params, state))
        here = placed(params, layout)
        assert ag.diagnostics.fingerprint((here, jax.jit(CHAINS["grid_adamw"]().init)(here))) == whole
        assert jax.jit(ag.diagnostics.fingerprint)((params, state)) == whole

    @pytest.mark.parametrize(
        "dtype",
        [bool, "int4", "int8", "uint16", "int32", "float4_e2m1fn", "float8_e4m3fn", "bfloat16", "float16", "float32"],
    )
    def test_changes_with_every_element(self, dtype):
        x = jnp.zeros((3, 5), dtype)
        seen = {int(ag.diagnostics.fingerprint(x))}
        ones = (jnp.asarray(np.arange(15).reshape(3, 5) == i).astype(dtype) for i in range(15))
        seen |= {int(ag.diagnostics.fingerprint(one)) for one in ones}
        assert len(seen) == 16

    def test_sees_bits_places_names_and_types(self):
        x = jnp.arange(6.0)
        trees = [
            {"a": x},
            {"b": x},
            [x],
            x,
            x.reshape(2, 3),
            x.reshape(3, 2),
            x[::-1],
            x.astype(jnp.bfloat16),
            x.astype(jnp.int32),
            -x,
            x.at[0].set(-0.0),
            x.at[0].set(1e-40),
            (x, jnp.zeros(0)),
            {"a": x, "b": x + 1},
            {"a": x + 1, "b": x},
            jax.random.key(0),
            jax.random.key(1),
            x + 1j,
            x - 1j,
            [],
        ]
        stored = jnp.ones((2, 8))
        trees += [ag.to_grid(stored, name, scale=0.25) for name in ("float8_e3m4", "float8_e4m3fn", "float8_e4m3")]
        assert len({int(ag.diagnostics.fingerprint(tree)) for tree in trees}) == len(trees)

    def test_of_a_grid_array_that_nnx_made_a_mapping_of(self):
        stored = ag.to_grid({"kernel": jax.random.normal(jax.random.key(0), (8, 16))})
        mapping = nnx.state(stored)
        assert jax.tree.structure(mapping) != jax.tree.structure(stored)
        assert ag.diagnostics.fingerprint(mapping) == ag.diagnostics.fingerprint(stored)

    def test_of_64_bits(self):
        with jax.enable_x64(True):
            x = jnp.ones(3, jnp.float64)
            seen = {int(ag.diagnostics.fingerprint(y)) for y in (x, x + 2.0**-52, x * 2, x.view(jnp.int64))}
        assert len(seen) == 4


def told(folder, damage):
    """How often the fingerprint alone tells that a checkpoint was cut or changed, of 30 times."""
    folder, (_, params, state) = pathlib.Path(folder), start("grid_adamw")
    saved = {"tree": (params, state), "fingerprint": ag.diagnostics.fingerprint((params, state))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", saved)
    files = [path for path in sorted((folder / "saved").rglob("*")) if path.is_file() and path.stat().st_size]
    largest, rng, count = max(files, key=lambda path: path.stat().st_size), np.random.default_rng(0), 0
    for i in range(30):
        file = largest if i % 2 else files[rng.integers(len(files))]
        shutil.rmtree(folder / "bad", ignore_errors=True)
        shutil.copytree(folder / "saved", folder / "bad")
        data = bytearray(file.read_bytes())
        at = int(rng.integers(len(data)))
        if damage == "cut":
            data = data[:at]
        else:
            data[at] ^= 1 << int(rng.integers(8))
        (folder / "bad" / file.relative_to(folder / "saved")).write_bytes(data)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                restored = checkpointer.restore(folder / "bad", saved)
        except Exception:
            continue
        whole = all(map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves(saved)))
        assert whole == (ag.diagnostics.fingerprint(restored["tree"]) == restored["fingerprint"])
        count += not whole
    return count


class TestStarts:
    """A new state is on the mesh of its parameters, all of it: so a checkpoint can be restored into it."""

    @pytest.mark.parametrize("axis_type", some([AxisType.Auto, AxisType.Explicit], lambda kind: kind == AxisType.Auto))
    @pytest.mark.parametrize("name", some([name for name in CHAINS if name != "manifold_adamw"], QUICK.__contains__))
    def test_all_leaves_on_the_mesh(self, name, axis_type):
        mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
        tx, params, _ = start(name)
        specs = {"kernel": jax.NamedSharding(mesh, jax.P("x")), "bias": jax.NamedSharding(mesh, jax.P())}
        given = {key: specs.get(key, specs["bias"]) for key in params}
        params = jax.device_put(params, ag.shardings(params, given))
        state = tx.init(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            assert len(leaf.sharding.device_set) == 4, jax.tree_util.keystr(path)

    def test_elsewhere_on_one_device(self):
        tx, params, _ = start("grid_adamw")
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(tx.init(params))} == {1}
        jax.eval_shape(tx.init, params)


class TestRestarts:
    """A checkpoint continues with the same bits, on another mesh too; one that was cut or changed is an error."""

    def test_on_another_mesh_by_orbax(self, tmp_path):
        name = "grid_adamw, 8bit"
        tx, params, _ = start(name)
        params = placed(params, "8 rows")
        half = trainer(name)(params, jax.jit(tx.init)(params), 50)
        target = placed(start(name)[1], "2 x 4")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "half", half)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "half", (target, tx.init(target)))
        assert restored[0]["kernel"].index.sharding == target["kernel"].index.sharding
        ours = trainer(name)(*restored, 50)
        agrees(name, ours, trainer(name)(*trainer(name)(*start(name)[1:], 50), 50))

    @pytest.mark.parametrize("damage", ["cut", "changed"])
    def test_of_a_damaged_checkpoint(self, tmp_path, damage):
        """Orbax raises, or restores what was saved, or the fingerprint tells: Orbax has no checksum of the data."""
        # In a process of its own, because what Orbax leaves behind raises when it is collected.
        program = "import sys; sys.path.insert(0, sys.argv[1]); import test_sharding as t; print(t.told(*sys.argv[2:]))"
        command = [sys.executable, "-c", program, str(pathlib.Path(__file__).parent), str(tmp_path), damage]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        assert (int(run.stdout.split()[-1]) > 0) == (damage == "changed")

    @pytest.mark.slow
    @pytest.mark.parametrize("part", range(4))
    def test_of_a_save_that_was_killed(self, tmp_path, part):
        """At 25 moments each: the last complete checkpoint is whole, and training goes on from it to the same bits."""
        name = "grid_adamw, 8bit"
        worker = [sys.executable, "-c", SAVER, str(pathlib.Path(__file__).parent), name, str(tmp_path)]
        rng, expected = np.random.default_rng(part), {}
        tree = start(name)[1:]
        for step in range(1, 201):
            tree = trainer(name)(*tree, 1)
            expected[step] = int(ag.diagnostics.fingerprint(tree))
        for _ in range(25):
            with subprocess.Popen(worker, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                lines = [process.stdout.readline()]
                while "saving" not in lines[-1]:
                    assert process.poll() is None, "".join(lines)[-2000:]
                    lines.append(process.stdout.readline())
                time.sleep(rng.uniform(0, 0.4))
                process.send_signal(signal.SIGKILL)
            with ocp.CheckpointManager(tmp_path) as manager:
                last = manager.latest_step()
                if last is None:
                    continue
                target = dict(zip(("params", "state"), start(name)[1:], strict=True))
                restored = manager.restore(last, args=ocp.args.StandardRestore(target))
            assert int(ag.diagnostics.fingerprint((restored["params"], restored["state"]))) == expected[last]
        assert last > 5  # The faster the machine, the more saves end before a kill.


SAVER = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, orbax.checkpoint as ocp
import test_sharding as test
name, folder = sys.argv[2:]
with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
    tree, last = test.start(name)[1:], manager.latest_step() or 0
    if last:
        target = dict(zip(("params", "state"), tree))
        restored = manager.restore(last, args=ocp.args.StandardRestore(target))
        tree = restored["params"], restored["state"]
    for step in range(last + 1, 201):
        tree = test.trainer(name)(*tree, 1)
        print("saving", step, flush=True)
        manager.save(step, args=ocp.args.StandardSave(dict(zip(("params", "state"), tree))))
"""
