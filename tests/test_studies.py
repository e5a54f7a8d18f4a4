"""The module of the studies: what a restart finds, the search for a learning rate, pairs; a study of a tiny model."""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import altgrad_jax as ag

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = ROOT / "examples" / "studies"
WIDE = "to_grid(params, fraction_bits=8)"
NAMES = ("harness", "arms", "training", "language", "tasks", "report", "quality")


@pytest.fixture(scope="module")
def studies():
    """The modules, imported as the commands import them; those of another study may have the same names."""
    others = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(STUDIES))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(STUDIES))
    for name in NAMES:
        sys.modules.pop(name)
    sys.modules.update(others)


@pytest.fixture
def harness(studies):
    return studies["harness"]


class TestStore:
    def test_finds_runs_by_their_names(self, harness, tmp_path):
        store = harness.Store(tmp_path / "a.jsonl", ["loss"])
        store.add({"arm": "a", "seed": 1, "loss": 2.0})
        store.add({"commit": "0123abc"})
        again = harness.Store(tmp_path / "a.jsonl", ["loss"])
        assert again.find({"seed": 1, "arm": "a"})["loss"] == 2.0
        assert again.find({"seed": 2, "arm": "a"}) is None
        assert again.starts == [{"commit": "0123abc"}]

    def test_goes_on_after_a_line_that_a_kill_cut_off(self, harness, tmp_path, capsys):
        path = tmp_path / "a.jsonl"
        path.write_text('{"seed": 1, "loss": 2.0}\n{"seed": 2, "lo')
        store = harness.Store(path, ["loss"])
        assert "left out a broken line" in capsys.readouterr().err
        store.add({"seed": 3, "loss": 3.0})
        assert [run["seed"] for run in harness.Store(path, ["loss"]).runs.values()] == [1, 3]

    def test_goes_on_from_a_compressed_file(self, harness, tmp_path):
        path = tmp_path / "a.jsonl"
        store = harness.Store(path, ["loss"])
        store.add({"commit": "0123abc"})
        store.add({"seed": 1, "loss": None})
        packed = store.pack()
        assert packed.name == "a.jsonl.xz"
        assert not path.exists()
        again = harness.Store(path, ["loss"])
        again.add({"seed": 2, "loss": 1.0})
        both = harness.Store(path, ["loss"])
        assert [run["seed"] for run in both.runs.values()] == [1, 2]
        assert both.starts == [{"commit": "0123abc"}]

    def test_packs_what_came_while_it_was_read(self, harness, tmp_path):
        path = tmp_path / "a.jsonl"
        store, other = harness.Store(path, ["loss"]), harness.Store(path, ["loss"])
        store.add({"seed": 1, "loss": 1.0})
        other.add({"seed": 2, "loss": 2.0})
        store.pack()
        assert [run["seed"] for run in harness.Store(path, ["loss"]).runs.values()] == [1, 2]
        assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl.xz"]


class TestSearch:
    @pytest.mark.parametrize("minimum", range(-9, 10))
    def test_finds_the_lowest(self, harness, minimum):
        seen = []

        def losses(exponents):
            seen.extend(exponents)
            return [abs(k - minimum) for k in exponents]

        assert harness.lowest(losses, 0) == minimum
        assert len(seen) == len(set(seen))

    def test_ends_where_nothing_has_a_minimum(self, harness):
        assert harness.lowest(lambda exponents: [-k for k in exponents], 3) == 14

    def test_takes_divergence_as_the_worst(self, harness):
        assert harness.lowest(lambda exponents: [np.inf if k > 1 else -k for k in exponents], 0) == 1


