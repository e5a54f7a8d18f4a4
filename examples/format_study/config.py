"""What a study runs: one frozen configuration, and what all of its parts call things."""

import argparse
import dataclasses
import difflib
import functools
import json
import pathlib
from typing import Any

import numpy as np
import yaml

import altgrad_jax as ag

# AltGrad's family, from a uniform grid to powers of two; the hardware's 8-bit formats; two of 16 bits.
FORMATS = (
    *("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"),
)
SAME_GRID = ("float8_e4m3fnuz", "float8_e4m3b11fnuz")  # As one that is run, under a free scale.
OPTIMIZERS = ("adamw", "before", "after", "both", "grid_sgd")
STORAGES = ("float32", "master", "stochastic", "fraction8")
# Signed ULPs moved since the start.
HISTOGRAM_EDGES = (-np.inf, -100.0, -30.0, -10.0, -3.0, -0.5, 0.5, 3.0, 10.0, 30.0, 100.0, np.inf)
FIRST_SELECTION_SEED = 1000  # Evaluation seeds start at 0.


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """All that decides the result of a study."""

    tasks: tuple[str, ...] = ("char_lm", "digits")  # Or files: text to learn, or .npz with x [n, ...] and labels y [n].
    formats: tuple[str, ...] = FORMATS
    optimizers: tuple[str, ...] = OPTIMIZERS
    storages: tuple[str, ...] = STORAGES
    seeds: int = 20  # Fresh ones, the same for every arm.
    selection_seeds: int = 2  # Of the choice of the learning rate.
    learning_rates: int = 5  # Neighbouring powers of two that are tried at once.
    freeze_seeds: int = 2  # Of the comparison of predicted and observed freezing.
    steps: int = 640
    segments: int = 8  # Parts of a run, each of which is measured.
    batch_size: int = 64
    warm_up: float = 0.1  # Share of the steps, linear; a cosine to zero follows.
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_steps: int = 10  # Of grid_sgd, per update.

    def __post_init__(self):
        for name, known in (("optimizers", OPTIMIZERS), ("storages", STORAGES)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} must be of {', '.join(known)}, got {value!r}.")
        for name in self.formats:
            ag.as_format(name)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and not (value and len(set(value)) == len(value)):
                raise ValueError(f"{field.name} must name one thing or more, each once, got {value}.")
        for name in ("seeds", "learning_rates", "segments", "batch_size", "max_steps", "selection_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if self.learning_rates < 3:
            raise ValueError(f"learning_rates must be >= 3, to have a best one between two, got {self.learning_rates}.")
        if self.freeze_seeds < 0:
            raise ValueError(f"freeze_seeds must be >= 0, got {self.freeze_seeds}.")
        if self.steps % self.segments or self.steps < 2 * self.segments:
            raise ValueError(f"steps must be a multiple of segments and at least twice that, got {self.steps}.")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up must be in [0, 1), got {self.warm_up}.")

    @property
    def lanes(self) -> int:
        """Runs that one compiled call trains side by side."""
        return self.learning_rates * self.selection_seeds

    @property
    def segment_steps(self) -> int:
        return self.steps // self.segments


QUICK = {
    "formats": ("E0M7", "E1M6", "E4M3", "E7M0"),
    "optimizers": ("adamw", "before", "after"),
    "storages": ("float32", "master", "stochastic"),
    "tasks": ("digits",),
    "seeds": 3,
    "selection_seeds": 1,
    "learning_rates": 3,
    "freeze_seeds": 1,
    "steps": 96,
    "segments": 4,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field, a file for several, and `--quick`."""
    parser.add_argument("--config", type=pathlib.Path, help="YAML or JSON file of fields; options override it")
    parser.add_argument("--quick", action="store_true", help="a small study, in less than two minutes")
    group = parser.add_argument_group("configuration")
    for field in dataclasses.fields(StudyConfig):
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, tuple):
            group.add_argument(option, nargs="+", metavar="NAME", help=f"default: {' '.join(field.default)}")
        else:
            group.add_argument(option, type=type(field.default), help=f"default: {field.default}")


def configuration(args: argparse.Namespace) -> StudyConfig:
    """The defaults, overridden by `--quick`, by the file, by options, in this order."""
    chosen = dict(QUICK) if args.quick else {}
    if args.config:
        chosen |= _from_file(args.config)
    names = [field.name for field in dataclasses.fields(StudyConfig)]
    chosen |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return from_dict(chosen)


def from_dict(fields: dict[str, Any]) -> StudyConfig:
    """A configuration of named fields; raises for names and types that it does not have."""
    defaults = {field.name: field.default for field in dataclasses.fields(StudyConfig)}
    for name, value in fields.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            raise ValueError(f"there is no field {name!r}" + (f": did you mean {near[0]!r}?" if near else "."))
        wanted = defaults[name]
        if isinstance(wanted, tuple):
            good = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        else:
            good = not isinstance(value, bool) and isinstance(value, (int, type(wanted)))
        if not good:
            raise ValueError(f"{name} must be like {wanted!r}, got {value!r}.")
    return StudyConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})


def _from_file(path: pathlib.Path) -> dict[str, Any]:
    text = path.read_text("utf-8")
    fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold fields and their values, got {type(fields).__name__}.")
    return fields


@functools.cache
def shape_of_grid(format: str) -> tuple:
    """What is left of an 8-bit grid when a power of two may multiply it: equal where a free scale makes grids one."""
    f = ag.as_format(format)
    if f.bits > 8:
        return (format,)
    numbers = np.asarray(ag.value(np.arange(1, f.max_index + 1, dtype=np.float32), f), np.float64)
    return tuple(numbers / numbers[0])


def same_grid(format: str) -> list[str]:
    """The other names for the grid of a format, under a free scale."""
    return [f for f in (*FORMATS, *SAME_GRID) if f != format and shape_of_grid(f) == shape_of_grid(format)]
