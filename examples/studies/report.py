"""What the runs of `quality.py` say: tables, pictures, and the parts of the documentation that are made of them."""

import pathlib
import re
from collections.abc import Callable

import harness
import numpy as np
import training
from arms import ARMS, CARRIES, CARRY_ARMS, CARRYING, FAMILY, FORMAT_ARMS, GPT_ARMS, LINE, TABLE, after, by_rule, short
from harness import gap
from language import SIZES
from matplotlib.figure import Figure
from tasks import TASKS

import altgrad_jax as ag

DOCS = pathlib.Path(__file__).parents[2] / "docs"
TABLE_SIZE, SMALL_TASKS = "60k", ("character MLP", "digits")
# Where stiffness may act: what is rounded, and whether it stands before Adam or after it.
STIFFENED = {
    "float32, after": after,
    "rounded forward, before": "adamw through {}, stiffness before".format,
    "rounded forward, after": "adamw through {}, stiffness after".format,
    "one byte, before": "adamw on {}, stiffness before".format,
    "one byte, after": "adamw on {}, stiffness after".format,
}
COMPARISONS = len(SMALL_TASKS) * len(STIFFENED) * len(FAMILY)
Runs = dict[int, dict]  # By seed.
Place = tuple[str, str, str]  # Task, kind of device, version of jax: what is compared was trained in one place.


class Results:
    """The runs of a store that evaluate, and those of other settings."""

    def __init__(self, store: harness.Store):
        groups: dict[tuple, dict[tuple, Runs]] = {}
        for run in store.runs.values():
            key = (run["task"], run["device"], run["jax"]), run["role"], run["arm"]
            numbers = tuple(run[name] for name in training.HYPERPARAMETERS if name != "seed")
            runs = groups.setdefault(key, {})
            runs[numbers] = runs.pop(numbers, {}) | {run["seed"]: run}
        # Those that have the hyperparameters of the last one.
        self.runs = {key: list(runs.values())[-1] for key, runs in groups.items()}
        order = list(TASKS)
        places = {place for place, role, _ in self.runs if role == "evaluate"}
        self.places = sorted(places, key=lambda place: (order.index(place[0]), place))

    def of(self, place: Place, arm: str, role: str = "evaluate") -> Runs:
        return self.runs.get((place, role, arm), {})

    def only(self, task: str) -> Place:
        """The place of a task that was trained in one."""
        places = [place for place in self.places if place[0] == task]
        if len(places) != 1:
            raise ValueError(f"{task} must have been trained in one place to be a table of a page, got {places}.")
        return places[0]

    def gap(
        self, place: Place, arm: str, reference: str | None, role: str = "evaluate", comparisons: int = 1
    ) -> tuple[float, float, int]:
        return gap(*(losses_of(self.of(place, name, role)) for name in (arm, reference)), comparisons)

    def written(self, place: Place, arm: str, reference: str | None, role: str = "evaluate", digits: int = 4) -> str:
        """The mean gap with its 95 % interval and the number of pairs; empty where nothing was compared."""
        average, half, number = self.gap(place, arm, reference, role)
        if number < 2 or arm == reference:
            return ""
        return f"{average:+.{digits}f} ± {half:.{digits}f} ({number})" if np.isfinite(average) else "diverged"

    def mean(self, place: Place, arm: str, role: str = "evaluate", digits: int = 4) -> str:
        losses = list(losses_of(self.of(place, arm, role)).values())
        return f"{np.mean(losses):.{digits}f} ({len(losses)})" if losses else ""


def losses_of(runs: Runs) -> dict[int, float]:
    return {seed: np.inf if run["loss"] is None else run["loss"] for seed, run in runs.items()}


# Tables


def arms_table(results: Results, place: Place, arms: list[str], digits: int = 4) -> str:
    """Bytes, best rate, loss, gaps to AdamW and to the twin, with the number of seeds of each."""
    rows = []
    for arm in (ARMS[name] for name in arms if results.of(place, name)):
        size = f"{training.bytes_per_weight(TASKS[place[0]], arm):.2f}"
        rate = f"2^{np.log2(next(iter(results.of(place, arm.name).values()))['learning_rate']):.1f}"
        gaps = [results.written(place, arm.name, other, digits=digits) for other in ("adamw", arm.twin)]
        rows.append([arm.name, size, rate, results.mean(place, arm.name, digits=digits), *gaps])
    return harness.table(["arm", "bytes", "rate", "loss", "to AdamW", "to its twin"], rows)


def settings_table(results: Results, place: Place, roles: list[str], digits: int = 4) -> str:
    """Of other settings: the gap to the twin in the same setting, or the loss where there is no twin."""
    rows = []
    for arm in ARMS.values():
        cells = [
            results.written(place, arm.name, arm.twin, role, digits)
            if arm.twin
            else results.mean(place, arm.name, role, digits)
            for role in roles
        ]
        if any(cells):
            rows.append([arm.name, *cells])
    return harness.table(["arm", *roles], rows) if rows else ""