class TestGap:
    def test_is_that_of_a_paired_test(self, harness):
        a, b = np.random.default_rng(0).normal(size=(2, 7))
        mean, half, number = harness.gap(dict(enumerate(a)), dict(enumerate(b)))
        interval = stats.ttest_rel(a, b).confidence_interval(0.95)
        np.testing.assert_allclose([mean - half, mean + half], interval)
        assert number == 7

    def test_of_all_comparisons_at_once_is_wider(self, harness):
        values = np.random.default_rng(0).normal(size=7).tolist()
        mean, half, _ = harness.interval(values, comparisons=70)
        interval = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / 70)
        np.testing.assert_allclose([mean - half, mean + half], interval)

    def test_takes_common_seeds_alone(self, harness):
        assert harness.gap({0: 1.0, 1: 2.0, 2: 9.0}, {2: 8.0, 1: 1.0})[::2] == (1.0, 2)

    def test_of_divergence(self, harness):
        mean, _, number = harness.gap({0: np.inf, 1: 2.0}, {0: 1.0, 1: 1.0})
        assert np.isnan(mean)
        assert number == 2


class TestQuality:
    """Of a model that trains for two steps."""

    @pytest.fixture
    def study(self, studies, tmp_path):
        quality = studies["quality"]
        task = dataclasses.replace(studies["tasks"].TASKS["tiny"], steps=2)
        path = tmp_path / "quality.jsonl"

        def run(lanes=4):
            runner = quality.Runner(studies["harness"].Store(path, quality.MEASURED), lanes)
            quality.study(runner, task, studies["arms"].ARMS["adamw"], 2, True)
            return path

        return run

    def test_repeats_nothing(self, study, studies, monkeypatch):
        path = study()
        text = path.read_text()
        runs = [json.loads(line) for line in text.splitlines()]
        assert {run["role"] for run in runs} == {"select", "evaluate", *studies["quality"].VARIANTS}
        assert all(np.isfinite(run["loss"]) for run in runs)
        (rate,) = {run["learning_rate"] for run in runs if run["role"] == "evaluate"}
        assert rate == min((run["loss"], run["learning_rate"]) for run in runs if run["role"] == "select")[1]
        monkeypatch.setattr(studies["quality"], "compiled", None)
        assert study(lanes=1).read_text() == text
        store = studies["harness"].Store(path, studies["quality"].MEASURED)
        page = studies["quality"].publish(store, path, path.parent)
        assert "| adamw | 12.09 |" in page  # Three numbers per weight, and the gains of norms.

    @pytest.mark.parametrize("here", [False, True])
    def test_takes_the_learning_rate_of_this_device_or_another(self, studies, tmp_path, here):
        quality, task, arms = studies["quality"], studies["tasks"].TASKS["tiny"], studies["arms"].ARMS
        runner = quality.Runner(studies["harness"].Store(tmp_path / "a.jsonl", quality.MEASURED), 1)
        names = runner.names(task, arms["adamw"], "evaluate", **quality.DEFAULTS)
        assert quality.evaluated(runner.store, names) is None
        if here:
            runner.store.add(names | {"learning_rate": 0.2, "seed": 0, "loss": 2.0})
        runner.store.add(names | {"device": "another", "jax": "0.1", "learning_rate": 0.1, "seed": 0, "loss": 2.0})
        for decoy in ({"arm": "lion"}, {"role": "select"}, {"steps": 3}, {"b1": 0.1}, {"task": "7k"}):
            runner.store.add(names | decoy | {"learning_rate": 0.3, "seed": 0, "loss": 2.0})
        assert quality.evaluated(runner.store, names) == (0.2 if here else 0.1)

    def test_trains_with_the_learning_rate_that_is_known(self, studies, tmp_path, monkeypatch):
        quality, task, adamw = studies["quality"], studies["tasks"].TASKS["tiny"], studies["arms"].ARMS["adamw"]
        monkeypatch.setattr(quality, "compiled", lambda task, arm, lanes: lambda *numbers: np.ones(lanes))
        runner = quality.Runner(studies["harness"].Store(tmp_path / "a.jsonl", quality.MEASURED), 1)
        names = runner.names(task, adamw, "evaluate", **quality.DEFAULTS)
        runner.store.add(names | {"device": "another", "learning_rate": 0.1, "seed": 0, "loss": 2.0})
        quality.study(runner, task, adamw, 2, False)
        here = [run for run in runner.store.runs.values() if run["device"] == runner.device]
        known = [(run["role"], run["learning_rate"], run["seed"]) for run in here]
        assert known == [("evaluate", 0.1, 0), ("evaluate", 0.1, 1)]

    def test_refuses_arms_of_another_command(self, studies, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["quality.py", "line", "--quick", "--arms", "adamw"])
        monkeypatch.setattr(studies["quality"], "QUICK", ("adamw on E4M3",))
        with pytest.raises(SystemExit):
            studies["quality"].main()
        assert "--arms must name arms of line, got adamw on E4M3" in capsys.readouterr().err

    def test_ends_with_the_process_that_started_it(self, tmp_path):
        """After SIGKILL of the study its workers end, too."""
        script = tmp_path / "sleeps.py"
        script.write_text(
            f"import os, sys, time\nsys.path.insert(0, {str(STUDIES)!r})\nimport harness\n"
            "def work(i):\n    open(f'{i}.pid', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
            "if __name__ == '__main__':\n    harness.in_processes(work, [(0,), (1,)], 2)\n"
        )
        with subprocess.Popen([sys.executable, script], cwd=tmp_path, stderr=subprocess.DEVNULL) as study:
            pids = [int(wait_for(lambda i=i: (tmp_path / f"{i}.pid").read_text())) for i in range(2)]
            study.kill()
        wait_for(lambda: not any(map(alive, pids)) or None)


