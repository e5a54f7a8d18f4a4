"""The report of the format study, on studies that are made up and whose answers are known."""

import html.parser
import itertools
import json
import lzma
import math
import pathlib
import re
import sys

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "format_study"
CONFIG = {
    "tasks": ["digits"],
    "formats": ["E0M7", "E1M6", "E4M3", "E5M2", "E7M0", "bfloat16"],
    "optimizers": ["adamw", "before", "after"],
    "storages": ["float32", "master"],
    "seeds": 4,
    "selection_seeds": 1,
    "learning_rates": 3,
    "freeze_seeds": 1,
    "steps": 64,
    "segments": 4,
}
COMPARISONS = 5 * 2  # Five different grids, two variants, one task and storage.
GAIN = {"E0M7": 0.0, "E1M6": 0.0, "E4M3": 0.1, "E5M2": 0.2, "E7M0": 0.4, "bfloat16": 0.0}  # Of "before".
NOISE = np.array([0.001, -0.002, 0.0016, 0.0005])


@pytest.fixture
def study(monkeypatch):
    """The modules of the study that make a report; they leave sys.modules afterwards, as their names are common."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    import analysis
    import report
    import verdicts

    yield type("Modules", (), {"analysis": analysis, "report": report, "verdicts": verdicts})
    for name in {path.stem for path in FOLDER.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def make_lines(config=CONFIG):
    """A study in which float32 AdamW has a loss of 1 nat, a format 0.5 more, and "before" GAIN less."""
    segments, seeds = config["segments"], range(config["seeds"])
    lines = [{"kind": "study", "config": config, "data": dict.fromkeys(config["tasks"], "0"), "jax": "0"}]

    def add(kind, arm, rest, seed, **numbers):
        key = "/".join(map(str, (*arm, kind, *rest, seed)))
        named = dict(zip(("task", "format", "optimizer", "storage"), arm, strict=True))
        run = {
            "kind": kind,
            "key": key,
            **named,
            "learning_rate": 2.0**-7,
            "seed": seed,
            "seconds": 0.5,
            "failure": None,
        }
        lines.append(run | numbers)

    cells = itertools.product(config["tasks"], config["storages"], config["optimizers"], config["formats"])
    for task, storage, optimizer, format in cells:
        if storage == "float32" and optimizer != "adamw":
            continue
        arm = task, format, optimizer, storage
        for exponent in (-8, -7, -6):
            add("select", arm, [f"2^{exponent}"], 1000, loss=2.0, learning_rate=2.0**exponent)
        for seed in seeds:
            gain = {"before": GAIN[format] + NOISE[seed], "after": -NOISE[seed]}.get(optimizer, 0)
            loss = 1.0 + 0.1 * seed + (0.5 - gain) * (storage != "float32")
            shares = [0.25] * segments
            per_segment = ("accuracies", "stall_rates", "flip_rates", "correlations", "descent_quality")
            final = (
                "entropy",
                "saturated",
                "subnormal",
                "stable_rank",
                "effective_rank",
                "variance_rank",
                "codes_used",
            )
            numbers = {"loss": float(f"{loss:.6g}"), "losses": [2.0] * (segments - 1) + [float(f"{loss:.6g}")]}
            numbers |= dict.fromkeys(per_segment, shares) | dict.fromkeys(final, 0.5)
            if seed == 0:
                numbers["ulp_histogram"] = [[1] * 11] * segments
            add("evaluate", arm, ["2^-7"], seed, **numbers)
    for task, format in itertools.product(config["tasks"], config["formats"]):
        shares = {f"{name}_frozen": [0.1] * segments for name in ("predicted", "observed")}
        add(
            "freeze",
            (task, format, "adamw", "nearest"),
            [],
            0,
            loss=1.5,
            predicted_never=0.1,
            observed_never=0.2,
            **shares,
        )
    return lines


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line_of(lines, key):
    return next(line for line in lines if line.get("key") == key)


class Tables(html.parser.HTMLParser):
    """Rows of text of all tables of a page, and all attributes."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.attributes, self.cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


