"""AltGrad's hypotheses against the numbers of a study, and checks of the study itself."""

import collections
import itertools
from typing import NamedTuple

import numpy as np
from analysis import Difference, Sample, Study, mean_of
from arms import Arm, jobs

import altgrad_jax as ag

LOW, HIGH = 2, 4  # Mantissa bits, at most and at least, of "low-mantissa" and "high-mantissa" formats.
LITTLE = 0.01  # Nats: a smaller difference is little.
FAILS = 0.1  # Nats behind float32 AdamW: a larger gap is a failure.
SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not resolved"


class Verdict(NamedTuple):
    """On one hypothesis, for one task, storage and optimizer."""

    task: str
    storage: str
    optimizer: str
    word: str
    evidence: tuple[str, ...]


class Check(NamedTuple):
    """Of the bench itself."""

    name: str
    passed: bool | None  # None: there was nothing to compare.
    detail: str


def slope(study: Study, task: str, storage: str, optimizer: str) -> tuple[Sample, list[str]]:
    """Change of the gain per mantissa bit, of each seed, over AltGrad's 8-bit formats; and which ones there are."""
    arms = study.compared(study.formats(altgrad=True), task, storage, optimizer)
    gains = {arm.format: study.gains[arm] for arm in arms}
    if len(gains) < 3:
        return Sample(np.zeros(0)), list(gains)
    seeds = set.intersection(*(set(gain.seeds) for gain in gains.values()))
    values = [[v for s, v in zip(g.seeds, g.sample.values, strict=True) if s in seeds] for g in gains.values()]
    bits = [ag.as_format(name).mantissa_bits for name in gains]
    return Sample(np.polyfit(bits, np.array(values), 1)[0] if seeds else np.zeros(0)), list(gains)


def low_mantissa_gains(study: Study) -> list[Verdict]:
    """H1: the fewer mantissa bits, the more a format gains.

    Supported: the slope lies below zero, one of AltGrad's formats of at most 2 mantissa bits gains, and none loses.
    Contradicted: the slope lies above zero, or one of them loses and none gains.
    """
    verdicts, cells = [], [(*place, variant) for place in study.places() for variant in study.variants]
    for task, storage, optimizer in cells:
        sample, formats = slope(study, task, storage, optimizer)
        low = study.compared(study.formats(highest=LOW, altgrad=True), task, storage, optimizer)
        if len(sample.values) < 2 or not low:
            continue
        bounds = sample.interval(len(cells))
        gain, lose = ([arm.format for arm in low if study.sign(arm) == sign] for sign in (1, -1))
        if bounds[1] < 0 and gain and not lose:
            word = SUPPORTED
        elif bounds[0] > 0 or (lose and not gain):
            word = CONTRADICTED
        else:
            word = OPEN
        evidence = f"{sample.mean:+.5f}", interval_text(bounds), f"{sample.p:.2g}", listed(gain), listed(lose)
        verdicts.append(
            Verdict(task, storage, optimizer, word, (*evidence, str(len(formats)), str(len(sample.values))))
        )
    return verdicts


def high_mantissa_gains(study: Study) -> list[Verdict]:
    """H2: formats of many mantissa bits, and of 16 bits, gain little.

    Supported: every one of them is equivalent to AdamW within +-LITTLE, by two one-sided tests at 5 % over all rows.
    All of them must be, so that their number needs no correction. Contradicted: one gains more, by its corrected
    interval. That one loses more is no contradiction.
    """
    wide = [name for name in study.config.formats if ag.as_format(name).bits > 8]
    verdicts, cells = [], list(itertools.product(study.places(), study.variants))
    for (task, storage), optimizer in cells:
        arms = study.compared([*study.formats(lowest=HIGH), *wide], task, storage, optimizer)
        arms = [arm for arm in arms if len(study.gains[arm].seeds) > 1]
        if not arms:
            continue
        bounds = {arm.format: study.gains[arm].sample.interval(study.comparisons) for arm in arms}
        more = [name for name, (low, _) in bounds.items() if low > LITTLE]
        less = [name for name, (_, high) in bounds.items() if high < -LITTLE]
        narrow = {arm.format: study.gains[arm].sample.interval(len(cells) / 2) for arm in arms}
        inside = [name for name, (low, high) in narrow.items() if low >= -LITTLE and high <= LITTLE]
        near = [arm.format for arm in arms if abs(study.gains[arm].sample.mean) <= LITTLE]
        word = CONTRADICTED if more else SUPPORTED if len(inside) == len(arms) else OPEN
        everywhere = "all" if len(inside) == len(arms) else listed(inside)
        evidence = listed(more), listed(less), everywhere, f"{len(near)} of {len(arms)}"
        verdicts.append(Verdict(task, storage, optimizer, word, evidence))
    return verdicts


def best_gap(study: Study, task: str, format: str, storage: str) -> tuple[Arm, Difference] | None:
    """The optimizer of the fewest failures, and of these of the smallest mean gap, to float32 AdamW."""
    arms = [Arm(task, format, optimizer, storage) for optimizer in study.config.optimizers]
    found = [(arm, study.gaps[arm]) for arm in arms if arm in study.gaps and study.gaps[arm].seeds]
    return min(found, key=lambda pair: (len(pair[1].failed), pair[1].sample.mean), default=None)