def wait_for(value, seconds=60):
    """What a function gives once it is neither empty nor raises OSError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := value():
                return found
        time.sleep(0.05)
    raise TimeoutError


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestStiffness:
    """Arms of AdamW with the stiffness of a format."""

    @pytest.fixture
    def moved(self, studies):
        """The first direction of an arm, without weight decay, and the state; and the ULP at each weight."""

        def of(format, where, is_stored):
            params = {"kernel": jax.random.normal(jax.random.key(0), (6, 16)), "bias": jnp.ones(6)}
            # Stored under a scale that `to_grid` would not choose: AdamW has to take that of its own grid.
            scale = 4 * ag.to_grid(params, format)["kernel"].scale
            q = ag.to_grid(params, format, scale={"kernel": scale, "bias": 1.0})
            values = ag.from_grid(q)
            scale = q["kernel"].scale if is_stored else ag.to_grid(values, format)["kernel"].scale
            tx = studies["arms"].by_stiffness(format, where)(lambda step: 1.0, 0.8, 0.995, 0)
            tx, params = optax.chain(tx, optax.snapshot("updates", lambda u: u)), q if is_stored else values
            tx = ag.on_grid(tx) if is_stored else tx
            _, state = tx.update(jax.tree.map(jnp.ones_like, values), tx.init(params), params)
            updates = optax.tree.get(state, "updates")
            direction = jax.tree.map(lambda u, w: -u - studies["arms"].WEIGHT_DECAY * w, updates, values)
            return direction, state, scale * ag.spacing(values["kernel"] / scale, format)

        return of

    @pytest.mark.parametrize("is_stored", [False, True], ids=["float32", "stored"])
    @pytest.mark.parametrize("format", ["E0M7", "E2M5", "E4M3", "E7M0"])
    def test_after_adam_moves_by_equal_ulps(self, moved, format, is_stored):
        direction, _, ulp = moved(format, "after", is_stored)
        steps = direction["kernel"] / ulp
        np.testing.assert_allclose(steps, steps[0, 0], rtol=1e-5)
        # The geometric mean of the factors is 1, and what no grid stores has none.
        np.testing.assert_allclose(jnp.exp(jnp.log(direction["kernel"]).mean()), 1, rtol=1e-5)
        np.testing.assert_allclose(direction["bias"], 1, rtol=1e-5)

    @pytest.mark.parametrize("is_stored", [False, True], ids=["float32", "stored"])
    def test_before_adam_is_in_its_moments_and_divided_out(self, moved, is_stored):
        direction, state, ulp = moved("E4M3", "before", is_stored)
        mu = optax.tree.get(state, "mu")
        np.testing.assert_allclose(mu["kernel"], 0.2 * ulp / jnp.exp(jnp.log(ulp).mean()), rtol=1e-5)
        np.testing.assert_allclose(mu["bias"], 0.2, rtol=1e-6)
        np.testing.assert_allclose(direction["kernel"], 1, rtol=1e-4)

    def test_passes_gradients_straight_through(self, studies):
        """The forward pass has nearest numbers of the grid, and their gradients."""
        arms, training = studies["arms"], studies["training"]
        seen = {"kernel": jnp.array([[0.1, -0.3, 1.0, 0.7, 0.2, 0.4, 0.5, 0.6]])}
        task = training.Task(
            "square", tuple, lambda key, data: (seen, data), lambda p, data, key: (p["kernel"] ** 2).sum() / 2,
            lambda p, data: p["kernel"].sum(), 0, steps=1,
        )  # fmt: skip
        sgd = arms.Arm("sgd", lambda schedule, b1, b2, seed: optax.sgd(0.5), forward="E2M5")
        numbers = [jnp.zeros(1, jnp.uint32 if name == "seed" else jnp.float32) for name in training.HYPERPARAMETERS]
        (end,) = training.trainer(task, sgd)((), *numbers)
        rounded = ag.from_grid(ag.to_grid(seen, "E2M5"))["kernel"]
        expected = ag.from_grid(ag.to_grid({"kernel": seen["kernel"] - 0.5 * rounded}, "E2M5"))["kernel"].sum()
        np.testing.assert_allclose(end, expected, rtol=1e-6)


class TestRivals:
    """Directions of their arms on a stack of layers, gains and a head."""

    @pytest.fixture
    def directions(self, studies):
        """Of steps with other gradients each: pairs of gradients and directions."""

        def of(optimizer, steps=1):
            shapes = {"up": (2, 8, 6), "gain": (2, 8), "head": (8, 5)}
            params = {name: jnp.zeros(shape) for name, shape in shapes.items()}  # Without weight decay.
            tx = optimizer(lambda step: 1.0, 0.8, 0.995, 0)
            state, seen = tx.init(params), []
            for i in range(steps):
                keys = dict(zip(shapes, jax.random.split(jax.random.key(i), 3), strict=True))
                gradients = jax.tree.map(lambda key, w: jax.random.normal(key, w.shape), keys, params)
                updates, state = tx.update(gradients, state, params)
                seen.append((gradients, jax.tree.map(jnp.negative, updates)))
            return seen

        return of

    def test_scale_gives_all_columns_the_same_root_mean_square(self, studies, directions):
        ((gradients, direction),) = directions(studies["arms"].scale)
        for name in ("up", "head"):
            np.testing.assert_allclose(jnp.sqrt(jnp.mean(direction[name] ** 2, axis=-2)), 1, rtol=1e-5)
            assert jnp.all(jnp.sign(direction[name]) == jnp.sign(gradients[name]))
        np.testing.assert_allclose(direction["gain"], jnp.sign(gradients["gain"]), rtol=1e-5)

    def test_apollo_scales_gradients_of_layers_alone(self, studies, directions):
        seen, norms = directions(studies["arms"].apollo_mini, steps=6), []
        for gradients, direction in seen:
            ratio = direction["up"] / gradients["up"]
            np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-4)
            assert jnp.all(ratio > 0)
            norms.append(jnp.linalg.norm(direction["up"], axis=(-2, -1)))
        growth = jnp.stack(norms[1:]) / jnp.stack(norms[:-1])
        np.testing.assert_allclose(growth.max(), 1.01, rtol=1e-5)
        # The first projected update of Adam has the sign of the projected gradient in each of six columns.
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(0), 0), studies["arms"].hash_of([jax.tree_util.DictKey("up")])
        )
        up = seen[0][0]["up"]
        norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1))  # noqa: E731
        expected = (128 * 6) ** 0.5 * norm(up) / norm(jax.random.normal(key, (1, 8)) @ up)
        np.testing.assert_allclose(norms[0], expected, rtol=1e-5)
        for name in ("gain", "head"):
            np.testing.assert_allclose(seen[0][1][name], jnp.sign(seen[0][0][name]), rtol=1e-5)


class TestCarries:
    """Other rules for what a weight owes."""

    @pytest.fixture
    def stepped(self, studies):
        """Of steps: parameters before and after, updates to take, and state before and after."""
        arms = studies["arms"]

        def of(rule, params, updates, b1=0.5):
            tx = arms.carrying("float8_e3m4", b1, 0, **arms.CARRIES[rule])
            state, seen = tx.init(params), []
            for u in updates:
                changes, after_state = tx.update(u, state, params)
                after = optax.apply_updates(params, changes)
                seen.append((params, after, u, state, after_state))
                params, state = after, after_state
            return seen

        return of

    def test_parameters_and_what_they_owe_gain_the_updates(self, stepped):
        """Those of a tuple, too; biases are not rounded."""
        shapes = {"w": (jax.ShapeDtypeStruct((16, 32), "float32"),) * 2, "biases": (jnp.ones(3), jnp.ones(3))}

        def random(i):
            leaves, structure = jax.tree.flatten(shapes)
            keys = jax.random.split(jax.random.key(i), len(leaves))
            numbers = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
            return structure.unflatten(numbers)

        updates = [jax.tree.map(lambda x: 0.1 * x, random(i)) for i in range(1, 7)]
        for before, after, u, (_, owed, _), (_, owes, _) in stepped("owed in float32", random(0), updates):
            jax.tree.map(
                lambda *x: np.testing.assert_allclose(x[0] + x[1], x[2] + x[3] + x[4], atol=1e-5),
                *(after, owes, before, owed, u),
            )
            np.testing.assert_allclose(
                after["biases"][1], before["biases"][1] + (owed["biases"][1] + u["biases"][1]) / 2, atol=1e-6
            )

    @pytest.mark.parametrize(
        ("rule", "parts"),
        [("owed in quarters of a step", 4), ("owed in 16ths of a step", 16), ("owed in steps, E3M4", 64)],
    )
    def test_of_whole_parts_of_a_step(self, stepped, rule, parts):
        start, *updates = jax.random.normal(jax.random.key(0), (7, 16, 32))
        for _, after, *_, (_, owes, scale) in stepped(rule, start, [0.1 * u for u in updates]):
            counted = owes / (scale * ag.spacing(after / scale, "float8_e3m4")) * parts
            np.testing.assert_array_equal(counted, jnp.round(counted))
            assert (counted % 2 == 1).any()

    @pytest.mark.parametrize("rule", ["owed in quarters of a step", "owed in 16ths of a step", "owed in steps, E3M4"])
    def test_keeps_the_mean_of_what_is_owed(self, studies, rule):
        owed = jnp.full(20_000, 0.93)
        kept = studies["arms"].CARRIES[rule]["keep"](jax.random.key(0), owed, 0.25, 1e6)
        assert 0 < float(jnp.std(kept)) < 0.05
        np.testing.assert_allclose(jnp.mean(kept), 0.93, atol=0.001)

    @pytest.mark.parametrize(
        ("rule", "owed", "share"),
        [
            ("owed as in on_grid", 0.4, 0.0),
            ("owed as in on_grid", 0.9, 1.0),
            ("owed as in on_grid", 1.2, 0.6),
            ("nearest within a quarter", 0.2, 0.0),
            ("nearest within a quarter", 0.4, 0.2),
        ],
    )
    def test_weights_near_to_their_targets_go_to_the_nearest_number(self, stepped, rule, owed, share):
        """Others make a move, here of half of what they owe, that is rounded at random."""
        ones = jnp.ones((64, 64))
        ((before, after, *_),) = stepped(rule, ones, [owed / 16 * ones])
        assert set(np.unique(after - before).tolist()) <= {0.0, 1 / 16}
        assert abs(float(jnp.mean(after > before)) - share) <= 0.03

    @pytest.mark.parametrize(
        ("rule", "u", "scale"),
        [
            ("owed in float32", 2.0, 1 / 2),
            ("owed in float32", 1.2, 1 / 4),
            ("owed as in on_grid", 1.2, 1 / 2),
            ("owed in float32", -1.5, 1 / 4),
            ("owed in float32", -1.7, 1 / 32),
        ],
    )
    def test_rows_grow_above_half_of_their_range_and_shrink_below_a_16th(self, stepped, rule, u, scale):
        """Ones under a scale of 1/4, whose largest number is 3.9, take half of the update at once."""
        ones = jnp.ones((4, 8))
        ((*_, (_, _, before), (_, _, after)),) = stepped(rule, ones, [u * ones])
        np.testing.assert_array_equal(before, 1 / 4)
        np.testing.assert_array_equal(after, scale)

    def test_the_rule_of_on_grid_is_that_of_on_grid(self, studies):
        """From the same state, long after the first steps: weights and what they owe, in the mean of many seeds."""
        arms, format, b = studies["arms"], "float8_e3m4", 0.8
        x, u = jax.random.normal(jax.random.key(0), (2, 16, 64))
        stored, u = ag.to_grid(x, format), 0.2 * jnp.exp2(-5 * jnp.linspace(0, 1, 64)) * u
        library = ag.on_grid(optax.identity(), momentum=b)
        start = library.init(stored)

        def of_library(i):
            updates, state = library.update(u, start._replace(grid_step=jnp.uint32(10**6 + i)), stored)
            return ag.from_grid(optax.apply_updates(stored, updates)), ag.from_grid(state.momentum)

        def emulated(i):
            tx = arms.carrying(format, b, i, **arms.CARRIES["owed as in on_grid"])
            state = jax.random.key(i), ag.from_grid(start.momentum), stored.scale
            changes, (_, owes, _) = tx.update(u, state, ag.from_grid(stored))
            return ag.from_grid(stored) + changes, owes

        one, other = (jax.jit(jax.vmap(f))(jnp.arange(1000)) for f in (of_library, emulated))
        for kept in one[1], other[1]:
            assert np.min(np.abs(kept / stored.scale), where=kept != 0, initial=np.inf) == 2.0**-9
        fixed = np.ptp(one[0], 0) == 0
        assert 0.2 < fixed.mean() < 0.8
        np.testing.assert_array_equal(one[0][0][fixed], other[0][0][fixed])
        for a, c in zip(one, other, strict=True):
            error = np.sqrt((np.var(a, 0) + np.var(c, 0)) / 1000)
            assert np.all(np.abs(a.mean(0) - c.mean(0)) <= 5 * error + 1e-7)


class TestVerdicts:
    """Of runs that are made up."""

    @pytest.fixture
    def results(self, studies, tmp_path):
        """All arms lose 1 and the noise of the seed, and with stiffness also what `gap(format, column)` says."""
        quality, report = studies["quality"], studies["report"]

        def of(gap):
            store = studies["harness"].Store(tmp_path / "a.jsonl", quality.MEASURED)
            store.path = pathlib.Path(os.devnull)
            random = np.random.default_rng(0)
            arms = {of(f): (f, column) for column, of in report.STIFFENED.items() for f in report.FAMILY}
            same = {"role": "evaluate", "device": "cpu", "jax": "0", **quality.DEFAULTS, "learning_rate": 1}
            for task in report.SMALL_TASKS:
                for seed in range(8):
                    noise = random.normal()
                    for arm in studies["arms"].FORMAT_ARMS:
                        loss = 1 + noise + (gap(*arms[arm]) + 0.001 * random.normal() if arm in arms else 0)
                        loss = loss if np.isfinite(loss) else None
                        store.add(same | {"task": task, "arm": arm, "seed": seed, "loss": loss})
            return quality.Results(store)

        return of

    def test_are_those_of_large_gaps(self, studies, results, tmp_path):
        gaps = {("E2M5", "one byte, after"): -0.02, ("E7M0", "one byte, after"): 0.02}
        found = results(lambda f, column: gaps.get((f, column), 0))
        rows = [line.strip("| ").split(" | ") for line in studies["report"].verdicts_table(found).splitlines()[2:]]
        assert [row[2:4] for row in rows if row[1] == "one byte, after"] == [["E2M5", "E7M0"]] * 2
        assert [row[2:4] for row in rows if row[1] != "one byte, after"] == [["none", "none"]] * 8
        table = studies["report"].formats_table(found, found.only("digits"))
        assert re.search(r"\| E2M5 \| .* \| -0.0(19|20|21) ± 0.001 \(8\) \|$", table, re.MULTILINE)
        studies["report"].draw_formats(found, tmp_path / "formats.png")
        assert (tmp_path / "formats.png").stat().st_size > 10_000

    def test_count_divergence_as_a_loss(self, studies, results):
        found = results(lambda f, column: np.nan if (f, column) == ("E7M0", "one byte, before") else 0)
        rows = [line.strip("| ").split(" | ") for line in studies["report"].verdicts_table(found).splitlines()[2:]]
        assert [row[2:] for row in rows if row[1] == "one byte, before"] == [["none", "E7M0", "diverged"]] * 2

    def test_slope_is_per_mantissa_bit(self, studies, results):
        report = studies["report"]
        found = results(lambda f, column: 0.01 * int(f[-1]))
        mean, half = report.slope(found, found.only("digits"), report.STIFFENED["rounded forward, before"])
        assert abs(mean - 0.01) < half < 0.001

    def test_of_rules_are_to_the_twin_and_to_the_emulated_rule(self, studies, tmp_path):
        quality, report = studies["quality"], studies["report"]
        store = studies["harness"].Store(tmp_path / "a.jsonl", quality.MEASURED)
        same = {"task": "60k", "role": "evaluate", "device": "cpu", "jax": "0", **quality.DEFAULTS, "learning_rate": 1}
        losses = {"factored": 1, "2 bytes e3m4": 1.02, "e3m4, owed as in on_grid": 1.03, "e3m4, owed in float32": 1}
        losses |= {"e4m3fn, owed in float32": 1.1}
        for arm, loss in losses.items():
            for seed in range(2):
                store.add(same | {"arm": arm, "seed": seed, "loss": loss + seed})
        found = quality.Results(store)
        rows = [line.strip("|").split("|") for line in report.carries_table(found, found.only("60k")).splitlines()[2:]]
        assert [[cell.strip()[:6] for cell in row] for row in rows] == [
            ["on_gri", "+0.020", "", "-0.010", ""],
            ["owed a", "+0.030", "", "", ""],
            ["owed i", "+0.000", "+0.100", "-0.030", ""],
        ]

    def test_are_of_all_arms(self, studies, results):
        found = results(lambda f, column: 0)
        del found.runs[found.only("digits"), "evaluate", "adamw on E5M2, stiffness after"]
        with pytest.raises(ValueError, match="digits needs two seeds or more of adamw on E5M2, stiffness after: run"):
            studies["report"].verdicts_table(found)


class TestPublished:
    """What the repository says of the runs that it holds. Else run `python examples/studies/quality.py report`."""

    @pytest.fixture
    def results(self, studies, tmp_path):
        """Of the compressed runs alone."""
        quality = studies["quality"]
        shutil.copy(f"{quality.RESULTS}.xz", tmp_path)
        return quality.Results(studies["harness"].Store(tmp_path / quality.RESULTS.name, quality.MEASURED))

    def test_pages_have_its_tables(self, studies, results):
        pages = studies["report"].documentation(results, list(studies["quality"].VARIANTS))
        for page, text in pages.items():
            assert page.read_text() == text

    @pytest.mark.parametrize(
        ("arm", "parameters", "optimizer"),
        [
            ("2 bytes e3m4", "to_grid(params)", "grid_adamw(lr)"),
            (
                "3 bytes, muon 16 bits",
                "to_grid(params, fraction_bits=8)",
                "compress_state(on_grid(optax.contrib.muon(lr)))",
            ),
            ("3 bytes, 16 bits e3m4", WIDE, "grid_adamw(lr)"),
            ("2 bytes, 16 bits e3m4", WIDE, "grid_adamw(lr, b1=0)"),
            ("3 bytes, 8-bit m and v", "to_grid(params)", 'grid_adamw(lr, second_moment="8bit")'),
            ("4 bytes, 16 bits e3m4", WIDE, "compress_state(on_grid(optax.adamw(lr)))"),
            ("3 bytes, lion 16 bits", WIDE, "compress_state(on_grid(optax.lion(lr)))"),
        ],
    )
    def test_recipes(self, results, arm, parameters, optimizer):
        mean, half, _ = results.gap(results.only("60k"), arm, "adamw")
        (row,) = re.findall(
            rf"\| `{re.escape(parameters)}` \| `{re.escape(optimizer)}` \| [\d.]+ \| (.*?) \|",
            (ROOT / "docs" / "guides" / "storage.md").read_text(),
        )
        assert row == f"{mean:+.3f} ± {half:.3f}"

    def test_readme(self, studies, results):
        places = [place for place in results.places if place[0] in studies["language"].SIZES]
        gaps = {place: results.gap(place, "2 bytes e3m4", "adamw") for place in places}
        gaps = {place: gap for place, gap in gaps.items() if gap[2]}
        assert len({place[0] for place in gaps}) == 5
        means, halves, _ = zip(*gaps.values(), strict=True)
        claim = "On five language models of 7 thousand to 4 million weights the mean validation loss is "
        claim += f"{min(means):.3f} to {max(means):.3f} nats above that of tuned float32 AdamW (± {min(halves):.3f} to "
        assert claim + f"{max(halves):.3f}" in (ROOT / "README.md").read_text()


def test_every_arm_has_its_twin(studies):
    arms = studies["arms"].ARMS
    assert all(arm.twin is None or arm.twin in arms for arm in arms.values())
    named = studies["arms"].LINE, studies["arms"].FORMAT_ARMS, studies["arms"].CARRY_ARMS, studies["quality"].QUICK
    assert all(set(names) <= set(arms) for names in named)
    assert {of(f) for of in studies["report"].STIFFENED.values() for f in studies["arms"].FAMILY} <= set(arms)


def test_additions_are_right(studies, monkeypatch):
    """a + b = c, the last digit first."""
    tasks, seen = studies["tasks"], []
    monkeypatch.setattr(studies["language"], "loss_of", lambda gpt, params, windows, first: seen.append(windows))
    tasks.addition_loss_of(None, jax.random.key(0), 50)
    for window in np.asarray(seen[0]):
        text = "".join(chr(31 + character) for character in window)
        a, b, c = (int(part[::-1]) for part in re.fullmatch(r"(\d{4})\+(\d{4})=(\d{5});", text).groups())
        assert a + b == c