@pytest.fixture
def page(study, tmp_path, monkeypatch, capsys):
    """Makes the report of lines; returns the HTML and the Markdown."""

    def make(lines, rest="", draw=False):
        if not draw:  # Which takes most of the time.
            monkeypatch.setattr(study.report.figures, "_png", lambda figure: b"\x89PNG")
        path = write(tmp_path / "study.jsonl", lines)
        path.write_text(path.read_text() + rest)
        monkeypatch.setattr(sys, "argv", ["report.py", str(path), "--out", str(tmp_path / "out")])
        study.report.main()
        printed = capsys.readouterr().out
        names = ("report.html", "report.md", "format_study.png")
        assert all(f"{tmp_path / 'out' / name}" in printed for name in names)
        assert (tmp_path / "out" / "format_study.png").read_bytes().startswith(b"\x89PNG")
        return tuple((tmp_path / "out" / name).read_text("utf-8") for name in ("report.html", "report.md"))

    return make


def results(study, lines, tmp_path):
    return study.analysis.read(write(tmp_path / "study.jsonl", lines))


def test_a_compressed_file_is_the_same_study(study, tmp_path):
    path = write(tmp_path / "study.jsonl", make_lines())
    whole = study.analysis.read(path)
    path.with_name("study.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    assert study.analysis.read(path).lines == whole.lines


class TestGain:
    """Paired by seed, with intervals by t."""

    def test_is_the_mean_of_the_differences(self, study, tmp_path):
        found = results(study, make_lines(), tmp_path)
        gain = next(g for arm, g in found.gains.items() if arm.key == "digits/E4M3/before/master")
        expected = GAIN["E4M3"] + NOISE
        np.testing.assert_allclose(gain.sample.values, expected, atol=2e-5)  # Losses have six digits.
        assert gain.seeds == (0, 1, 2, 3)

    @pytest.mark.parametrize("comparisons", [1, 312])
    def test_has_the_interval_of_scipy(self, study, comparisons):
        values = np.array([0.3, -0.1, 0.25, 0.4, 0.15])
        expected = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / comparisons)
        sample = study.analysis.Sample(values)
        np.testing.assert_allclose(sample.interval(comparisons), expected, rtol=1e-6)
        np.testing.assert_allclose(sample.p, stats.ttest_1samp(values, 0).pvalue, rtol=1e-9)

    def test_of_equal_losses_is_zero_for_certain(self, study):
        sample = study.analysis.Sample(np.zeros(3))
        assert (sample.interval(), sample.p) == ((0, 0), 1)

    def test_of_one_seed_has_no_interval(self, study):
        sample = study.analysis.Sample(np.ones(1))
        assert np.isnan([*sample.interval(), sample.p]).all()

    def test_is_without_seeds_that_have_no_loss_and_counts_them(self, study, tmp_path):
        lines = make_lines()
        line_of(lines, "digits/E4M3/before/master/evaluate/2^-7/2")["loss"] = None
        found = results(study, lines, tmp_path)
        gain = next(g for arm, g in found.gains.items() if arm.key == "digits/E4M3/before/master")
        assert (gain.seeds, gain.failed) == ((0, 1, 3), (2,))

    def test_that_is_detectable_is_found_with_the_power_that_it_says(self, study):
        sample = study.analysis.Sample(np.random.default_rng(0).standard_normal(10))
        random = np.random.default_rng(1)
        true = random.normal(sample.detectable(), sample.deviation, size=(20000, 10))
        power = np.mean(stats.ttest_1samp(true, 0, axis=1).pvalue < 0.05)
        assert abs(power - 0.8) < 0.01  # Three standard errors.


class TestHolm:
    """Adjusted p-values."""

    def test_agrees_with_a_case_by_hand(self, study):
        # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to the one before), 0.04 * 1 (raised, too).
        adjusted = study.analysis.holm(np.array([0.04, 0.01, 0.03, 0.02]), 4)
        np.testing.assert_allclose(adjusted, [0.06, 0.04, 0.06, 0.06])

    def test_counts_comparisons_that_have_no_p_value(self, study):
        np.testing.assert_allclose(study.analysis.holm(np.array([0.01, 0.2]), 6), [0.06, 1.0])

    def test_of_a_study_counts_each_grid_once(self, study, tmp_path):
        found = results(study, make_lines(), tmp_path)
        assert found.duplicates == {"E1M6": "E0M7"}
        assert found.comparisons == COMPARISONS
        assert len({(arm.optimizer, p) for arm, p in found.holm.items() if arm.format in ("E0M7", "E1M6")}) == 2


