"""HTML page, Markdown summary and a picture of what a study has found so far.

    $ python examples/format_study/report.py                          # of results/study.jsonl
    $ python examples/format_study/report.py out/quick_study.jsonl    # of `study.py --quick`

Needs nothing but the JSONL file, which may be incomplete: the page says what is missing. Page and summary go next to
the file, and so does the picture, except that of results/study.jsonl, which goes to docs/images.
"""

import argparse
import collections
import dataclasses
import itertools
import os
import pathlib

import figures
import numpy as np
import verdicts
from analysis import Study, mean_of, middle_of, prefix, read, spearman
from answer import answer, gain_cells, hypotheses, progress
from arms import Arm
from page import Cell, Picture, Section, Table, to_html, to_markdown
from verdicts import interval_text, listed

import altgrad_jax as ag

RESULTS = pathlib.Path(__file__).parent / "results" / "study.jsonl"
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "images"
TITLE = "Which 8-bit format gains most from updates that know its geometry?"
ARM = ("task", "storage", "format", "optimizer")


def sections(study: Study) -> list[Section]:
    """The report, in order."""
    return [
        answer(study),
        hypotheses(study),
        gains(study),
        losses(study),
        training_curves(study),
        weights(study),
        movements(study),
        freezing(study),
        reasons(study),
        bench(study),
        power(study),
        failures(study),
        origin(study),
    ]


def gains(study: Study) -> Section:
    columns = ("format", *study.variants)
    blocks = [
        "Gain: validation loss of AdamW minus that of the variant, in nats, of the same task, format, storage and "
        "seed, each at its own best learning rate. Mean over seeds, and a 95 % interval by t. The corrected interval "
        f"holds for all {study.comparisons} comparisons of the study at once (Bonferroni), and so do Holm's p-values. "
        f"{_same(study)} Intervals are over seeds, of one set of validation examples, at the learning rates that other "
        "seeds chose. How much a finer grid of learning rates might take from a loss is estimated by a parabola "
        "through the chosen rate and its neighbours: a gain or loss counts as certain where its corrected interval "
        "excludes zero by more than that."
    ]
    for task, storage in study.places():
        cells = {f: [_pivot(study, Arm(task, f, o, storage)) for o in study.variants] for f in study.config.formats}
        rows = [(name, *row) for name, row in cells.items()]
        blocks.append(Table(f"Gain, {task}, {storage}. A star: certain.", columns, rows))
    rows = []
    for arm, gain in study.gains.items():
        cells = gain_cells(study, gain)
        keys = f"`{gain.keys[0]}`", f"`{gain.keys[1]}`", gain.seeds_text
        p = f"{gain.sample.p:.2g}", f"{study.holm[arm]:.2g}"
        pair = dataclasses.replace(arm, optimizer="adamw"), arm
        p += *(f"{study.left.get(a, np.nan):.4f}" for a in pair), str(len(gain.failed))
        rows.append((arm.task, arm.storage, arm.format, arm.optimizer, *cells, *p, *keys))
    numbers = "gain", "95 %", "corrected", "p", "Holm p", "left to AdamW", "left to variant", "not finite"
    columns = *ARM, *numbers, "AdamW", "variant", "seeds"
    caption = (
        "All gains. Each is the mean over seeds of `loss` in line AdamW/seed minus `loss` in line variant/seed. Left: "
        "what a finer grid of learning rates might take from the loss of either."
    )
    return Section("Gains", [*blocks, Table(caption, columns, rows, in_markdown=False)])


