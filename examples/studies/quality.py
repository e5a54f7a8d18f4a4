"""Quality at 1, 2, 3 and 4 bytes per weight, beside the rivals, and how the gap to float32 goes with the model's size.

    python examples/studies/quality.py tune               # AdamW's b1, b2 and warm-up, for all that follows
    python examples/studies/quality.py table              # all arms, and other settings, on 60 thousand weights
    python examples/studies/quality.py line               # eight arms on 7 thousand to 1 million weights
    python examples/studies/quality.py line --sizes 4M    # larger ones, on an accelerator
    python examples/studies/quality.py formats            # AdamW with the stiffness of seven formats, on small tasks
    python examples/studies/quality.py report             # tables and pictures of what is there, in docs too
    python examples/studies/quality.py table --quick      # a few arms of a tiny model, in a temporary folder

Every arm takes its own best learning rate of the powers of sqrt(2), chosen once, on one device, with seeds that
evaluate nothing; then fresh seeds, which give initial weights, batches and random bits, compare arms in pairs. Runs are
lines of results/quality.jsonl beside this file, and a restart goes on where the last one ended. On an accelerator
`--lanes 24 --workers 8` trains 24 runs at once and compiles in eight threads. Needs `pip install -e ".[study]"`.
"""

import argparse
import functools
import pathlib
import tempfile
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import training
from arms import ARMS, FACTORED, FORMAT_ARMS, LINE, TABLE
from report import DOCS, SMALL_TASKS, TABLE_SIZE, Results, documentation, draw, draw_formats, draw_stiffness, report
from tasks import TASKS

RESULTS = pathlib.Path(__file__).parent / "results" / "quality.jsonl"
MEASURED = ("loss", "seconds")
TUNED = {"b1": (0.8, 0.9), "b2": (0.95, 0.98, 0.995), "warm_up": (0.05, 0.15)}
DEFAULTS = {"b1": 0.9, "b2": 0.98, "warm_up": 0.05, "end": 0.0, "spike": 1.0}
TUNING_SIZE = "60k"
# Other settings: a multiple of the arm's best learning rate, and what differs. For headline arms.
VARIANTS = {
    "half the rate": (1 / 2, {}),
    "a sixth of the rate": (1 / 6, {}),
    "cosine to 0.1": (1.0, {"end": 0.1}),
    "b1 = 0.9": (1.0, {"b1": 0.9}),
    "b2 = 0.999": (1.0, {"b2": 0.999}),
    "a gradient times 1e6": (1.0, {"spike": 1e6}),
}
USUAL = {"tune": [TUNING_SIZE], "table": [TABLE_SIZE], "line": ["7k", "60k", "260k", "1M"], "formats": SMALL_TASKS}
SEEDS = 8  # Of arms that are no headlines, and of variants.
QUICK = ("adamw", FACTORED, "2 bytes e3m4", "adamw through E4M3, stiffness before", "adamw on E4M3, stiffness after")


class Runner:
    """Trains what the store does not have, `lanes` runs at once."""

    def __init__(self, store: harness.Store, lanes: int):
        self.store, self.lanes, self.device = store, lanes, jax.devices()[0].device_kind

    def names(self, task, arm, role, **numbers) -> dict:
        about = {"task": task.name, "steps": task.steps, "arm": arm.name, "role": role}
        return about | numbers | {"jax": jax.__version__, "device": self.device}

    def losses(self, task: training.Task, arm, wanted: list[dict]) -> list[float]:
        """Of runs with these names, in their order; inf for one that diverged."""
        missing = [run for run in wanted if self.store.find(run) is None]
        for i in range(0, len(missing), self.lanes):
            part = missing[i : i + self.lanes]
            padded = part + part[-1:] * (self.lanes - len(part))
            train = compiled(task, arm, self.lanes)
            begun = time.perf_counter()
            losses = np.asarray(train(*numbers_of(padded)))
            seconds = round((time.perf_counter() - begun) / len(part), 3)
            for run, loss in zip(part, losses.tolist(), strict=False):
                loss = round(loss, 6) if np.isfinite(loss) else None  # JSON has no NaN.
                self.store.add(run | {"loss": loss, "seconds": seconds})
        found = [self.store.find(run)["loss"] for run in wanted]
        return [np.inf if loss is None else loss for loss in found]