class TestLearningRates:
    """What a finer grid might change keeps a gain from being certain."""

    def lines(self, excess, arm):
        lines = make_lines()
        for exponent, x in zip((-8, -6), excess, strict=True):
            line_of(lines, f"{arm}/select/2^{exponent}/1000")["loss"] = None if x is None else 2 + x
        return lines

    def test_is_the_depth_of_a_parabola(self, study, tmp_path):
        found = results(study, self.lines((0.02, 0.06), "digits/E5M2/adamw/master"), tmp_path)
        a, b, _ = np.polyfit([-1, 0, 1], [0.02, 0, 0.06], 2)
        left = {arm.key: depth for arm, depth in found.left.items()}
        np.testing.assert_allclose(left.pop("digits/E5M2/adamw/master"), b**2 / (4 * a))
        assert set(left.values()) == {0.0}

    @pytest.mark.parametrize("above", [None, 1e5])
    def test_is_the_excess_of_a_neighbour_where_the_other_fails(self, study, tmp_path, above):
        found = results(study, self.lines((0.02, above), "digits/E5M2/adamw/master"), tmp_path)
        assert max(found.left.values()) == pytest.approx(0.02)

    @pytest.mark.parametrize(("gain", "optimizer"), [(0.2, "adamw"), (-0.2, "before")])
    def test_of_the_worse_arm_counts(self, study, tmp_path, monkeypatch, gain, optimizer):
        monkeypatch.setitem(GAIN, "E5M2", gain)
        for excess, sign in ((0.15, np.sign(gain)), (0.25, 0)):
            for of in ("adamw", "before"):
                found = results(study, self.lines((excess, None), f"digits/E5M2/{of}/master"), tmp_path)
                arm = next(arm for arm in found.gains if arm.key == "digits/E5M2/before/master")
                assert found.sign(arm) == (sign if of == optimizer else np.sign(gain))


class TestVerdicts:
    """On hypotheses, by criteria that the page states."""

    def test_of_gains_that_fall_with_the_mantissa(self, study, tmp_path):
        found = results(study, make_lines(), tmp_path)
        words = {v.optimizer: v.word for v in study.verdicts.low_mantissa_gains(found)}
        assert words == {"before": "supported", "after": "not resolved"}

    def test_of_gains_that_rise_with_the_mantissa(self, study, tmp_path, monkeypatch):
        monkeypatch.setitem(GAIN, "E0M7", 0.9)
        monkeypatch.setitem(GAIN, "E7M0", -0.3)
        found = results(study, make_lines(), tmp_path)
        assert study.verdicts.low_mantissa_gains(found)[0].word == "contradicted"
        assert study.verdicts.high_mantissa_gains(found)[0].word == "contradicted"

    def test_of_high_mantissa_gains_are_those_of_equivalence(self, study, tmp_path, monkeypatch):
        found = results(study, make_lines(), tmp_path)
        assert [v.word for v in study.verdicts.high_mantissa_gains(found)] == ["supported", "supported"]
        monkeypatch.setitem(GAIN, "E0M7", -0.3)  # A loss is no gain.
        verdict = study.verdicts.high_mantissa_gains(results(study, make_lines(), tmp_path))[0]
        assert (verdict.word, verdict.evidence[:2]) == ("not resolved", ("none", "E0M7"))
        monkeypatch.setattr(sys.modules[__name__], "NOISE", 20 * NOISE)
        found = results(study, make_lines(), tmp_path)
        assert [v.word for v in study.verdicts.high_mantissa_gains(found)] == ["not resolved", "not resolved"]

    def test_of_the_slope_is_that_of_a_line_through_the_gains(self, study, tmp_path):
        found = results(study, make_lines(), tmp_path)
        bits, gains = [7, 3, 2, 0], [GAIN[name] for name in ("E0M7", "E4M3", "E5M2", "E7M0")]
        sample, formats = study.verdicts.slope(found, "digits", "master", "before")
        assert formats == ["E0M7", "E4M3", "E5M2", "E7M0"]
        np.testing.assert_allclose(sample.mean, stats.linregress(bits, gains).slope, atol=1e-5)

    @pytest.mark.parametrize(("gain", "word"), [(0.2, "supported"), (0.48, "contradicted"), (0.4, "not resolved")])
    def test_of_e7m0_depend_on_its_gap_to_float32(self, study, tmp_path, monkeypatch, gain, word):
        # The gap of the best optimizer is 0.5 - gain; a failure is one above 0.1.
        monkeypatch.setitem(GAIN, "E7M0", gain)
        verdict = study.verdicts.e7m0_fails(results(study, make_lines(), tmp_path))[0]
        assert (verdict.optimizer, verdict.word) == ("before", word)
        assert abs(float(verdict.evidence[0]) - (0.5 - gain)) < 1e-3

    def test_of_e7m0_that_diverges(self, study, tmp_path, monkeypatch):
        monkeypatch.setitem(GAIN, "E7M0", 0.48)
        lines = make_lines()
        line_of(lines, "digits/E7M0/before/master/evaluate/2^-7/1")["loss"] = None
        line_of(lines, "digits/E7M0/adamw/master/evaluate/2^-7/1")["loss"] = None
        line_of(lines, "digits/E7M0/after/master/evaluate/2^-7/2")["loss"] = None
        assert study.verdicts.e7m0_fails(results(study, lines, tmp_path))[0].word == "supported"

    def test_of_e7m0_prefer_an_optimizer_without_failures(self, study, tmp_path, monkeypatch):
        monkeypatch.setitem(GAIN, "E7M0", 0.48)
        lines = make_lines()
        line_of(lines, "digits/E7M0/before/master/evaluate/2^-7/1")["loss"] = None
        found = results(study, lines, tmp_path)
        assert study.verdicts.best_gap(found, "digits", "E7M0", "master")[0].optimizer == "adamw"

    def test_overall_is_that_of_more_than_half(self, study):
        words = ["supported", "supported", "contradicted", "not resolved"]
        found = [study.verdicts.Verdict("", "", "", word, ()) for word in words]
        assert study.verdicts.overall(found[:3]) == "supported"
        assert study.verdicts.overall(found) == "not resolved"