def losses(study: Study) -> Section:
    rows = []
    for arm, lines in study.evaluated.items():
        gap = study.gaps.get(arm)
        finite = sum(line["loss"] is not None for line in lines)
        loss, accuracy = mean_of(lines, "loss"), mean_of(lines, "accuracies")[-1]
        compared = (f"{gap.sample.mean:+.5f}", interval_text(gap.sample.interval())) if gap else ("-", "-")
        numbers = f"{loss:.5f}", *compared, f"{accuracy:.4f}", f"{finite} of {len(lines)}"
        key = f"`{prefix(lines[0])}`", f"`{gap.keys[1]}`" if gap else "-"
        rows.append((arm.task, arm.storage, arm.format, arm.optimizer, *numbers, *key))
    columns = ("loss", "gap", "95 %", "accuracy", "finite", "lines", "float32")
    text = "Validation loss at the end, and its gap to AdamW on float32 weights that know no grid, paired by seed."
    return Section("Losses and gaps to float32", [Table(text, (*ARM, *columns), rows, in_markdown=False)])


def training_curves(study: Study) -> Section:
    quantities = {
        "losses": "Validation loss",
        "stall_rates": "Stall rate: of the weights that were to move, the stored ones that stay",
        "flip_rates": "Flip rate: of the weights that were to move, those of the forward pass that do",
        "descent_quality": "Descent quality: the movement made, projected on the one meant, of each segment",
    }
    blocks = [
        "Means over seeds. Rates are those of the last step of a segment; its learning rate is almost zero at the end."
    ]
    for task, (quantity, label) in itertools.product(study.config.tasks, quantities.items()):
        blocks.append(Picture(f"{label}, {task}.", figures.curves(study, task, quantity, label)))
    return Section("Training", blocks)


def weights(study: Study) -> Section:
    final = ("stable_rank", "effective_rank", "variance_rank", "codes_used", "entropy", "saturated", "subnormal")
    rates = ("stall_rates", "flip_rates", "descent_quality", "correlations")
    rows = []
    for arm, lines in study.evaluated.items():
        numbers = [*(mean_of(lines, name) for name in final), *(middle_of(lines, name) for name in rates)]
        numbers = [f"{x:.4g}" for x in numbers]
        rows.append((arm.task, arm.storage, arm.format, arm.optimizer, *numbers, f"`{prefix(lines[0])}`"))
    words = [name.replace("_", " ") for name in (*final, "stall rate", "flip rate", "descent quality", "correlation")]
    caption = (
        "Means over seeds: ranks (over matrices), codes used and their entropy in bits, saturated and subnormal shares "
        "of the final weights; rates and the gradient-stiffness correlation over the middle half of the training."
    )
    pictures = [Picture(f"Final weights, {task}.", figures.health(study, task)) for task in study.config.tasks]
    table = Table(caption, (*ARM, *words, "lines"), rows, in_markdown=False)
    return Section("Rank, capacity and stiffness", [*pictures, table])


def movements(study: Study) -> Section:
    text = (
        "Of seed 0: the share of the weights by signed grid steps since the start, on the grid of the start. A whole "
        "number at an edge belongs to the bin above it, so that whole steps look a little lopsided."
    )
    pictures = [Picture(f"Grid steps moved, {task}.", figures.histograms(study, task)) for task in study.config.tasks]
    return Section("ULP positions over training", [text, *pictures])


def freezing(study: Study) -> Section:
    rows, pictures = [], []
    for arm, lines in study.arms["freeze"].items():
        never = [mean_of(lines, f"{name}_never") for name in ("predicted", "observed")]
        frozen = [middle_of(lines, f"{name}_frozen") for name in ("predicted", "observed")]
        numbers = [f"{x:.4f}" for x in (*never, never[0] - never[1], *frozen, frozen[0] - frozen[1])]
        numbers.append(f"{mean_of(lines, 'loss'):.4f}")
        rows.append((arm.task, arm.format, *numbers, f"`{prefix(lines[0])}`", str(len(lines))))
    for task in sorted({arm.task for arm in study.arms["freeze"]}, key=study.config.tasks.index):
        pictures.append(Picture(f"Predicted and observed freezing, {task}.", figures.freezing(study, task)))
    text = (
        "Predicted from the trajectory of AdamW on float32 weights; observed with AdamW on the grid, rounded to "
        "nearest. Never: weights that never move. Frozen: weights that have stopped for good, over the middle half."
    )
    halves = [f"{kind}, {source}" for kind in ("never", "frozen") for source in ("predicted", "observed", "difference")]
    columns = ("task", "format", *halves, "loss", "lines", "seeds")
    return Section("Freezing: predicted and observed", [Table(text, columns, rows), *pictures])