def e7m0_fails(study: Study) -> list[Verdict]:
    """H3: powers of two alone do not train.

    Supported: the gap of the best optimizer to float32 AdamW lies above FAILS nats, or a seed has no finite loss.
    Contradicted: the gap lies below. The interval counts all tasks, storages and optimizers, so that it holds for a
    chosen one.
    """
    verdicts = []
    for task, storage in study.places():
        best = best_gap(study, task, "E7M0", storage)
        if best is None or len(best[1].seeds) < 2:
            continue
        arm, gap = best
        others = {name: best_gap(study, task, name, storage) for name in study.formats() if name != "E7M0"}
        means = {name: found[1].sample.mean for name, found in others.items() if found}
        low, high = bounds = gap.sample.interval(len(study.places()) * len(study.config.optimizers))
        word = SUPPORTED if low > FAILS or gap.failed else CONTRADICTED if high < FAILS else OPEN
        worst = max(means, key=means.get, default=None)
        rank = f"{1 + sum(mean > gap.sample.mean for mean in means.values())} of {1 + len(means)}"
        loss, adamw = mean_of(study.evaluated[arm], "loss"), study.gaps.get(Arm(task, "E7M0", "adamw", storage))
        numbers = f"{gap.sample.mean:+.4f}", interval_text(bounds), f"{adamw.sample.mean:+.4f}" if adamw else "-"
        evidence = *numbers, f"{loss:.4f}", str(len(gap.failed)), rank
        nearest = f"{worst} {means[worst]:+.4f}" if worst else "-"
        verdicts.append(Verdict(task, storage, arm.optimizer, word, (*evidence, nearest)))
    return verdicts


def of_adam(verdicts: list[Verdict]) -> list[Verdict]:
    """Those on AdamW with stiffness. Momentum in grid steps differs from AdamW in more than geometry."""
    return [verdict for verdict in verdicts if verdict.optimizer != "grid_sgd"]


def overall(verdicts: list[Verdict]) -> str:
    """The word of more than half of the verdicts."""
    words = collections.Counter(verdict.word for verdict in verdicts)
    return next((word for word, n in words.items() if 2 * n > len(verdicts)), OPEN)


def checks(study: Study) -> list[Check]:
    pairs = [(name, earlier) for name, earlier in study.duplicates.items()]
    results = [_same_lines(study, *pair) for pair in pairs]
    rows = {}
    for arm, lines in sorted(study.evaluated.items(), key=lambda pair: study.config.formats.index(pair[0].format)):
        if arm.storage == "float32":
            rows.setdefault(arm.task, []).append([[line["seed"], line["loss"], *line["losses"]] for line in lines])
    for task, runs in rows.items():
        worst = max((_largest(runs[0], run) for run in runs[1:]), default=0.0)
        name = f"AdamW on float32 weights is the same run in every format's row ({task})"
        detail = f"{len(runs)} formats, {len(runs[0])} seeds; largest difference {worst:g}"
        results.append(Check(name, None if len(runs) < 2 else worst == 0, detail))
    return [*results, _learning_rates(study)]


def _same_lines(study: Study, name: str, earlier: str) -> Check:
    """Whether two names for one grid have the same losses, in all digits recorded, in all arms that both have run."""
    of = ("kind", "task", "optimizer", "storage", "learning_rate", "seed")
    runs = {name: {}, earlier: {}}
    for line in study.lines:
        if line["format"] in runs and line["kind"] != "failed":
            losses = [line["loss"], *line.get("losses", ())]
            runs[line["format"]][tuple(line[field] for field in of)] = losses
    arms = set.intersection(*({run[:4] for run in of_one} for of_one in runs.values()))
    first, second = ({run: v for run, v in of_one.items() if run[:4] in arms} for of_one in runs.values())
    common = first.keys() & second.keys()
    worst = max((_largest(first[run], second[run]) for run in common), default=0.0)
    alone = len(first.keys() ^ second.keys())
    detail = f"{len(common)} common keys, {alone} that only one of them has; largest difference {worst:g}"
    passed = (worst == 0 and not alone) if common else None
    return Check(f"{name} and {earlier} coincide, in all digits recorded", passed, detail)


def _largest(first: list, second: list) -> float:
    """The largest difference of two nested lists of numbers; infinity where one has no number or another length."""
    x, y = np.array(first, np.float64), np.array(second, np.float64)
    if x.shape != y.shape or np.any(np.isnan(x) != np.isnan(y)):
        return np.inf
    return float(np.max(np.abs(np.nan_to_num(x) - np.nan_to_num(y)), initial=0))


def _learning_rates(study: Study) -> Check:
    """Whether the rate of each evaluation lies between two others that were tried."""
    edge = []
    for arm, lines in study.evaluated.items():
        tried = {line["learning_rate"] for line in study.arms["select"].get(arm, [])}
        if not tried or not min(tried) < lines[0]["learning_rate"] < max(tried):
            edge.append(arm.key)
    detail = f"{len(study.evaluated) - len(edge)} of {len(study.evaluated)} arms" + f"; not {listed(edge)}" * bool(edge)
    return Check(
        "Each best learning rate lies between two others that were tried", not edge if study.evaluated else None, detail
    )


def missing(study: Study) -> list[tuple[str, int, int]]:
    """(arm, runs that it has, runs of the configuration) of arms with fewer; a job that failed is not missing."""
    failed = {line["key"] for line in study.lines if line["kind"] == "failed"}
    wanted = {"study": ("evaluate", study.config.seeds), "freeze": ("freeze", study.config.freeze_seeds)}
    result = []
    for role, arm in jobs(study.config):
        kind, runs = wanted[role]
        have = len(study.arms[kind].get(arm, []))
        if have < runs and f"{arm.key}/{role}/failed" not in failed:
            result.append((arm.key, have, runs))
    return result


def interval_text(bounds: tuple[float, float]) -> str:
    return "[{:+.4f}, {:+.4f}]".format(*bounds) if np.isfinite(bounds).all() else "-"


def listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
