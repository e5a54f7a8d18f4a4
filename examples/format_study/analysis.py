"""What the lines of a study say: gains of paired seeds, and intervals that count all comparisons."""

import collections
import dataclasses
import functools
import itertools
import json
import lzma
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from arms import Arm
from config import StudyConfig, from_dict, shape_of_grid
from scipy import special

import altgrad_jax as ag


@dataclasses.dataclass(frozen=True)
class Sample:
    """Independent numbers, one of each seed."""

    values: np.ndarray  # float64 [n]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if len(self.values) else np.nan

    @property
    def deviation(self) -> float:
        """Standard deviation, NaN of fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else np.nan

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / max(1, len(self.values)) ** 0.5

    def interval(self, comparisons: int = 1) -> tuple[float, float]:
        """Where the mean is, by t, with 95 %: for all of so many comparisons at once, by Bonferroni."""
        width = special.stdtrit(max(1, len(self.values) - 1), 1 - 0.025 / comparisons) * self.error
        return self.mean - width, self.mean + width

    @property
    def p(self) -> float:
        """Two-sided, of a mean of zero; NaN of fewer than two."""
        if not self.error > 0:
            return np.nan if np.isnan(self.error) else float(self.mean == 0)
        return float(2 * special.stdtr(len(self.values) - 1, -abs(self.mean) / self.error))

    def detectable(self, comparisons: int = 1) -> float:
        """The smallest true mean that differs from zero, at 5 % over all comparisons, with 80 % power."""
        freedom = max(1, len(self.values) - 1)
        critical = special.stdtrit(freedom, 1 - 0.025 / comparisons)
        return float(special.nctdtrinc(freedom, 0.2, critical) * self.error)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Loss of one arm minus that of another, seed by seed."""

    keys: tuple[str, str]  # Of their lines, without the seed.
    seeds: tuple[int, ...]
    sample: Sample
    failed: tuple[int, ...]  # Seeds of which one of the two has no finite loss.

    @property
    def seeds_text(self) -> str:
        """The seeds: a range where it has no holes."""
        first, last = (self.seeds[0], self.seeds[-1]) if self.seeds else (0, 0)
        if last > first and last - first == len(self.seeds) - 1:
            return f"seeds {first}-{last}"
        return f"seeds {', '.join(map(str, self.seeds)) or 'none'}"

    @property
    def source(self) -> str:
        """Which lines were subtracted."""
        return f"{self.keys[0]} minus {self.keys[1]}, {self.seeds_text}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A file of results; all numbers of the report come from here."""

    header: dict[str, Any]
    config: StudyConfig
    lines: list[dict[str, Any]]

    @functools.cached_property
    def arms(self) -> dict[str, dict[Arm, list[dict]]]:
        """Lines by kind and arm."""
        result = collections.defaultdict(lambda: collections.defaultdict(list))
        for line in self.lines:
            result[line["kind"]][arm_of(line)].append(line)
        return result

    @functools.cached_property
    def evaluated(self) -> dict[Arm, list[dict]]:
        """Lines of the evaluation of each arm, by seed."""
        return {arm: sorted(lines, key=lambda line: line["seed"]) for arm, lines in self.arms["evaluate"].items()}

    @functools.cached_property
    def duplicates(self) -> dict[str, str]:
        """Formats that a free scale makes the same grid as an earlier one: formats of the study to earlier ones."""
        first = {}
        pairs = {name: first.setdefault(shape_of_grid(name), name) for name in self.config.formats}
        return {name: earlier for name, earlier in pairs.items() if name != earlier}

    @property
    def variants(self) -> list[str]:
        return [o for o in self.config.optimizers if o != "adamw"]

    @property
    def storages(self) -> list[str]:
        """Those that know the grid."""
        return [s for s in self.config.storages if s != "float32"]

    def places(self) -> list[tuple[str, str]]:
        """(task, storage) of all comparisons."""
        return list(itertools.product(self.config.tasks, self.storages))

    @functools.cached_property
    def comparisons(self) -> int:
        """Gains that the configuration asks for, of different grids."""
        formats = len(self.config.formats) - len(self.duplicates)
        return len(self.places()) * len(self.variants) * formats

    def formats(self, lowest: int = 0, highest: int = 99, altgrad: bool = False) -> list[str]:
        """Different 8-bit grids of so many mantissa bits; AltGrad's own alone, or all."""
        names = [name for name in self.config.formats if name not in self.duplicates]
        names = [name for name in names if re.fullmatch(r"E\dM\d", name)] if altgrad else names
        known = [(name, ag.as_format(name)) for name in names]
        return [name for name, f in known if f.bits == 8 and lowest <= f.mantissa_bits <= highest]

    @functools.cached_property
    def gains(self) -> dict[Arm, Difference]:
        """Loss of AdamW minus loss of a variant, of the same task, format and storage."""
        result = {}
        for arm in self.evaluated:
            adamw = dataclasses.replace(arm, optimizer="adamw")
            if arm != adamw and adamw in self.evaluated:
                result[arm] = difference(self.evaluated[adamw], self.evaluated[arm])
        return result

    def compared(self, formats: Iterable[str], task: str, storage: str, optimizer: str) -> list[Arm]:
        """The arms of these formats that have a gain."""
        arms = [Arm(task, name, optimizer, storage) for name in formats]
        return [arm for arm in arms if arm in self.gains and self.gains[arm].seeds]

    @functools.cached_property
    def gaps(self) -> dict[Arm, Difference]:
        """Loss of an arm minus loss of AdamW on float32 weights."""
        result = {}
        for arm, lines in self.evaluated.items():
            rows = [Arm(arm.task, name, "adamw", "float32") for name in self.config.formats]
            # All rows hold the same run, which is one of the checks.
            reference = next((row for row in rows if row in self.evaluated), None)
            if reference and arm.storage != "float32":
                result[arm] = difference(lines, self.evaluated[reference])
        return result

    @functools.cached_property
    def holm(self) -> dict[Arm, float]:
        """Adjusted p-values of all gains."""
        tested = {arm: gain.sample.p for arm, gain in self.gains.items() if arm.format not in self.duplicates}
        tested = {arm: p for arm, p in tested.items() if not np.isnan(p)}
        adjusted = dict(zip(tested, holm(np.array(list(tested.values())), self.comparisons), strict=True))
        originals = {a: dataclasses.replace(a, format=self.duplicates.get(a.format, a.format)) for a in self.gains}
        return {arm: float(adjusted.get(original, np.nan)) for arm, original in originals.items()}

    @functools.cached_property
    def left(self) -> dict[Arm, float]:
        """What a finer grid of learning rates might take from the loss of each arm, in nats: an estimate.

        The depth of the parabola through the chosen rate and its two neighbours, of the seeds that chose it, below the
        chosen one. Where one neighbour fails, by more than 1 nat, no parabola fits, and it is the excess of the other.
        """
        result = {}
        for arm, lines in self.evaluated.items():
            tried = collections.defaultdict(list)
            for line in self.arms["select"].get(arm, []):
                tried[line["learning_rate"]].append(np.inf if line["loss"] is None else line["loss"])
            rates, chosen = sorted(tried), lines[0]["learning_rate"]
            if chosen in rates[1:-1]:
                i = rates.index(chosen)
                below, best, above = (np.mean(tried[rate]) for rate in rates[i - 1 : i + 2])
                result[arm] = _depth(below - best, above - best)
        return result

    def sign(self, arm: Arm) -> int:
        """+1 where an arm gains for certain, -1 where it loses, 0 where that is not resolved.

        Certain: the corrected interval excludes zero, by more than `left` for the arm that is worse.
        """
        low, high = self.gains[arm].sample.interval(self.comparisons)
        adamw = self.left.get(dataclasses.replace(arm, optimizer="adamw"), 0.0)
        return int(low > adamw) - int(high < -self.left.get(arm, 0.0))