def reasons(study: Study) -> Section:
    measures = {
        "mantissa bits": lambda lines: ag.as_format(lines[0]["format"]).mantissa_bits,
        "flip rate": lambda lines: middle_of(lines, "flip_rates"),
        "entropy": lambda lines: float(mean_of(lines, "entropy")),
        "subnormal share": lambda lines: float(mean_of(lines, "subnormal")),
    }
    rows, clearest = [], None
    for (task, storage), optimizer in itertools.product(study.places(), study.variants):
        arms = study.compared(study.formats(), task, storage, optimizer)
        if len(arms) < 4:
            continue
        y = [study.gains[arm].sample.mean for arm in arms]
        adamw = [study.evaluated[Arm(task, arm.format, "adamw", storage)] for arm in arms]
        found = {name: spearman(map(measure, adamw), y) for name, measure in measures.items()}
        rows.append((task, storage, optimizer, str(len(arms)), *(f"{rho:+.2f}" for rho in found.values())))
        strongest = max(found, key=lambda name: np.nan_to_num(abs(found[name])))
        if clearest is None or abs(found[strongest]) > abs(clearest[0]):
            clearest = found[strongest], f"{strongest} with `{optimizer}`, {storage}, {task}"
    text = (
        "Rank correlations (Spearman) over the different 8-bit formats, of the mean gain with what a format is, or "
        "with what AdamW measured in it. These are observations of few formats, whose properties go together: they "
        "suggest causes, and show none. Among so many, a strong one by chance is to be expected. Beware of the scales: "
        "8-bit formats have one per row, so that in a uniform one (E0M7), whose spacing is the same all over a row, "
        "stiffness after Adam is a learning rate per row, and nothing else; what another format gains more than E0M7 "
        "is due to the shape of its grid."
    )
    blocks = [text, f"The strongest is {clearest[0]:+.2f}, of {clearest[1]}."] if clearest else [text]
    blocks.append(Table("Rank correlation of the gain.", ("task", "storage", "optimizer", "formats", *measures), rows))
    for task in study.config.tasks:
        blocks.append(Picture(f"Gain and mantissa bits, {task}.", figures.against_mantissa(study, task)))
    return Section("Why", blocks)


def bench(study: Study) -> Section:
    words = {True: "PASS", False: "FAIL", None: "nothing to compare yet"}
    rows = [(check.name, words[check.passed], check.detail) for check in verdicts.checks(study)]
    table = Table("What must hold if the study is right.", ("check", "result", "detail"), rows)
    return Section("Checks of the bench", [table])


def power(study: Study) -> Section:
    rows = []
    for task, storage in study.places():
        samples = [g.sample for arm, g in study.gains.items() if (arm.task, arm.storage) == (task, storage)]
        samples = [sample for sample in samples if len(sample.values) > 1]
        if samples:
            single, corrected = ([s.detectable(n) for s in samples] for n in (1, study.comparisons))
            numbers = [np.median(single), max(single), np.median(corrected), max(corrected)]
            deviation = np.median([s.deviation for s in samples])
            rows.append((task, storage, str(len(samples)), f"{deviation:.5f}", *(f"{x:.5f}" for x in numbers)))
    caption = (
        "The smallest true gain, in nats, that is found with 80 % power by a two-sided t-test at 5 %: as a single "
        f"comparison, and as one of {study.comparisons}. From the deviation of paired differences, over all gains."
    )
    words = ("deviation, median", "single, median", "single, largest", "corrected, median", "corrected, largest")
    return Section("Power", [Table(caption, ("task", "storage", "gains", *words), rows)])


