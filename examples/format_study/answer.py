"""The answer that the numbers give to the question of the study, and to AltGrad's hypotheses."""

import collections
import itertools

import figures
import verdicts
from analysis import Difference, Study
from arms import Arm
from page import Cell, Picture, Section, Table
from verdicts import FAILS, HIGH, LITTLE, LOW, interval_text

NAMES = {
    "before": "stiffness before Adam",
    "after": "stiffness after Adam",
    "both": "stiffness before and after Adam",
    "grid_sgd": "momentum in grid steps",
}


def answer(study: Study) -> Section:
    formats = set(study.formats())
    signs = {arm: study.sign(arm) for arm, gain in study.gains.items() if arm.format in formats and gain.seeds}
    blocks = [progress(study)] if verdicts.missing(study) else []
    picture = Picture(_map_caption(study), figures.gain_map(study), "format_study.png")
    if not signs:
        return Section("Answer", [*blocks, "No arm has been compared with AdamW yet.", picture])
    best = max(signs, key=lambda arm: study.gains[arm].sample.mean)
    gain = study.gains[best]
    blocks.append(
        f"**Of {len(signs)} comparisons with AdamW in {len(formats)} different 8-bit formats, the variants gain in "
        f"{_count(signs, 1)} and lose in {_count(signs, -1)}** at 5 % over all {study.comparisons} comparisons of the "
        "study, and by more than a finer grid of learning rates might change; "
        f"{_count(signs, 0)} are not resolved. The largest mean gain is that of {best.format} with "
        f"{NAMES[best.optimizer]}, {best.storage} storage, on {best.task}: {gain.sample.mean:+.4f} nats of validation "
        f"loss, corrected interval {interval_text(gain.sample.interval(study.comparisons))}."
    )
    compared = {arm.optimizer for arm in signs}
    blocks += [_variant(study, optimizer, signs) for optimizer in study.variants if optimizer in compared]
    blocks.append(
        "AltGrad's hypotheses, each over the pairs of task and storage and, except for H3, the three ways to put the "
        "stiffness into AdamW:"
    )
    for name, found in _hypotheses(study).items():
        found = found if name.startswith("H3") else verdicts.of_adam(found)
        blocks.append(f"{name}: **{_tally(found)}**. {_small_print(name, found)}".strip())
    tables = _verdict_table(study), picture, _most_table(study, signs), _best_table(study)
    return Section("Answer", [*blocks, *tables])


def hypotheses(study: Study) -> Section:
    low, high, e7m0 = _hypotheses(study).values()
    first = ("task", "storage", "optimizer", "verdict")
    slopes = (f"M <= {LOW} gain", f"M <= {LOW} lose", "formats", "seeds")
    best = ("task", "storage", "best optimizer", "verdict")
    tests = len(study.places()) * len(study.variants)
    blocks = [
        "A hypothesis has the verdict of more than half of its rows, those of grid_sgd aside, else it is not "
        "resolved. The gain of grid_sgd over AdamW is that of another optimizer, geometry or not: it has no second "
        "moment, at most `max_steps` of its grid per update, which is 1 % of a weight in float16 and all of it in "
        "E7M0, and on a grid scales that do not grow, so that weights saturate.",
        "H1. Per seed, a line is fitted to the gain over mantissa bits, of AltGrad's different 8-bit formats. The "
        f"slope is tested over seeds by t; its interval counts the {tests} slopes. Supported: the interval lies below "
        f"zero, and of formats with at most {LOW} mantissa bits at least one gains and none loses (corrected). "
        "Contradicted: the interval lies above zero, or at least one of these formats loses and none gains.",
        Table(
            "H1: low-mantissa formats gain most.",
            (*first, "slope, nats per bit", "corrected", "p", *slopes),
            [_verdict_row(v) for v in low],
        ),
        f"H2. Gaining little is read as a difference within +-{LITTLE} nats, of 8-bit formats with at least {HIGH} "
        "mantissa bits and of 16-bit formats. Supported: all are inside, by two one-sided tests that count the "
        f"{tests} rows. Contradicted: the corrected interval of one lies above. Losses are no contradiction; they are "
        "listed, and so are point estimates.",
        Table(
            "H2: high-mantissa and 16-bit formats gain little.",
            (*first, "gain more", "lose more", "inside", "means inside"),
            [_verdict_row(v) for v in high],
        ),
        "H3. Of the optimizer with the smallest mean gap between E7M0 and AdamW on float32 weights. Supported: its "
        f"interval lies above {FAILS} nats, or a seed has no finite loss. Contradicted: it lies below. The interval "
        "counts tasks, storages and optimizers. Ranks are among best optimizers of different 8-bit formats, the "
        "largest gap first.",
        Table(
            "H3: E7M0 fails.",
            (*best, "gap", "corrected", "gap of AdamW", "loss", "not finite", "rank", "next worst"),
            [_verdict_row(v) for v in e7m0],
        ),
    ]
    return Section("AltGrad's hypotheses", blocks)


def _variant(study: Study, optimizer: str, signs: dict[Arm, int]) -> str:
    """A sentence on a variant, over all 8-bit formats."""
    own = {arm: sign for arm, sign in signs.items() if arm.optimizer == optimizer}
    places = [arm for place in study.places() if (arm := _most(study, *place, optimizer))]
    most = collections.Counter(arm.format for arm in places if study.sign(arm) > 0)
    winners = ", ".join(f"{name} ({n})" for name, n in most.most_common()) or "none"
    return (
        f"`{optimizer}`, {NAMES[optimizer]}: gains in {_count(own, 1)} and loses in {_count(own, -1)} of {len(own)} "
        f"comparisons. Formats that gain most, and for certain, in some of {len(places)} pairs of task and storage: "
        f"{winners}."
    )


