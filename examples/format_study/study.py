"""Which 8-bit format gains most from updates that know its geometry? Trains a matrix of arms and appends every run.

    $ python examples/format_study/study.py            # all of it; 51 minutes on two cores
    $ python examples/format_study/study.py --quick    # the whole way in less than two minutes
    $ python examples/format_study/report.py           # HTML and Markdown of what is there

Formats x optimizers x storages x paired seeds, on a character language model and on digits, or on `--tasks FILE` of
text or .npz (arrays x and y). Every arm takes its own best learning rate of the powers of two, then fresh seeds.
Results are appended to a JSONL file in a fixed order: an interrupted study resumes where it stopped, and ends with the
same lines, times aside. Needs `pip install -e ".[examples]"`.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import lzma
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

import jax
import tasks
import training
from arms import Arm, jobs
from config import StudyConfig, add_arguments, configuration
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Not on Windows, where two processes may write one file.
    fcntl = None

RESULTS = pathlib.Path(__file__).parent / "results" / "study.jsonl"


def header(config: StudyConfig) -> dict[str, Any]:
    """The first line of a file of results: what they depend on, except the code."""
    data = {name: tasks.load(name).fingerprint() for name in config.tasks}
    return {"kind": "study", "config": dataclasses.asdict(config), "data": data, "jax": jax.__version__}


def finished_lines(path: pathlib.Path, first: dict[str, Any]) -> list[dict]:
    """The lines of earlier sessions, after cutting off one that a kill left unfinished."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines:
        path.write_text(json.dumps(first) + "\n")
    elif lines[0] != json.loads(json.dumps(first)):
        raise ValueError(
            f"{path} holds another study: {lines[0]}, and this one is {first}. Name another file with --out, or give "
            "the configuration, the data and the version of jax with which it began."
        )
    return lines[1:]


@contextlib.contextmanager
def appending(path: pathlib.Path) -> Iterator[TextIO]:
    """Opens a file of results for this process alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = path.with_name(path.name + ".xz")  # As the repository keeps it.
    if packed.exists() and not path.exists():
        path.write_bytes(lzma.decompress(packed.read_bytes()))
    with path.open("a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process writes {path}: wait for it, or name another file.") from error
        yield file


def run_all(config: StudyConfig, path: pathlib.Path, file: TextIO, workers: int) -> None:
    """Does all jobs and appends their new lines, those of a job together, in the order of the jobs."""
    known: dict[tuple, dict] = {}
    lines = finished_lines(path, header(config))
    for line in lines:
        role = "freeze" if line["storage"] == "nearest" else "study"
        cell = role, *(line[field.name] for field in dataclasses.fields(Arm))
        known.setdefault(cell, {})[line["key"]] = line
    # In the environment of the workers, before their XLA reads it: one thread each, for the same sums everywhere.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_PLATFORMS"] = "cpu"
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    for i in range(workers):
        cores.put(available[i % len(available)])
    plan = jobs(config)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (cores,))
    seconds = round(sum(cost(job) for job in plan))
    bar = tqdm(total=seconds, desc="compiling, training", unit="core s", smoothing=0.05)
    try:
        futures = [pool.submit(work, *job, config, known.get((job[0], *vars(job[1]).values()), {})) for job in plan]
        with bar:
            for job, future in zip(plan, futures, strict=True):
                bar.set_postfix_str(job[1].key, refresh=False)
                for line in future.result():
                    file.write(json.dumps(line) + "\n")
                file.flush()
                bar.update(cost(job))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def cost(job: tuple[str, Arm]) -> float:
    """Seconds of a job on one core, roughly."""
    return tasks.load(job[1].task).cost * (0.5 if job[0] == "freeze" else 1)


def work(role: str, arm: Arm, config: StudyConfig, known: dict[str, dict]) -> list[dict]:
    """The lines of a job that are not known yet; a job that raises ends with a line that has the cause."""
    start, before, lines = time.perf_counter(), set(known), []
    failed = f"{arm.key}/{role}/failed"
    if failed in known:  # To try it again, delete the line.
        return []
    try:
        for line in getattr(training, role)(tasks.load(arm.task), arm, config, known):
            lines.append(line)  # One by one, to keep what came before an error.
    except Exception as error:
        lines.append({"kind": "failed", "key": failed, **vars(arm), "failure": f"{type(error).__name__}: {error}"})
    new = [line for line in lines if line["key"] not in before]
    seconds = round((time.perf_counter() - start) / max(1, len(new)), 4)
    return [line | {"seconds": seconds} for line in new]


def start_worker(cores: Any) -> None:
    """Gives a worker one core of its own, and ends it when the process that started it is killed."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    parent = multiprocessing.parent_process().sentinel

    def follow():
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="JSONL of the runs; default: results/")
    parser.add_argument("--workers", type=int, default=2, help="processes of one core each; default: %(default)s")
    add_arguments(parser)
    args = parser.parse_args()
    if args.quick and args.out == RESULTS:
        args.out = pathlib.Path("out") / "quick_study.jsonl"
    jax.config.update("jax_platforms", "cpu")
    try:
        config = configuration(args)
        header(config)  # Raises for tasks that cannot be loaded, before there is a file.
        with appending(args.out) as file:
            run_all(config, args.out, file, args.workers)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    main()