def gaps_table(results: Results, places: list[Place], to_twin: bool) -> str:
    """Gaps of the arms of `line` by place; of AdamW itself the loss."""

    def cell(arm, place):
        if arm.name == "adamw":
            return results.mean(place, arm.name, digits=3)
        return results.written(place, arm.name, arm.twin if to_twin else "adamw", digits=3)

    arms = [ARMS[name] for name in LINE if ARMS[name].twin or not to_twin]
    rows = [[arm.name, *(cell(arm, place) for place in places)] for arm in arms]
    return harness.table(["arm", *map(head, places)], [row for row in rows if any(row[1:])])


def carries_table(results: Results, place: Place) -> str:
    """Of rules for what weights owe: gaps to the float32 twin, and to the first rule that is emulated."""
    first = next(iter(CARRIES))
    rows = []
    for rule in ("on_grid", *CARRIES):
        arms = [by_rule(f, rule) if rule in CARRIES else f"2 bytes {short(f)}" for f in CARRYING]
        gaps = [results.written(place, arm, ARMS[arm].twin, digits=3) for arm in arms]
        pairs = zip(arms, (by_rule(f, first) for f in CARRYING), strict=True)
        others = [results.written(place, *pair, digits=3) for pair in pairs]
        rows.append([rule, *gaps, *others])
    columns = [f"{short(f)}, to {to}" for to in ("its twin", "the second row") for f in CARRYING]
    return harness.table(["rule", *columns], [row for row in rows if any(row[1:])])


def plain(name: str) -> str:
    """AdamW without the stiffness of an arm."""
    return "adamw" if name in map(after, FAMILY) else ARMS[name].twin


def formats_table(results: Results, place: Place) -> str:
    """AdamW's gaps to float32 by format, and those of stiffness to AdamW with the same rounding."""
    columns = {"rounded forward": "adamw through {}".format, "one byte": "adamw on {}".format} | STIFFENED
    rows = [[f, *(results.written(place, of(f), plain(of(f)), digits=3) for of in columns.values())] for f in FAMILY]
    return harness.table(["format", *columns], rows)


def stiffness_gaps(results: Results, place: Place) -> np.ndarray:
    """Gaps to AdamW with the same rounding, and half widths for all comparisons, `[format, column, 2]`.

    NaN where a run diverged.
    """
    arms = [[of(f) for of in STIFFENED.values()] for f in FAMILY]
    if missing := [name for row in arms for name in row if results.gap(place, name, plain(name))[2] < 2]:
        raise ValueError(f"{place[0]} needs two seeds or more of {'; '.join(missing)}: run quality.py formats.")
    return np.array(
        [[results.gap(place, name, plain(name), comparisons=COMPARISONS)[:2] for name in row] for row in arms]
    )


def verdicts_table(results: Results) -> str:
    """Formats in which stiffness gains and loses, counting all comparisons, and its gap's slope over mantissa bits."""
    rows = []
    for place in map(results.only, SMALL_TASKS):
        for (name, of), gaps in zip(STIFFENED.items(), stiffness_gaps(results, place).swapaxes(0, 1), strict=True):
            gains = [f for f, (average, half) in zip(FAMILY, gaps, strict=True) if average + half < 0]
            loses = [f for f, (average, half) in zip(FAMILY, gaps, strict=True) if not average - half <= 0]
            average, half = slope(results, place, of)
            per_bit = f"{average:+.4f} ± {half:.4f}" if np.isfinite(average) else "diverged"
            rows.append([place[0], name, *(", ".join(x) or "none" for x in (gains, loses)), per_bit])
    return harness.table(["task", "stiffness", "gains", "loses", "per bit"], rows)