def _hypotheses(study: Study) -> dict[str, list[verdicts.Verdict]]:
    return {
        "H1, low-mantissa formats gain most": verdicts.low_mantissa_gains(study),
        "H2, high-mantissa and 16-bit formats gain little": verdicts.high_mantissa_gains(study),
        "H3, E7M0 fails": verdicts.e7m0_fails(study),
    }


def _tally(found: list[verdicts.Verdict]) -> str:
    """The verdict of several, and how many are what."""
    if not found:
        return "no data"
    counts = collections.Counter(verdict.word for verdict in found)
    words = (verdicts.SUPPORTED, verdicts.CONTRADICTED, verdicts.OPEN)
    return f"{verdicts.overall(found)} ({', '.join(f'{counts[word]} {word}' for word in words if counts[word])})"


def _small_print(name: str, found: list[verdicts.Verdict]) -> str:
    """What a tally hides."""
    if name.startswith("H2") and found:
        losing = sum(less != "none" for _, less, *_ in found)
        return f"In {losing} of the {len(found)} one of these formats loses more than {LITTLE} nats for certain."
    if name.startswith("H3") and found:
        gaps = [float(v.evidence[0]) for v in found]
        return f"Its best optimizer is {min(gaps):.4f} to {max(gaps):.4f} nats behind AdamW on float32 weights."
    return ""


def _verdict_table(study: Study) -> Table:
    found = _hypotheses(study).values()
    rows = []
    for place in study.places():
        own = [[v for v in some if v[:2] == place] for some in found]
        own[:2] = map(verdicts.of_adam, own[:2])
        rows.append(("{}, {}".format(*place), *map(_tally, own)))
    for optimizer in study.variants:
        # H3 has a verdict on the best optimizer alone.
        tallies = [_tally([v for v in some if v.optimizer == optimizer]) for some in found]
        rows.append((optimizer, *tallies[:2], "-"))
    caption = "Verdicts by task and storage, and by optimizer. Criteria are in the next section."
    return Table(caption, ("where", "H1", "H2", "H3"), rows)


def _verdict_row(verdict: verdicts.Verdict) -> tuple[str, ...]:
    return verdict.task, verdict.storage, verdict.optimizer, verdict.word, *verdict.evidence


def _most(study: Study, task: str, storage: str, optimizer: str) -> Arm | None:
    """The arm of the 8-bit format with the largest mean gain."""
    arms = study.compared(study.formats(), task, storage, optimizer)
    return max(arms, key=lambda arm: study.gains[arm].sample.mean, default=None)


def _most_table(study: Study, signs: dict[Arm, int]) -> Table:
    rows = []
    for (task, storage), optimizer in itertools.product(study.places(), study.variants):
        arm = _most(study, task, storage, optimizer)
        if arm:
            own = [sign for a, sign in signs.items() if (a.task, a.storage, a.optimizer) == (task, storage, optimizer)]
            counts = str(own.count(1)), str(own.count(-1)), str(len(own))
            rows.append((task, storage, optimizer, arm.format, *gain_cells(study, study.gains[arm]), *counts))
    columns = ("task", "storage", "optimizer", "gains most", "gain", "95 %", "corrected", "gain", "lose", "of")
    caption = (
        "The 8-bit format that gains most, by mean; the corrected interval counts all comparisons, and so the choice "
        "among formats, too. Last: how many of the different 8-bit formats gain and lose (corrected)."
    )
    return Table(caption, columns, rows)


def _best_table(study: Study) -> Table:
    """The smallest gap to float32 of each storage, whatever the gain."""
    rows, chosen_of = [], len(study.formats()) * len(study.config.optimizers)
    for task, storage in study.places():
        found = [best for name in study.formats() if (best := verdicts.best_gap(study, task, name, storage))]
        for arm, gap in sorted(found, key=lambda pair: pair[1].sample.mean)[:3]:
            cells = Cell(f"{gap.sample.mean:+.4f}", gap.source), interval_text(gap.sample.interval(chosen_of))
            rows.append((task, storage, arm.format, arm.optimizer, *cells))
    columns = ("task", "storage", "format", "best optimizer", "gap to float32", "corrected")
    caption = "The three 8-bit formats nearest to AdamW on float32 weights, each with its best optimizer. "
    caption += f"Intervals count the {chosen_of} arms among which they were chosen."
    return Table(caption, columns, rows)


def gain_cells(study: Study, gain: Difference) -> tuple[Cell, Cell, Cell]:
    """Mean, interval and corrected interval."""
    bounds = gain.sample.interval(), gain.sample.interval(study.comparisons)
    return Cell(f"{gain.sample.mean:+.5f}", gain.source), *(Cell(interval_text(b), gain.source) for b in bounds)


def _count(signs: dict[Arm, int], sign: int) -> int:
    return list(signs.values()).count(sign)


def _map_caption(study: Study) -> str:
    return (
        "Gain over AdamW in nats of validation loss, by format, storage and optimizer. Blue is better; bold with a "
        f"star: different from zero at 5 % over {study.comparisons} comparisons, by more than a finer grid of learning "
        "rates might change."
    )


def progress(study: Study) -> str:
    """Whether the study is complete."""
    absent = verdicts.missing(study)
    if not absent:
        return "The study is complete: every arm of the configuration has its runs, or a line that says why not."
    return f"**This report is partial: {len(absent)} arms of the configuration lack runs.**"