def check(study, lines, tmp_path, text):
    return next(c for c in study.verdicts.checks(results(study, lines, tmp_path)) if text in c.name)


class TestChecks:
    """Of the bench: they pass on a sound study, and each of them fails on one that is not."""

    @pytest.mark.parametrize("text", ["E1M6 and E0M7", "float32 weights", "best learning rate"])
    def test_pass(self, study, tmp_path, text):
        assert check(study, make_lines(), tmp_path, text).passed

    @pytest.mark.parametrize("change", [{"loss": 1.25}, {"loss": None}, {"losses": [2.0, 2.0, 2.1, 1.5]}])
    def test_fail_where_one_grid_has_two_losses(self, study, tmp_path, change):
        lines = make_lines()
        line_of(lines, "digits/E1M6/after/master/evaluate/2^-7/0").update(change)
        assert check(study, lines, tmp_path, "E1M6 and E0M7").passed is False

    def test_fail_where_one_grid_has_runs_of_its_own(self, study, tmp_path):
        lines = [line for line in make_lines() if line.get("key") != "digits/E1M6/after/master/select/2^-8/1000"]
        assert check(study, lines, tmp_path, "E1M6 and E0M7").passed is False

    def test_fail_where_float32_depends_on_the_format(self, study, tmp_path):
        lines = make_lines()
        line_of(lines, "digits/bfloat16/adamw/float32/evaluate/2^-7/3")["loss"] += 1e-6
        assert check(study, lines, tmp_path, "float32 weights").passed is False

    def test_fail_where_the_best_learning_rate_is_the_last_one_tried(self, study, tmp_path):
        lines = [line for line in make_lines() if line.get("key") != "digits/E4M3/after/master/select/2^-6/1000"]
        assert "digits/E4M3/after/master" in check(study, lines, tmp_path, "best learning rate").detail

    def test_have_no_result_without_pairs(self, study, tmp_path):
        lines = [line for line in make_lines() if line.get("format") != "E1M6"]
        assert check(study, lines, tmp_path, "E1M6 and E0M7").passed is None


