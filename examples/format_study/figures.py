"""Pictures of a study, as bytes of PNG files."""

import io
import itertools

import numpy as np
from analysis import Study, mean_of, middle_of
from arms import Arm
from config import HISTOGRAM_EDGES
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import altgrad_jax as ag

COLOURS = {"adamw": "0.15", "before": "#1f77b4", "after": "#d95f02", "both": "#2a9d4e", "grid_sgd": "#9467bd"}
SHOWN = ("E0M7", "E4M3", "E5M2", "E7M0", "float8_e4m3fn", "bfloat16")  # In small multiples, where a study has them.
LINEAR = 0.01  # Nats up to which the colours of gains are linear, logarithmic beyond.


def shown(study: Study) -> list[str]:
    return [name for name in SHOWN if name in study.config.formats] or list(study.config.formats[:6])


def gain_map(study: Study) -> bytes:
    """Gains over AdamW: formats by storages and optimizers, a panel for each task."""
    tasks, formats = study.config.tasks, study.config.formats
    columns = list(itertools.product(study.storages, study.variants))
    means = [gain.sample.mean for gain in study.gains.values() if gain.seeds]
    largest = max([2 * LINEAR, *np.abs(means)])
    norm = colors.SymLogNorm(LINEAR, vmin=-largest, vmax=largest)
    size = (2.4 + 0.56 * len(columns), 0.6 + (0.8 + 0.27 * len(formats)) * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
    for axes, task in zip(grid, tasks, strict=True):
        values = np.full((len(formats), len(columns)), np.nan)
        for i, j in np.ndindex(values.shape):
            storage, optimizer = columns[j]
            arm = Arm(task, formats[i], optimizer, storage)
            if arm in study.gains and study.gains[arm].seeds:
                values[i, j] = study.gains[arm].sample.mean
                text = _short(values[i, j]) + "*" * (study.sign(arm) != 0)
                dark = abs(norm(values[i, j]) - 0.5) > 0.36
                weight = "bold" if study.sign(arm) else "normal"
                axes.text(j, i, text, ha="center", va="center", size=6.5, weight=weight, color="w" if dark else "k")
        image = axes.imshow(values, cmap="RdBu", norm=norm, aspect="auto")
        axes.set_facecolor("0.9")
        axes.set_xticks(range(len(columns)), [optimizer for _, optimizer in columns], rotation=60, ha="right", size=8)
        axes.set_yticks(range(len(formats)), [_labelled(study, name) for name in formats], size=8)
        for k, storage in enumerate(study.storages):
            centre = (k + 0.5) * len(study.variants) - 0.5
            axes.annotate(storage, (centre, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", size=8)
            axes.axvline((k + 1) * len(study.variants) - 0.5, color="k", lw=1)
        axes.set_title(task, size=10, pad=16)
    bar = figure.colorbar(image, ax=grid, pad=0.01, aspect=40)
    bar.set_label("nats better (blue) or worse (red) than AdamW", size=8)
    bar.ax.tick_params(labelsize=7)
    return _png(figure)


def curves(study: Study, task: str, quantity: str, label: str) -> bytes:
    """What runs measured over training: storages by formats, a line for each optimizer, means over seeds."""
    formats, storages = shown(study), study.storages
    size = (1 + 1.75 * len(formats), 0.6 + 1.5 * len(storages))
    figure = Figure(figsize=size, layout="constrained")
    loss = quantity == "losses"
    panels = figure.subplots(
        len(storages), len(formats), squeeze=False, sharex=True, sharey=not loss, subplot_kw={"box_aspect": 0.75}
    )
    share = np.arange(1, study.config.segments + 1) / study.config.segments
    for (i, storage), (j, name) in itertools.product(enumerate(storages), enumerate(formats)):
        axes = panels[i, j]
        for optimizer in study.config.optimizers:
            lines = study.evaluated.get(Arm(task, name, optimizer, storage))
            if lines:
                axes.plot(share, mean_of(lines, quantity), color=COLOURS[optimizer], lw=1.3, label=optimizer)
        lines = study.evaluated.get(Arm(task, name, "adamw", "float32"))
        if lines and loss:
            axes.plot(share, mean_of(lines, quantity), color="0.5", lw=1, ls="--", label="float32 adamw")
        if loss and axes.lines:
            # The last steps, as the first ones are so much higher that optimizers would look alike.
            last = np.concatenate([line.get_ydata()[study.config.segments // 3 :] for line in axes.lines])
            last = last[np.isfinite(last)]
            if len(last):
                margin = 0.05 * np.ptp(last) + 1e-3
                axes.set_ylim(last.min() - margin, last.max() + margin)
        _plain(axes, title=name if i == 0 else "", ylabel=storage if j == 0 else "")
    _legend(figure, panels, f"{label}, {task}")
    return _png(figure)


def health(study: Study, task: str) -> bytes:
    """Final measurements of every format: a row each, a column for each storage, a mark for each optimizer."""
    rows = {
        "stable_rank": "stable rank",
        "effective_rank": "effective rank",
        "entropy": "entropy, bits",
        "subnormal": "subnormal share",
        "saturated": "saturated share",
        "correlations": "gradient-stiffness\ncorrelation",
    }
    formats, storages = study.config.formats, study.storages
    size = (1 + (0.22 * len(formats) + 0.4) * len(storages), 1.4 + 1.15 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rows), len(storages), squeeze=False, sharex=True, sharey="row")
    for (i, quantity), (j, storage) in itertools.product(enumerate(rows), enumerate(storages)):
        axes, read = panels[i, j], middle_of if quantity == "correlations" else mean_of
        for k, optimizer in enumerate(study.config.optimizers):
            found = [(x, study.evaluated.get(Arm(task, name, optimizer, storage))) for x, name in enumerate(formats)]
            found = [(x + 0.13 * (k - 2), float(read(lines, quantity))) for x, lines in found if lines]
            if found:
                axes.plot(*zip(*found, strict=True), "o", ms=3, color=COLOURS[optimizer], label=optimizer)
        axes.set_xticks(range(len(formats)), formats, rotation=90)
        axes.grid(axis="x", lw=0.3)
        _plain(axes, title=storage if i == 0 else "", ylabel=rows[quantity] if j == 0 else "")
    _legend(figure, panels, f"Final weights, {task}")
    return _png(figure)


def histograms(study: Study, task: str) -> bytes:
    """Steps of the grid moved since the start: formats by storages, in each panel all segments of each optimizer."""
    formats, storages, optimizers = shown(study), study.storages, study.config.optimizers
    size = (1.4 + (0.5 * len(optimizers) + 0.3) * len(storages), 0.8 + 1.35 * len(formats))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(formats), len(storages), squeeze=False, sharex=True, sharey=True)
    bins, segments = len(HISTOGRAM_EDGES) - 1, study.config.segments
    for (i, name), (j, storage) in itertools.product(enumerate(formats), enumerate(storages)):
        shares = np.full((bins, segments * len(optimizers)), np.nan)
        for k, optimizer in enumerate(optimizers):
            lines = study.evaluated.get(Arm(task, name, optimizer, storage), [])
            counts = [line["ulp_histogram"] for line in lines if "ulp_histogram" in line]
            if counts:
                counts = np.array(counts[0], np.float64)
                shares[:, k * segments : (k + 1) * segments] = (counts / counts.sum(1, keepdims=True)).T
        axes = panels[i, j]
        image = axes.imshow(shares, cmap="magma_r", norm=colors.PowerNorm(0.5, 0, 1), aspect="auto", origin="lower")
        for k in range(1, len(optimizers)):
            axes.axvline(k * segments - 0.5, color="0.4", lw=0.8)
        centres = [(k + 0.5) * segments - 0.5 for k in range(len(optimizers))]
        axes.set_xticks(centres, optimizers, size=7, rotation=25)
        axes.set_yticks(np.arange(1, bins) - 0.5, [f"{edge:+g}" for edge in HISTOGRAM_EDGES[1:-1]], size=5.5)
        axes.set_title(storage if i == 0 else "", size=9)
        axes.set_ylabel(name if j == 0 else "", size=8)
    figure.colorbar(image, ax=panels, aspect=40, pad=0.01).set_label("share of the weights", size=8)
    figure.suptitle(f"Grid steps moved since the start, over training, {task}", size=10)
    return _png(figure)


def freezing(study: Study, task: str) -> bytes:
    """Weights that have stopped for good: predicted from a float32 run, and observed on the grid."""
    formats = [name for name in study.config.formats if Arm(task, name, "adamw", "nearest") in study.arms["freeze"]]
    columns = min(7, len(formats))
    rows = -(-len(formats) // columns)
    figure = Figure(figsize=(1 + 1.55 * columns, 0.9 + 1.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    share = np.arange(1, study.config.segments + 1) / study.config.segments
    for axes, name in itertools.zip_longest(panels.flat, formats):
        if name is None:
            axes.set_axis_off()
            continue
        lines = study.arms["freeze"][Arm(task, name, "adamw", "nearest")]
        axes.plot(share, mean_of(lines, "predicted_frozen"), color="#1f77b4", ls="--", label="predicted")
        axes.plot(share, mean_of(lines, "observed_frozen"), color="0.15", label="observed")
        axes.set_ylim(-0.03, 1.03)
        _plain(axes, title=name)
    _legend(figure, panels, f"Share of weights that have stopped for good, over training, {task}")
    return _png(figure)


def against_mantissa(study: Study, task: str) -> bytes:
    """Gains by mantissa bits of AltGrad's 8-bit formats, with corrected intervals; a panel for each storage."""
    storages = study.storages
    figure = Figure(figsize=(1 + 3.3 * len(storages), 3.2), layout="constrained")
    panels = figure.subplots(1, len(storages), squeeze=False)
    for axes, storage in zip(panels[0], storages, strict=True):
        for k, optimizer in enumerate(study.variants):
            arms = study.compared(study.formats(altgrad=True), task, storage, optimizer)
            bits = [ag.as_format(arm.format).mantissa_bits + 0.12 * (k - 1.5) for arm in arms]
            means = [study.gains[arm].sample.mean for arm in arms]
            ends = [study.gains[arm].sample.interval(study.comparisons)[1] for arm in arms]
            errors = np.nan_to_num(np.subtract(ends, means))
            if arms:
                axes.errorbar(bits, means, errors, fmt="o", ms=3.5, lw=1, color=COLOURS[optimizer], label=optimizer)
        axes.axhline(0, color="0.5", lw=0.8)
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.set_xlabel("mantissa bits", size=8)
        _plain(axes, title=storage)
    panels[0, 0].set_ylabel("gain over AdamW, nats", size=8)
    _legend(figure, panels, f"Gain and mantissa bits, {task}")
    return _png(figure)


def _labelled(study: Study, name: str) -> str:
    return f"{name} (= {study.duplicates[name]})" if name in study.duplicates else name


def _short(value: float) -> str:
    """Two significant digits or three decimals, without a leading zero."""
    text = f"{value:+.1f}" if abs(value) >= 1 else f"{value:+.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _plain(axes: Axes, title: str = "", ylabel: str = "") -> None:
    axes.tick_params(labelsize=6.5)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, size=8.5)
    if ylabel:
        axes.set_ylabel(ylabel, size=8)


def _legend(figure: Figure, panels: np.ndarray, title: str) -> None:
    """A title, and one legend for all panels."""
    found = {}
    for axes in panels.flat:
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, size=10)
    if found:
        figure.legend(found.values(), found, loc="outside lower center", ncols=len(found), fontsize=8, frameon=False)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
