"""The module of the studies: what a restart finds, the search for a learning rate, pairs; a study of a tiny model."""

import dataclasses
import importlib
import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from scipy import stats

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
    assert set(studies["arms"].LINE) <= set(arms)


def test_additions_are_right(studies, monkeypatch):
    """a + b = c, the last digit first."""
    tasks, seen = studies["tasks"], []
    monkeypatch.setattr(studies["language"], "loss_of", lambda gpt, params, windows, first: seen.append(windows))
    tasks.addition_loss_of(None, jax.random.key(0), 50)
    for window in np.asarray(seen[0]):
        text = "".join(chr(31 + character) for character in window)
        a, b, c = (int(part[::-1]) for part in re.fullmatch(r"(\d{4})\+(\d{4})=(\d{5});", text).groups())
        assert a + b == c
