"""What a study runs: one frozen configuration, and what all of its parts call things."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import json
import pathlib
from typing import Any

import numpy as np
import yaml

import altgrad_jax as ag

# AltGrad's family, from a uniform grid to powers of two; the hardware's 8-bit formats; two of 16 bits. Under a free
# scale float8_e4m3fnuz and float8_e4m3b11fnuz are E4M3, and float8_e5m2fnuz is float8_e5m2 with one binade more.
FORMATS = (
    *("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"),
)
OPTIMIZERS = ("adamw", "before", "after", "both", "grid_sgd")
STORAGES = ("float32", "master", "stochastic", "fraction8")
CONTROL = "unrounded"  # Storage of a study that asks what stiffness does without a grid.
# Signed ULPs moved since the start; an edge belongs to the bin above it.
HISTOGRAM_EDGES = (-np.inf, -100.0, -30.0, -10.0, -3.0, -0.5, 0.5, 3.0, 10.0, 30.0, 100.0, np.inf)
FIRST_SELECTION_SEED = 1000  # Evaluation seeds start at 0.
LEAST = {"learning_rates": 3, "freeze_seeds": 0}  # A best rate lies between two others. Of other whole numbers: 1.


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """All that decides the result of a study."""

    tasks: tuple[str, ...] = ("char_lm", "digits")  # Or files: text to learn, or .npz with x [n, ...] and labels y [n].
    formats: tuple[str, ...] = FORMATS
    optimizers: tuple[str, ...] = OPTIMIZERS
    storages: tuple[str, ...] = STORAGES
    seeds: int = 20  # Fresh ones, the same for every arm.
    selection_seeds: int = 2  # Of the choice of the learning rate.
    learning_rates: int = 5  # Neighbouring ones that are tried at once.
    rates_per_octave: int = 1  # Learning rates are powers of two, or of its root of this degree.
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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and not (value and len(set(value)) == len(value)):
                raise ValueError(f"{field.name} must name one thing or more, each once, got {value}.")
            if isinstance(value, int) and value < LEAST.get(field.name, 1):
                raise ValueError(f"{field.name} must be >= {LEAST.get(field.name, 1)}, got {value}.")
        for name, known in (("optimizers", OPTIMIZERS), ("storages", (*STORAGES, CONTROL))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} must be of {', '.join(known)}, got {value!r}.")
        if "adamw" not in self.optimizers:
            raise ValueError(f"optimizers must hold adamw, which the others are compared with, got {self.optimizers}.")
        if self.storages == ("float32",):
            raise ValueError("storages must hold one that knows the grid, got float32 alone.")
        for name in self.formats:
            if ag.as_format(name).bits not in (8, 16):
                raise ValueError(f"formats must have 8 or 16 bits, got {name}.")
        if self.steps % self.segments or self.steps < 2 * self.segments:
            raise ValueError(f"steps must be a multiple of segments and at least twice that, got {self.steps}.")
        for name in ("warm_up", "b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")

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
    for name in fields:
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            raise ValueError(f"unknown field {name!r}" + (f": did you mean {near[0]!r}?" if near else "."))
    return StudyConfig(**{name: _as(defaults[name], name, value) for name, value in fields.items()})


def _as(wanted: Any, name: str, value: Any) -> Any:
    """A value of the type of the one that is wanted."""
    if isinstance(wanted, tuple) and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if isinstance(wanted, float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, TypeError):  # YAML reads 1e-8 as text.
            return float(value)
    if isinstance(wanted, int) and isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} must be like {wanted!r}, got {value!r}.")


def _from_file(path: pathlib.Path) -> dict[str, Any]:
    text = path.read_text("utf-8")
    try:
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
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