def numbers_of(runs: list[dict]) -> list[jax.Array]:
    dtypes = [jnp.uint32 if name == "seed" else jnp.float32 for name in training.HYPERPARAMETERS]
    columns = ([run[name] for run in runs] for name in training.HYPERPARAMETERS)
    return [jnp.asarray(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]


@functools.lru_cache(maxsize=16)
def compiled(task: training.Task, arm, lanes: int):
    example, data = [dict.fromkeys(training.HYPERPARAMETERS, 0)] * lanes, task.data()
    program = training.trainer(task, arm).lower(data, *numbers_of(example)).compile()
    return functools.partial(program, data)


def rate(exponent: int) -> float:
    return float(np.float32(2.0 ** (exponent / 2)))


def tuned(store: harness.Store) -> dict:
    """The hyperparameters with which AdamW has its lowest mean loss on the tuning task."""
    groups: dict[tuple, list[float]] = {}
    for run in list(store.runs.values()):
        if run["role"] == "tune" and run["task"] == TUNING_SIZE:
            loss = np.inf if run["loss"] is None else run["loss"]
            groups.setdefault((run["b1"], run["b2"], run["warm_up"], run["learning_rate"]), []).append(loss)
    if not groups:
        return DEFAULTS
    b1, b2, warm_up, _ = min(groups, key=lambda key: np.mean(groups[key]))
    return DEFAULTS | {"b1": b1, "b2": b2, "warm_up": warm_up}


def tune(runner: Runner, task: training.Task) -> None:
    wanted = [
        runner.names(
            task, ARMS["adamw"], "tune", **DEFAULTS | {"b1": b1, "b2": b2, "warm_up": w}, learning_rate=rate(k), seed=s
        )
        for b1 in TUNED["b1"]
        for b2 in TUNED["b2"]
        for w in TUNED["warm_up"]
        for k in (task.center - 1, task.center + 1)
        for s in (1000, 1001)
    ]
    runner.losses(task, ARMS["adamw"], wanted)


def evaluated(store: harness.Store, names: dict) -> float | None:
    """The learning rate of the last run that evaluates with these names, on this device or else on another one."""
    about = {name: value for name, value in names.items() if name not in ("jax", "device")}
    known = [run for run in list(store.runs.values()) if about.items() <= run.items()]
    here = [run for run in known if names.items() <= run.items()]
    return (here or known)[-1]["learning_rate"] if known else None


def study(runner: Runner, task: training.Task, arm, seeds: int, variants: bool) -> None:
    """The learning rate of an arm, then its seeds, then its other settings."""
    numbers = tuned(runner.store)
    name = functools.partial(runner.names, task, arm)

    def selected(exponents):
        wanted = [
            name("select", **numbers, learning_rate=rate(k), seed=1000 + s)
            for k in exponents
            for s in range(task.select)
        ]
        return np.reshape(runner.losses(task, arm, wanted), (len(exponents), -1)).mean(1).tolist()

    best = evaluated(runner.store, name("evaluate", **numbers)) or rate(
        harness.lowest(selected, task.center + arm.shift)
    )
    wanted = [name("evaluate", **numbers, learning_rate=best, seed=s) for s in range(seeds)]
    for role, (factor, changed) in VARIANTS.items() if variants else ():
        wanted += [
            name(role, **numbers | changed, learning_rate=factor * best, seed=s) for s in range(min(seeds, SEEDS))
        ]
    runner.losses(task, arm, wanted)


def jobs_of(command: str, sizes: list[str], most_seeds: int | None) -> list[tuple]:
    """Task, arm, seeds and whether there are variants."""
    names = {"tune": ["adamw"], "table": TABLE, "line": LINE, "formats": FORMAT_ARMS}[command]
    pairs = [(TASKS[task], ARMS[name]) for task in sizes for name in names]
    if command == "table" and sizes == [TABLE_SIZE]:
        batches = f"{TABLE_SIZE}, batch 2", f"{TABLE_SIZE}, batch 32"
        pairs += [(TASKS[task], ARMS[name]) for task in batches for name in ("adamw", FACTORED, "2 bytes e3m4")]
    jobs = []
    for task, arm in pairs:
        headline = command == "table" and arm.headline and task.name in sizes
        seeds = min(most_seeds or (task.seeds if headline else SEEDS), task.seeds)
        jobs.append((task.name, arm.name, 0 if command == "tune" else seeds, headline and task.name == TABLE_SIZE))
    return jobs


def work(path: pathlib.Path, lanes: int, job: tuple, runner: Runner | None = None) -> None:
    runner = runner or Runner(harness.Store(path, MEASURED), lanes)
    name, arm, seeds, variants = job
    task = TASKS[name]
    if not seeds:
        tune(runner, task)
    else:
        study(runner, task, ARMS[arm], seeds, variants)


def publish(store: harness.Store, path: pathlib.Path, pictures: pathlib.Path) -> str:
    """Writes the report beside a file of runs, and the pictures into a folder."""
    numbers, results = tuned(store), Results(store)
    about = f"AdamW tuned: b1 {numbers['b1']}, b2 {numbers['b2']}, warm-up {numbers['warm_up']:.0%} of the steps."
    text = report(results, about, list(VARIANTS))
    path.with_suffix(".md").write_text(text)
    draw(results, pictures / "quality.png")
    draw_stiffness(results, pictures / "stiffness.png")
    draw_formats(results, pictures / "formats.png")
    return f"{text}\npictures: {pictures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("tune", "table", "line", "formats", "report", "pack"))
    parser.add_argument("--sizes", nargs="+", choices=TASKS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all of the command")
    parser.add_argument(
        "--seeds", type=int, help="of an arm, at most those of its task; default: 8, of headline arms 24"
    )
    parser.add_argument("--lanes", type=int, default=1, help="runs at once, by jax.vmap; default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=2, help="CPU processes, or threads with lanes; default: %(default)s"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a few arms of a tiny model, in a temporary folder")
    args = parser.parse_args()
    sizes = args.sizes or USUAL.get(args.command, [])
    if args.quick:
        sizes, args.arms = ["tiny"], QUICK
        args.out = pathlib.Path(tempfile.mkdtemp()) / RESULTS.name
    store = harness.Store(args.out, MEASURED)
    if args.command == "pack":
        print(store.pack())
        return
    if args.command != "report":
        store.add(harness.provenance())
        jobs = [job for job in jobs_of(args.command, sizes, args.seeds) if job[1] in args.arms]
        if not jobs:
            parser.error(f"--arms must name arms of {args.command}, got {', '.join(args.arms)}.")
        if args.lanes > 1 or args.workers == 1:
            runner = Runner(store, args.lanes)
            harness.in_threads(
                [functools.partial(work, args.out, args.lanes, job, runner) for job in jobs], args.workers
            )
        else:
            harness.in_processes(work, [(args.out, args.lanes, job) for job in jobs], args.workers)
            store = harness.Store(args.out, MEASURED)
    of_repository = args.command == "report" and args.out == RESULTS
    if of_repository:
        for page, text in documentation(Results(store), list(VARIANTS)).items():
            page.write_text(text)
    print(publish(store, args.out, DOCS / "images" if of_repository else args.out.parent))


if __name__ == "__main__":
    main()
