"""What every study needs: runs as lines of JSON that a restart finds again, a search for the learning rate, and pairs.

A run is a dictionary: what was trained (its names) and what came out (its results). Two runs with the same names are
the same run. The names hold JAX's version and the kind of device; the first line of every start of a study holds the
commit, the versions and the machine.
"""

import concurrent.futures
import importlib.metadata
import json
import lzma
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from scipy import special
from tqdm import tqdm

Run = dict


class Store:
    """Runs in a file of JSON lines, `name.jsonl`, after those of `name.jsonl.xz`, which the repository keeps.

    An arm that changes needs another name, or a file without its old lines: they would be taken for its own.
    """

    def __init__(self, path: pathlib.Path, results: Iterable[str]):
        self.path, self.results = path, frozenset(results)
        self.lock = threading.Lock()
        self.runs: dict[str, Run] = {}
        self.starts: list[Run] = []
        for line in _lines(path):
            self._keep(line)

    def _keep(self, run: Run) -> None:
        if "commit" in run:
            if run not in self.starts:
                self.starts.append(run)
        else:
            self.runs[self.identity(run)] = run

    def identity(self, run: Run) -> str:
        return json.dumps({name: run[name] for name in sorted(run) if name not in self.results})

    def find(self, names: Run) -> Run | None:
        return self.runs.get(self.identity(names))

    def add(self, run: Run) -> None:
        """Writes a run at once: what is interrupted loses nothing else."""
        with self.lock:
            self._keep(run)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(run) + "\n")

    def pack(self) -> pathlib.Path:
        """Compresses all runs into `name.jsonl.xz`, for the repository."""
        packed = self.path.with_name(self.path.name + ".xz")
        moved = self.path.with_name(self.path.name + ".packing")
        if self.path.exists():  # Out of the way of a study that goes on.
            self.path.rename(moved)
            for line in _lines(moved):
                self._keep(line)
        text = "".join(json.dumps(run) + "\n" for run in (*self.starts, *self.runs.values()))
        packed.write_bytes(lzma.compress(text.encode(), preset=9))
        moved.unlink(missing_ok=True)
        return packed


def _lines(path: pathlib.Path) -> Iterable[Run]:
    packed = path.with_name(path.name + ".xz")
    texts = [lzma.decompress(packed.read_bytes()).decode()] if packed.exists() else []
    if path.exists():
        texts.append(path.read_text())
        if not texts[-1].endswith("\n"):  # A kill cut the last line off.
            with path.open("a") as file:
                file.write("\n")
    for line in "".join(text + "\n" for text in texts).splitlines():
        try:
            if line:
                yield json.loads(line)
        except json.JSONDecodeError:
            print(f"left out a broken line of {path}: {line[:40]}...", file=sys.stderr)


def provenance() -> Run:
    """Where the following runs come from."""
    root = pathlib.Path(__file__).parents[2]
    try:
        git = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:
        commit = ""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")}
    machine = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "python": platform.python_version()}
    return {"commit": commit or "unknown", **versions, **machine, "time": time.strftime("%Y-%m-%d %H:%M")}


def lowest(losses: Callable[[list[int]], list[float]], center: int, limit: int = 10) -> int:
    """The exponent of sqrt(2) with the lowest loss: of powers of 2 around the center, then of the two beside the best.

    `losses` takes all exponents of a round at once. The search goes on while the best one is the first or the last.
    """
    values: dict[int, float] = {}
    wanted = [center - 2, center, center + 2]
    while wanted:
        values |= zip(wanted, losses(wanted), strict=True)
        best = min(values, key=values.__getitem__)
        wanted = [k for k in (best - 2, best + 2) if k not in values and abs(k - center) <= limit]
    values |= zip((best - 1, best + 1), losses([best - 1, best + 1]), strict=True)
    return min(values, key=values.__getitem__)


def gap(runs: dict[int, float], reference: dict[int, float], comparisons: int = 1) -> tuple[float, float, int]:
    """Mean of the differences over common seeds, the half width of its 95 % interval, and their number."""
    return interval([runs[seed] - reference[seed] for seed in runs if seed in reference], comparisons)


def interval(values: list[float], comparisons: int = 1) -> tuple[float, float, int]:
    """Mean, half width of its 95 % interval (Student), for so many comparisons at once (Bonferroni), and number."""
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan"), float("nan"), len(values)
    half = special.stdtrit(len(values) - 1, 1 - 0.025 / comparisons) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half), len(values)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def in_threads(jobs: list[Callable[[], None]], workers: int) -> None:
    """Runs the jobs of one process: on an accelerator one arm compiles while another one trains."""
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(jobs), desc="compiling, training", unit="arm") as bar,
    ):
        for future in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            future.result()
            bar.update()


def in_processes(function: Callable, jobs: list[tuple], workers: int) -> None:
    """Runs `function(*job)` in processes of one core each: one thread of XLA has no use for more at these sizes."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for i in range(workers):
        cores.put(available[i % len(available)])
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (cores,))
    with pool, tqdm(total=len(jobs), desc="compiling, training", unit="arm") as bar:
        for future in concurrent.futures.as_completed([pool.submit(function, *job) for job in jobs]):
            future.result()
            bar.update()


def _start_worker(cores) -> None:
    """Gives a worker one core of its own, and ends it when the process that started it is killed."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    parent = multiprocessing.parent_process().sentinel

    def follow():
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