def failures(study: Study) -> Section:
    causes = collections.defaultdict(list)
    for line in study.lines:
        if line["failure"] is not None:
            key = line["key"] if line["kind"] == "failed" else prefix(line)
            causes[key, line["failure"]].append(str(line.get("seed", "-")))
    rows = [(f"`{key}`", cause, ", ".join(seeds)) for (key, cause), seeds in causes.items()]
    total = sum(map(len, causes.values()))
    blocks = [
        f"{total} of {len(study.lines)} lines are failures. A learning rate that diverges in the search is one of "
        "them; seeds without a finite loss are left out of a mean, and counted next to it."
    ]
    if rows:
        blocks.append(Table("Failures.", ("lines", "cause", "seeds"), rows))
    blocks.append(progress(study))
    absent = [(f"`{key}`", f"{have} of {wanted}") for key, have, wanted in verdicts.missing(study)]
    if absent:
        blocks.append(Table("Arms of the configuration without all their runs.", ("arm", "runs"), absent))
    return Section("Failures, and what was not run", blocks)


def origin(study: Study) -> Section:
    kinds = dict.fromkeys(line["kind"] for line in study.lines)
    seconds = sum(line["seconds"] for line in study.lines)
    of_kind = {kind: [line for line in study.lines if line["kind"] == kind] for kind in kinds}
    seeds = {kind: sorted({line["seed"] for line in some if "seed" in line}) for kind, some in of_kind.items()}
    fields = study.header["config"].items()
    rows = [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in fields]
    rows += [(f"fingerprint of {task}", value) for task, value in study.header["data"].items()]
    return Section(
        "Origin of the numbers",
        [
            "A line of the JSONL file has the key `task/format/optimizer/storage/select/2^k/seed` for a learning rate "
            "that was tried, `task/format/optimizer/storage/evaluate/2^k/seed` for an evaluation at the best one, and "
            "`task/format/adamw/nearest/freeze/seed` for freezing. Tables show keys without the seed, which is added "
            "after a slash; cells show those behind them under the pointer. Verdicts, correlations and power are made "
            "of the rows of the table of all gains, and of those of the table of losses, that have their task, storage "
            "and optimizer.",
            f"{len(study.lines)} lines ({', '.join(f'{len(some)} {kind}' for kind, some in of_kind.items())}), "
            f"{seconds:.0f} seconds. Seeds: {'; '.join(f'{kind} {listed(map(str, s))}' for kind, s in seeds.items())}.",
            Table("First line of the file.", ("field", "value"), [*rows, ("jax", study.header["jax"])]),
        ],
    )


def _pivot(study: Study, arm: Arm) -> str | Cell:
    if arm not in study.gains:
        return "-"
    gain = study.gains[arm]
    failed = f" ({len(gain.failed)} not finite)" * bool(gain.failed)
    star = "*" * (study.sign(arm) != 0)
    return Cell(f"{gain.sample.mean:+.4f}{star}{failed}", gain.source)


def _same(study: Study) -> str:
    pairs = [f"{name} is {earlier}" for name, earlier in study.duplicates.items()]
    return f"Formats that a free scale makes one grid are counted once: {listed(pairs)}." if pairs else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="?", type=pathlib.Path, default=RESULTS, help="JSONL; default: results/")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the report; default: that of the JSONL")
    args = parser.parse_args()
    try:
        report = sections(read(args.results))
        folder = args.out or args.results.parent
        folder.mkdir(parents=True, exist_ok=True)
        pictures = folder if args.out or args.results != RESULTS else DOCS
    except (OSError, ValueError) as error:
        parser.error(str(error))
    (folder / "report.html").write_text(to_html(TITLE, report), "utf-8")
    seen_from_page = pathlib.PurePath(os.path.relpath(pictures, folder)).as_posix()
    (folder / "report.md").write_text(to_markdown(TITLE, report, seen_from_page), "utf-8")
    for block in itertools.chain.from_iterable(section.blocks for section in report):
        if isinstance(block, Picture) and block.file:
            (pictures / block.file).write_bytes(block.png)
            print(f"picture: {pictures / block.file}")
    print(f"report: {folder / 'report.md'}, with all pictures {folder / 'report.html'}")


if __name__ == "__main__":
    main()