def slope(results: Results, place: Place, of: Callable[[str], str]) -> tuple[float, float]:
    """Of a line through the gaps over the mantissa bits of the formats, fitted for each seed: mean and half width."""
    pairs = [[losses_of(results.of(place, name)) for name in (of(f), plain(of(f)))] for f in FAMILY]
    seeds = set.intersection(*(set(runs) for pair in pairs for runs in pair))
    bits = np.array([ag.as_format(f).mantissa_bits for f in FAMILY])
    gaps = np.array([[stiff[seed] - without[seed] for stiff, without in pairs] for seed in sorted(seeds)])
    slopes = gaps @ (bits - bits.mean()) / np.sum((bits - bits.mean()) ** 2)
    return harness.interval(slopes.tolist(), COMPARISONS // len(FAMILY))[:2]


def head(place: Place) -> str:
    """Number of weights or name of the task, and the device."""
    task, device = TASKS[place[0]], place[1].removeprefix("NVIDIA ").replace("cpu", "CPU")
    return f"{task.matrices():,} ({device})" if task.name in SIZES else f"{task.name} ({device})"


def report(results: Results, about: str, roles: list[str]) -> str:
    """Per place the arms, their gaps to AdamW and to their twins, and other settings."""
    parts = [about]
    for place in results.places:
        task = TASKS[place[0]]
        about = f"{task.matrices():,} weights, {task.steps:,} steps ({', '.join(place[1:])})."
        parts.append(f"## {task.name}\n\n{about}\n\n{arms_table(results, place, list(ARMS))}")
        if table := settings_table(results, place, roles):
            parts.append(f"### {task.name}, other settings: loss, or gap to the twin\n\n{table}")
    return "\n\n".join(parts) + "\n"


def documentation(results: Results, roles: list[str]) -> dict[pathlib.Path, str]:
    """The pages that have tables between `<!-- name -->` and `<!-- end -->`, with those of these results."""
    small, sizes = results.only(TABLE_SIZE), [place for place in results.places if place[0] in SIZES]
    others = [place for place in results.places if place[0] not in SIZES]
    tables = {
        "line, to twins": gaps_table(results, sizes, True),
        "line, to AdamW": gaps_table(results, sizes, False),
        "arms": arms_table(results, small, [name for name in TABLE if name not in (*GPT_ARMS, *CARRY_ARMS)], 3),
        "carries": carries_table(results, small),
        "settings": settings_table(results, small, roles, 3),
        "others, to twins": gaps_table(results, others, True),
        "others, to AdamW": gaps_table(results, others, False),
        "stiffness": arms_table(results, small, list(GPT_ARMS), 3),
        **{f"stiffness, {t}": arms_table(results, results.only(t), [after(f) for f in FAMILY], 3) for t in SMALL_TASKS},
        **{f"formats, {task}": formats_table(results, results.only(task)) for task in SMALL_TASKS},
        "formats, verdicts": verdicts_table(results),
    }

    def with_tables(text):
        for name in re.findall(r"<!-- (?!end)(.*) -->", text):
            part = re.compile(rf"(?<=<!-- {re.escape(name)} -->\n\n).*?(?=<!-- end -->)", re.DOTALL)
            text = part.sub(lambda _, name=name: tables.pop(name) + "\n\n", text, count=1)
        return text

    pages = [DOCS / "results" / name for name in ("quality.md", "format-study.md")]
    written = {page: with_tables(page.read_text()) for page in pages}
    if tables:
        raise ValueError(f"the pages have no place for {'; '.join(tables)}: add <!-- name --> and <!-- end -->.")
    return written


# Pictures


def draw(results: Results, path: pathlib.Path) -> None:
    """Gap to the float32 twin against the number of weights, of the arms of `line`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in LINE:
        points = []
        for place in results.places:
            if place[0] in SIZES and results.of(place, name) and results.of(place, ARMS[name].twin):
                points.append((SIZES[place[0]].matrices(), *results.gap(place, name, ARMS[name].twin)[:2]))
        if points:
            axes.errorbar(*np.transpose(sorted(points)), marker="o", capsize=3, label=name)
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="weights", ylabel="validation loss above the float32 twin, nats")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def draw_stiffness(results: Results, path: pathlib.Path) -> None:
    """What a rate per row and stiffness cost AdamW, and what stiffness costs the arm that has less of it."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    places = [place for place in results.places if place[0] == TABLE_SIZE]
    for label, color in (("AdamW", "tab:blue"), ("its twin", "tab:orange")):
        points = []
        for i, name in enumerate(GPT_ARMS):
            reference = "adamw" if label == "AdamW" else ARMS[name].twin
            if reference != "adamw" or label == "AdamW":
                points += [(*results.gap(place, name, reference)[:2], i) for place in places if results.of(place, name)]
        if points:
            average, half, row = np.transpose(points)
            axes.errorbar(average, row, xerr=half, fmt="o", capsize=3, color=color, label=f"above {label}")
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set(
        yticks=range(len(GPT_ARMS)),
        yticklabels=GPT_ARMS,
        xlabel="validation loss, nats",
        ylim=(len(GPT_ARMS) - 0.5, -0.5),
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_formats(results: Results, path: pathlib.Path) -> None:
    """What stiffness costs AdamW, by task, format and place. Bold: counting all comparisons."""
    places = [place for place in results.places if place[0] in SMALL_TASKS and results.of(place, FORMAT_ARMS[-1])]
    if not places:
        return
    figure = Figure(figsize=(5.5 * len(places) + 1, 4), layout="constrained")
    for axes, place in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        gaps = stiffness_gaps(results, place)
        axes.imshow(np.nan_to_num(gaps[..., 0], nan=1), cmap="RdBu_r", vmin=-0.1, vmax=0.1, aspect="auto")
        for (i, j), average in np.ndenumerate(gaps[..., 0]):
            text = f"{average:+.3f}" if np.isfinite(average) else "diverged"
            weight = "bold" if not abs(average) <= gaps[i, j, 1] else None
            color = "black" if abs(average) < 0.07 else "white"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, weight=weight, color=color)
        axes.set_xticks(range(len(STIFFENED)), [name.replace(", ", ",\n") for name in STIFFENED], fontsize=7)
        axes.set_yticks(range(len(FAMILY)), FAMILY)
        axes.set_title(place[0])
    figure.suptitle("validation loss above AdamW with the same rounding, nats (bold: at 5 % over all)", fontsize=9)
    figure.savefig(path, dpi=150)
