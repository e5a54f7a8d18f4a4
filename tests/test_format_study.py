"""The study of examples/format_study: its configuration, its arms, and its resumption after a kill."""

import dataclasses
import json
import lzma
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import altgrad_jax as ag

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "format_study"
MODULES = ("arms", "config", "study", "tasks", "training")


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The modules of the example, which is not a package, by name; removed from sys.modules afterwards."""
    sys.path.insert(0, str(FOLDER))
    yield {name: __import__(name) for name in MODULES}
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 40 vectors in three classes."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "blobs.npz"
    y = np.arange(40) % 3
    np.savez(path, x=random.normal(size=(40, 5)) + y[:, None], y=y)
    return str(path)


@pytest.fixture(scope="module")
def small(modules, data):
    return modules["config"].StudyConfig(
        tasks=(data,),
        formats=("E4M3",),
        optimizers=("adamw", "after"),
        storages=("stochastic",),
        seeds=2,
        selection_seeds=1,
        learning_rates=3,
        freeze_seeds=1,
        steps=8,
        segments=2,
        batch_size=4,
    )


class TestConfiguration:
    """Defaults, overridden by a file, overridden by options; nothing is ignored."""

    def parsed(self, modules, *options):
        import argparse

        parser = argparse.ArgumentParser()
        modules["config"].add_arguments(parser)
        return modules["config"].configuration(parser.parse_args(options))

    @pytest.mark.parametrize("suffix", [".yaml", ".json"])
    def test_is_overridden_in_order(self, modules, tmp_path, suffix):
        path = tmp_path / f"study{suffix}"
        path.write_text('{"steps": 160, "seeds": 7, "formats": ["E4M3"], "eps": 1e-8, "warm_up": 0}')  # YAML too.
        config = self.parsed(modules, "--quick", "--config", str(path), "--seeds", "5", "--optimizers", "adamw", "both")
        assert (config.steps, config.seeds, config.formats) == (160, 5, ("E4M3",))
        assert (config.eps, config.warm_up) == (1e-8, 0.0)
        assert config.optimizers == ("adamw", "both")
        assert config.segments == modules["config"].QUICK["segments"]
        assert self.parsed(modules) == modules["config"].StudyConfig()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"setps": 64}, "unknown field 'setps': did you mean 'steps'"),
            ({"steps": "many"}, "steps must be like 640, got 'many'"),
            ({"seeds": True}, "seeds must be like 20, got True"),
            ({"steps": 12}, "multiple of segments"),
            ({"optimizers": ["sgd"]}, "optimizers must be of adamw, before, after, both, grid_sgd, got 'sgd'"),
            ({"formats": ["E4M3", "E4M3"]}, "each once"),
            ({"formats": ["E4M4"]}, "E4M4"),
            ({"formats": []}, "one thing or more"),
            ({"learning_rates": 2}, "learning_rates must be >= 3"),
            ({"freeze_seeds": -1}, "freeze_seeds must be >= 0"),
            ({"formats": ["float32"]}, "8 or 16 bits, got float32"),
            ({"optimizers": ["before"]}, "must hold adamw"),
            ({"storages": ["float32"]}, "got float32 alone"),
            ({"b1": 1}, r"b1 must be in \[0, 1\), got 1"),
            ({"eps": "-1e-8"}, "eps must be >= 0"),
            ({"eps": "small"}, "eps must be like 1e-08, got 'small'"),
        ],
    )
    def test_refuses(self, modules, fields, message):
        with pytest.raises(ValueError, match=message):
            modules["config"].from_dict(fields)

    def test_refuses_files_that_are_no_data(self, modules, tmp_path):
        load = modules["tasks"].load
        with pytest.raises(ValueError, match="which is no file"):
            load(str(tmp_path / "nothing.txt"))
        (tmp_path / "short.txt").write_text("short")
        with pytest.raises(ValueError, match="at least 800 characters, got 5"):
            load(str(tmp_path / "short.txt"))
        for arrays, message in (
            ({"x": np.zeros(20)}, "inputs x and labels y: 'y is not a file"),
            ({"x": np.zeros((20, 2)), "y": np.zeros(19, int)}, r"got \(20, 2\) and \(19,\)"),
            ({"x": np.zeros((20, 2)), "y": np.zeros(20)}, "non-negative integers, got float64"),
            ({"x": np.full((20, 2), np.nan), "y": np.zeros(20, int)}, "must be finite, got 40"),
        ):
            np.savez(tmp_path / "x.npz", **arrays)
            with pytest.raises(ValueError, match=message):
                load(str(tmp_path / "x.npz"))
        (tmp_path / "x.npz").write_text("no archive")
        with pytest.raises(ValueError, match=r"must be an \.npz file"):
            load(str(tmp_path / "x.npz"))
        (tmp_path / "study.yaml").write_text("steps: [1")
        with pytest.raises(ValueError, match="is no YAML"):
            self.parsed(modules, "--config", str(tmp_path / "study.yaml"))

    @pytest.mark.slow
    def test_of_grids_that_a_scale_makes_one(self, modules):
        shapes = {}
        for name in (*modules["config"].FORMATS, "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz"):
            shapes.setdefault(modules["config"].shape_of_grid(name), []).append(name)
        assert [names for names in shapes.values() if len(names) > 1] == [
            ["E0M7", "E1M6"],
            ["E4M3", "float8_e4m3fnuz", "float8_e4m3b11fnuz"],
            ["E5M2", "float8_e5m2"],
        ]


class TestArms:
    """Optimizers that mean the same by a learning rate, whatever their grid."""

    def test_stiffness_after_adam_moves_by_equal_steps(self, modules, small):
        """After one step of Adam, whose directions are signs, in typical ULPs: the stiffness of each weight."""
        arm = modules["arms"].Arm("", "E4M3", "after", "master")
        params = {"w": jnp.array([[0.3, -1.0, 0.02, 4.0]])}
        grid = arm.grid(params)
        ulp = 2.0 ** float(modules["arms"].ulp_exponent(params, "E4M3"))
        config = dataclasses.replace(small, weight_decay=0.0)
        tx = arm.transformation(config, lambda step: 0.5, 0, ulp)
        gradient = {"w": jnp.array([[1.0, -2.0, 3.0, 4.0]])}
        updates, _ = tx.update(gradient, tx.init(params), params, **arm.extra_args(grid))
        scale = float(grid["w"].scale[0, 0])
        exact = [-0.5 * np.sign(g) * ag_ulp(w / scale) * scale / ulp for g, w in zip([1, -2, 3, 4], params["w"][0])]  # noqa: B905
        np.testing.assert_allclose(updates["w"][0], exact, rtol=1e-5)

    @pytest.mark.parametrize("storage", ["master", "stochastic", "fraction8"])
    def test_grid_sgd_means_what_it_does(self, modules, small, storage):
        """The mean movement over seeds is the intended one, which is the same in every storage."""
        arm = modules["arms"].Arm("", "E4M3", "grid_sgd", storage)
        weights = jnp.array([[0.3125, -0.875, 0.01953125, 3.0]])  # On the grid, and on no power of two.
        stored, ulp, gradient = arm.stored({"w": weights}), 2.0**-6, {"w": jnp.array([[0.1, -0.2, 0.3, 40.0]])}

        def moved(seed):
            tx = arm.transformation(small, lambda step: 2.0**-5, seed, ulp)
            tx = optax.with_extra_args_support(tx)
            updates, state = tx.update(gradient, tx.init(stored), stored, **arm.extra_args(arm.grid(stored)))
            after = ag.from_grid(optax.apply_updates(stored, updates), full=True)
            return after["w"] - weights, arm.intended(state, stored, 2.0**-5, ulp, small.max_steps)["w"]

        movements, intended = jax.jit(jax.vmap(moved))(jnp.arange(4000))
        spacing = np.array([2.0**-5, 2.0**-4, 2.0**-9, 2.0**-2])  # Of E4M3 at these weights, which are normal.
        steps = np.clip(-2.0 * np.asarray(gradient["w"][0]), -small.max_steps, small.max_steps)
        scaled = ag.spacing(weights / arm.grid(stored)["w"].scale, "E4M3") * arm.grid(stored)["w"].scale
        np.testing.assert_array_equal(spacing, scaled[0])
        np.testing.assert_allclose(intended[0, 0], steps * spacing, rtol=1e-5)
        bias = (movements.mean(0)[0] - intended[0, 0]) / spacing
        assert float(jnp.abs(bias[:3]).max()) < 4 * 0.5 / 4000**0.5

    @pytest.mark.slow
    def test_float32_run_is_that_of_plain_optax(self, modules, small, data):
        """Against a loop that shares only the model and the data."""
        task = modules["tasks"].load(data)
        arm = modules["arms"].Arm(data, "E4M3", "adamw", "float32")
        rate = 2.0**-6
        train, rows = modules["training"].trainer(task, arm, small), task.rows(3, small)
        lane = jax.tree.map(lambda w: w[None], task.start(3))
        arrays = tuple(map(jnp.asarray, task.data))
        result = train(arrays, lane, rows[None], np.float32([rate]), np.uint32([3]))
        warm_up = 1
        schedule = optax.join_schedules(
            [optax.constant_schedule(rate), optax.cosine_decay_schedule(rate, small.steps - warm_up)], [warm_up]
        )
        tx, params = optax.adamw(schedule, weight_decay=small.weight_decay), task.start(3)
        state = tx.init(params)
        for batch in rows:
            gradient = jax.grad(task.loss)(params, arrays[0][batch], arrays[1][batch])
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(result["losses"][0, -1], task.loss(params, *arrays[2:]), rtol=1e-5)


class TestSearch:
    """For the best learning rate, until that lies between two others."""

    @pytest.fixture
    def searched(self, modules, small, data, monkeypatch):
        def search(loss, **changes):
            """The exponents x of the rates 2^x that are tried under a loss of x, and of the one that is evaluated."""

            def trainer(task, arm, config):
                def train(data, weights, rows, rates, seeds):
                    losses = np.array([[loss(np.log2(rate))] for rate in rates])
                    return {"losses": losses, "accuracies": losses}

                return train

            def recorded(numbers):
                return {"loss": float(numbers["loss"]) if np.isfinite(numbers["loss"]) else None}

            monkeypatch.setattr(modules["training"], "trainer", trainer)
            monkeypatch.setattr(modules["training"], "measured", lambda arm, results: {"values": ()})
            monkeypatch.setattr(modules["training"], "ranks", lambda values: {})
            monkeypatch.setattr(modules["training"], "_recorded", recorded)
            arm = modules["arms"].Arm(data, "E4M3", "adamw", "stochastic")
            config = dataclasses.replace(small, **changes)
            task = modules["tasks"].load(data)
            lines = list(modules["training"].study(task, arm, config, {}))
            tried = [np.log2(line["learning_rate"]) for line in lines if line["kind"] == "select"]
            (best,) = {np.log2(line["learning_rate"]) for line in lines if line["kind"] == "evaluate"}
            return tried, best

        return search

    def test_moves_until_the_best_is_between_others(self, searched):
        assert searched(lambda x: (x + 7) ** 2) == ([-8, -7, -6], -7)
        assert searched(lambda x: (x + 4) ** 2) == ([-8, -7, -6, -5, -4, -3], -4)
        assert searched(lambda x: (x + 9) ** 2) == ([-8, -7, -6, -11, -10, -9], -9)

    def test_of_losses_that_are_not_finite_goes_down(self, searched):
        assert searched(lambda x: np.nan if x > -10.5 else -x) == ([-8, -7, -6, -11, -10, -9, -14, -13, -12], -11)

    def test_of_finer_rates(self, searched):
        tried, best = searched(lambda x: (x + 6.4) ** 2, rates_per_octave=2)
        assert (tried, best) == ([-7.5, -7, -6.5, -6, -5.5, -5], -6.5)


class TestResumption:
    """Interrupted anywhere, a study ends with the lines of an undisturbed one, except for times."""

    def start(self, path, config):
        options = []
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            options += [f"--{field.name.replace('_', '-')}", *(value if isinstance(value, tuple) else [str(value)])]
        command = [sys.executable, FOLDER / "study.py", "--out", path, *options]
        return subprocess.Popen(
            command,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, path, config):
        process = self.start(path, config)
        assert (process.communicate()[1], process.returncode)[1] == 0
        return self.lines(path)

    def lines(self, path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

    @pytest.mark.slow
    def test_after_kills(self, tmp_path, small):
        whole = tmp_path / "whole.jsonl"
        expected = self.finish(whole, small)
        assert [line["kind"] for line in expected].count("evaluate") == 2 * small.seeds
        assert [line["kind"] for line in expected].count("freeze") == 1
        assert not any(line["kind"] == "failed" for line in expected)
        # Finished studies run nothing, and change nothing.
        content = whole.read_bytes()
        assert self.finish(whole, small) == expected
        assert whole.read_bytes() == content
        # A kill while the evaluation of the first arm was written.
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(content[: content.index(b'"evaluate"') + 700])
        assert self.finish(cut, small) == expected
        # A real one.
        killed = tmp_path / "killed.jsonl"
        process = self.start(killed, small)
        while not (killed.exists() and killed.read_bytes().count(b"\n") > 3):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(self.lines(killed)) < len(expected)
        assert self.finish(killed, small) == expected

    @pytest.mark.slow
    def test_repeats_no_failure(self, modules, small, tmp_path):
        """Its line is filed under the job that made it."""
        path, config = tmp_path / "study.jsonl", dataclasses.replace(small, optimizers=("adamw",))
        lines = [modules["study"].header(config)]
        for role, arm in modules["arms"].jobs(config):
            lines.append({"kind": "failed", "key": f"{arm.key}/{role}/failed", **vars(arm), "failure": "no numbers"})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert self.finish(path, config) == json.loads(json.dumps(lines))

    def test_is_of_one_process(self, modules, tmp_path):
        path = tmp_path / "study.jsonl"
        with modules["study"].appending(path):  # noqa: SIM117
            with pytest.raises(ValueError, match="another process writes"), modules["study"].appending(path):
                pass
        with modules["study"].appending(path):
            pass

    def test_goes_on_from_a_compressed_file(self, modules, tmp_path, small):
        path = tmp_path / "study.jsonl"
        first = modules["study"].header(small)
        path.with_name("study.jsonl.xz").write_bytes(lzma.compress((json.dumps(first) + '\n{"key": 1}\n').encode()))
        with modules["study"].appending(path):
            assert modules["study"].finished_lines(path, first) == [{"key": 1}]

    def test_refuses_another_study(self, modules, tmp_path, small):
        path = tmp_path / "study.jsonl"
        path.touch()
        modules["study"].finished_lines(path, modules["study"].header(small))
        other = dataclasses.replace(small, steps=16)
        with pytest.raises(ValueError, match="holds another study"):
            modules["study"].finished_lines(path, modules["study"].header(other))

    def test_records_the_cause_of_a_failure(self, modules, small, data, monkeypatch):
        def broken(*arguments):
            raise FloatingPointError("no numbers")

        monkeypatch.setattr(modules["training"], "trainer", broken)
        arm = modules["arms"].Arm(data, "E4M3", "adamw", "stochastic")
        (line,) = modules["study"].work("study", arm, small, {})
        assert (line["kind"], line["failure"]) == ("failed", "FloatingPointError: no numbers")
        assert line["key"] == f"{arm.key}/study/failed"
        assert modules["study"].work("study", arm, small, {line["key"]: line}) == []


def ag_ulp(x: float) -> float:
    """Of AltGrad's E4M3, whose smallest normal number is 2**-6."""
    return 2.0 ** (max(np.floor(np.log2(abs(float(x)))), -6) - 3)