def read(path: pathlib.Path) -> Study:
    """The study of a JSONL file, or of its `.xz`.

    A last line without its end, which a running study has begun, is left out.
    """
    packed = path.with_name(path.name + ".xz")
    kept = packed.exists() and not path.exists()
    text = lzma.decompress(packed.read_bytes()).decode() if kept else path.read_text("utf-8")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    if not lines or lines[0].get("kind") != "study":
        raise ValueError(f"{path} must begin with a line of kind 'study', as study.py writes it.")
    header, *lines = lines
    repeated = [key for key, n in collections.Counter(line["key"] for line in lines).items() if n > 1]
    if repeated:
        raise ValueError(f"{path} must hold each key once, got {', '.join(repeated[:3])} more than once.")
    return Study(header, from_dict(header["config"]), lines)


def arm_of(line: dict[str, Any]) -> Arm:
    return Arm(*(line[field.name] for field in dataclasses.fields(Arm)))


def prefix(line: dict[str, Any]) -> str:
    """The key of a line without its seed."""
    return line["key"].rpartition("/")[0]


def difference(first: list[dict], second: list[dict]) -> Difference:
    """Loss of the first minus loss of the second, of seeds that both have."""
    losses = [{line["seed"]: line["loss"] for line in lines} for lines in (first, second)]
    seeds = sorted(losses[0].keys() & losses[1].keys())
    finite = tuple(seed for seed in seeds if None not in (losses[0][seed], losses[1][seed]))
    values = np.array([losses[0][seed] - losses[1][seed] for seed in finite], np.float64)
    failed = tuple(seed for seed in seeds if seed not in finite)
    return Difference((prefix(first[0]), prefix(second[0])), finite, Sample(values), failed)


def _depth(below: float, above: float) -> float:
    """Of a parabola that passes through 0 at 0 and through two excesses at -1 and 1."""
    if max(below, above) > 1:
        return float(min(below, above))
    curvature = below + above
    return float((above - below) ** 2 / (8 * curvature)) if curvature > 0 else 0.0


def holm(p: np.ndarray, comparisons: int) -> np.ndarray:
    """Holm's adjusted p-values; of the comparisons, those without a p-value count as the largest."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate((comparisons - np.arange(len(p))) * p[order])
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def mean_of(lines: list[dict], name: str) -> np.ndarray:
    """Mean over runs of what they measured, without those that have no number; NaN where none has."""
    values = np.array([line[name] for line in lines], np.float64)
    return np.ma.masked_invalid(values).mean(axis=0, keepdims=True).filled(np.nan)[0]


def middle_of(lines: list[dict], name: str) -> float:
    """Mean over runs and the middle half of their segments: the learning rate is almost zero in the last one."""
    values = np.array([line[name] for line in lines], np.float64)
    segments = values.shape[1]
    half = np.ma.masked_invalid(values[:, segments // 4 : segments - segments // 4])
    return float(half.mean(keepdims=True).filled(np.nan)[0, 0])


def spearman(x: Iterable[float], y: Iterable[float]) -> float:
    """Rank correlation; NaN where one of the two is constant."""
    x, y = (np.asarray(list(v), np.float64) for v in (x, y))
    # Ties share the mean of their ranks.
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (x, y)]
    if min(np.ptp(rank) for rank in ranks) == 0:
        return np.nan
    return float(np.corrcoef(*ranks)[0, 1])