class TestPage:
    """The files that a person reads."""

    def test_has_numbers_that_follow_from_the_lines_whose_keys_it_shows(self, page):
        lines = make_lines()
        html_page, _ = page(lines)
        rows = [row for row in Tables(html_page).rows if len(row) == 15 and row[0] == "digits"]
        assert len(rows) == 2 * len(CONFIG["formats"])
        for *_, gain, interval, corrected, p, _, _, _, _, adamw, variant, seeds in rows:
            first, last = map(int, re.fullmatch(r"seeds (\d)-(\d)", seeds).groups())
            losses = [
                [line_of(lines, f"{key}/{s}")["loss"] for s in range(first, last + 1)] for key in (adamw, variant)
            ]
            test = stats.ttest_rel(*losses)
            assert gain == f"{np.subtract(*losses).mean():+.5f}"
            assert p == f"{test.pvalue:.2g}"
            for text, level in ((interval, 0.95), (corrected, 1 - 0.05 / COMPARISONS)):
                bounds = [float(number) for number in text.strip("[]").split(", ")]
                np.testing.assert_allclose(bounds, test.confidence_interval(level), atol=0.51e-4)

    def test_shows_the_same_gains_in_markdown(self, page):
        _, markdown = page(make_lines())
        row = next(line for line in markdown.splitlines() if line.startswith("| E5M2 |"))
        assert row == f"| E5M2 | {GAIN['E5M2'] + NOISE.mean():+.4f}* | {-NOISE.mean():+.4f} |"

    def test_needs_no_other_file(self, page):
        html_page, markdown = page(make_lines(), draw=True)
        for name, value in Tables(html_page).attributes:
            if name in ("src", "href"):
                assert value.startswith(("data:", "#"))
        assert "://" not in re.sub(r"base64,[\w+/=]+", "", html_page)
        assert re.findall(r"!\[.*\]\((.*)\)", markdown) == ["format_study.png"]

    def test_escapes_what_lines_say(self, page):
        lines = make_lines()
        line_of(lines, "digits/E4M3/after/master/evaluate/2^-7/0").update(loss=None, failure="<b>&</b>")
        html_page, _ = page(lines)
        assert "&lt;b&gt;&amp;&lt;/b&gt;" in html_page

    def test_lists_failures_and_what_is_missing(self, page):
        lines = [line for line in make_lines() if "/E5M2/after/master/" not in line.get("key", "")]
        lines = [line for line in lines if line.get("key") != "digits/E4M3/after/master/evaluate/2^-7/3"]
        of_arm = {"task": "digits", "format": "bfloat16", "optimizer": "after", "storage": "master", "seconds": 1.0}
        lines = [line for line in lines if "/bfloat16/after/master/" not in line.get("key", "")]
        lines.append(
            {"kind": "failed", "key": "digits/bfloat16/after/master/study/failed", "failure": "Boom", **of_arm}
        )
        for text in page(lines):
            assert "partial" in text
            rows = (
                Tables(text).rows
                if "<table" in text
                else [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines()]
            )
            assert ["digits/E5M2/after/master", "0 of 4"] in rows
            assert ["digits/E4M3/after/master", "3 of 4"] in rows
            assert ["digits/bfloat16/after/master/study/failed", "Boom", "-"] in rows
            assert not any(row[0] == "digits/bfloat16/after/master" for row in rows if row)

    def test_is_made_of_a_study_that_has_just_begun(self, page):
        html_page, _ = page(make_lines()[:1], draw=True)
        assert "No arm has been compared" in html_page

    def test_leaves_out_a_last_line_that_is_not_complete(self, page):
        lines = make_lines()
        assert page(lines) == page(lines, json.dumps(lines[-1])[:40])

    @pytest.mark.parametrize("change", ["no header", "a line twice"])
    def test_is_refused_for_other_files(self, study, tmp_path, change):
        lines = make_lines()
        lines = lines[1:] if change == "no header" else [*lines, lines[-1]]
        with pytest.raises(ValueError, match="must"):
            results(study, lines, tmp_path)


class TestStatistics:
    """Means and ranks of what runs measured."""

    def test_spearman_agrees_with_scipy(self, study):
        x, y = [7, 5, 4, 3, 2, 2, 0], [0.1, 0.3, 0.2, 0.2, 0.5, 0.6, 0.4]
        assert math.isclose(study.analysis.spearman(x, y), stats.spearmanr(x, y).statistic)

    def test_means_are_of_the_numbers_that_there_are(self, study):
        lines = [{"x": [1.0, 2.0, None, 9.0]}, {"x": [3.0, None, None, 9.0]}]
        np.testing.assert_array_equal(study.analysis.mean_of(lines, "x"), [2.0, 2.0, np.nan, 9.0])
        assert study.analysis.middle_of(lines, "x") == 2.0  # Of the second and third segment.
