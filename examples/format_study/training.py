"""One arm on one task: compiled runs side by side, their measurements, and the search for the learning rate."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from arms import Arm, gridded, is_stored, schedule, ulp_exponent
from config import FIRST_SELECTION_SEED, HISTOGRAM_EDGES, StudyConfig
from tasks import Task

import altgrad_jax as ag

# Powers of two at which the search for a learning rate starts; it goes on until the best one lies between two others.
FIRST_EXPONENT = {"adamw": -7, "before": -7, "after": -8, "both": -8, "grid_sgd": -4}
SEARCH_LIMIT = 4  # Windows of learning rates after the first.
FREEZE_EXPONENT = -7
Measured = dict[str, Any]


def trainer(task: Task, arm: Arm, config: StudyConfig) -> Callable[..., Measured]:
    """A compiled function of data and of lanes: initial weights, rows, learning rates and seeds of the runs.

    It returns, with leading axes `[lanes, segments]`, validation losses and accuracies, and what `measured` takes.
    """
    ulp = 2.0 ** float(ulp_exponent(task.start(0), arm.format))

    def run(data, lane):
        start, rows, learning_rate, seed = lane
        rate = schedule(config, learning_rate)
        tx = optax.with_extra_args_support(arm.transformation(config, rate, seed, ulp))

        def step(carry, now):
            (_, stored, state, total, _), (i, batch) = carry, now
            grid = arm.grid(stored)
            gradient = jax.grad(task.loss)(arm.values(stored, grid), *task.batch(data, batch))
            updates, state = tx.update(gradient, state, stored, **arm.extra_args(grid))
            total = optax.tree.add(total, arm.intended(state, stored, rate(i), ulp, config.max_steps))
            return (stored, optax.apply_updates(stored, updates), state, total, gradient), None

        def segment(carry, batches):
            start, state = carry
            zeros = optax.tree.zeros_like(ag.from_grid(start))
            end, _ = jax.lax.scan(step, (start, start, state, zeros, zeros), batches)
            before, after, state, total, gradient = end
            return (after, state), {
                "losses": task.loss(arm.values(after), *data[2:]),
                "accuracies": task.accuracy(arm.values(after), *data[2:]),
                "start": start,
                "before": before,
                "after": after,
                "intended": arm.intended(state, before, rate(batches[0][-1]), ulp, config.max_steps),
                "total": total,
                "gradient": gradient,
            }

        stored = arm.stored(start)
        split = lambda x: x.reshape(config.segments, config.segment_steps, *x.shape[1:])  # noqa: E731
        batches = split(jnp.arange(config.steps)), split(rows)
        return jax.lax.scan(segment, (stored, tx.init(stored)), batches)[1]

    # One after the other, as XLA's batched matmuls take twice the time on CPUs.
    return jax.jit(lambda data, *lanes: jax.lax.map(functools.partial(run, data), lanes))


@functools.partial(jax.jit, static_argnames="arm")
def measured(arm: Arm, runs: Measured) -> Measured:
    """Numbers of what `trainer` returns, of one segment after the other, for lines that evaluate."""

    def segment(first, run):
        grid = arm.grid(run["before"])
        values = arm.values(run["before"], grid), arm.values(run["after"])
        return {
            # Of the last step: stored weights that stay where they are, forward values that change.
            "stall_rates": ag.diagnostics.stall_rate(run["intended"], run["before"], run["after"]),
            "flip_rates": ag.diagnostics.flip_rate(run["intended"], *values),
            "correlations": ag.diagnostics.gradient_stiffness(run["gradient"], grid).correlation,
            # Of all steps.
            "descent_quality": ag.diagnostics.effective_descent_quality(run["total"], run["start"], run["after"]),
            "ulp_histogram": _histogram(first, run["after"], arm.format),
        }

    def one(run):
        first, end = (jax.tree.map(lambda x, i=i: x[i], run[name]) for name, i in (("start", 0), ("after", -1)))
        numbers = jax.lax.map(functools.partial(segment, arm.grid(first)), run)
        grid = arm.grid(end)
        used = ag.diagnostics.capacity(grid)
        return numbers | {
            "codes_used": used.codes_used,
            "entropy": used.entropy,
            "saturated": ag.diagnostics.saturation_share(grid),
            "subnormal": ag.diagnostics.subnormal_share(grid),
            "values": arm.values(end, grid),
        }

    return jax.lax.map(one, runs)


@jax.jit
def ranks(values: optax.Params) -> Measured:
    """Means over the matrices of `[lanes, m, n]`, one per lane."""
    named = {name: getattr(ag.diagnostics, name) for name in ("stable_rank", "effective_rank", "variance_rank")}
    return {
        name: sum(map(rank, jax.tree.leaves(values))) / len(jax.tree.leaves(values)) for name, rank in named.items()
    }


def study(task: Task, arm: Arm, config: StudyConfig, known: dict[str, dict]) -> Iterator[dict]:
    """The lines of an arm, in order: learning rates that were tried, then the evaluation. Known ones are not run."""

    @functools.cache
    def compiled():
        return trainer(task, arm, config), tuple(map(jnp.asarray, task.data))

    def lines(role: str, runs: list[tuple[int, int]]) -> Iterator[dict]:
        """Lines of runs with (place of the learning rate, seed), as many at once as there are lanes."""
        for start in range(0, len(runs), config.lanes):
            chunk = [(place / config.rates_per_octave, seed) for place, seed in runs[start : start + config.lanes]]
            keys = [f"{arm.key}/{role}/2^{exponent:g}/{seed}" for exponent, seed in chunk]
            if not all(key in known for key in keys):
                train, data = compiled()
                exponents, seeds = zip(*chunk, *chunk[-1:] * (config.lanes - len(chunk)), strict=True)
                weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(task.start, seeds))
                rows = jnp.stack([task.rows(seed, config) for seed in seeds])
                results = train(data, weights, rows, np.float32(2.0 ** np.array(exponents)), np.uint32(seeds))
                numbers = {"loss": results["losses"][:, -1]}
                if role == "evaluate":
                    numbers |= {name: results.pop(name) for name in ("losses", "accuracies")}
                    # Compiled once for all optimizers.
                    numbers |= measured(dataclasses.replace(arm, task="", optimizer=""), results)
                    numbers |= ranks(numbers.pop("values"))
                numbers = jax.device_get(numbers)
                for i, (key, (exponent, seed)) in enumerate(zip(keys, chunk, strict=True)):
                    run = {"kind": role, "key": key, **vars(arm), "learning_rate": 2.0**exponent, "seed": seed}
                    known[key] = run | _recorded({name: x[i] for name, x in numbers.items()})
                    if seed > 0:  # One is enough to look at.
                        known[key].pop("ulp_histogram", None)
            yield from (known[key] for key in keys)

    selected = range(FIRST_SELECTION_SEED, FIRST_SELECTION_SEED + config.selection_seeds)
    losses, first = {}, FIRST_EXPONENT[arm.optimizer] * config.rates_per_octave - config.learning_rates // 2
    window = range(first, first + config.learning_rates)
    for _ in range(1 + SEARCH_LIMIT):
        for line in lines("select", [(place, seed) for place in window for seed in selected]):
            place = round(np.log2(line["learning_rate"]) * config.rates_per_octave)
            losses.setdefault(place, []).append(np.inf if line["loss"] is None else line["loss"])
            yield line
        best = min(losses, key=lambda place: (np.mean(losses[place]), place))
        if best == min(losses):
            window = range(best - config.learning_rates, best)
        elif best == max(losses):
            window = range(best + 1, best + 1 + config.learning_rates)
        else:
            break
    yield from lines("evaluate", [(best, seed) for seed in range(config.seeds)])


def freeze(task: Task, arm: Arm, config: StudyConfig, known: dict[str, dict]) -> Iterator[dict]:
    """Lines that compare `predict_freeze` of a float32 AdamW run with a run on the grid, rounded to nearest."""

    @functools.cache
    def compiled():
        return freezer(task, arm, config), tuple(map(jnp.asarray, task.data))

    for seed in range(config.freeze_seeds):
        key = f"{arm.key}/freeze/{seed}"
        if key not in known:
            train, data = compiled()
            numbers = jax.device_get(train(data, task.start(seed), task.rows(seed, config), np.uint32(seed)))
            run = {"kind": "freeze", "key": key, **vars(arm), "learning_rate": 2.0**FREEZE_EXPONENT, "seed": seed}
            known[key] = run | _recorded(numbers)
        yield known[key]


def freezer(task: Task, arm: Arm, config: StudyConfig) -> Callable[..., Measured]:
    """A compiled function of (data, initial weights, rows [steps, batch], seed) to shares of frozen weights."""
    ulp = 2.0 ** float(ulp_exponent(task.start(0), arm.format))
    float32 = Arm(arm.task, arm.format, "adamw", "float32")
    segment_ends = config.segment_steps * np.arange(1, config.segments + 1)

    def trajectory(arm, data, start, rows, seed, record):
        """The last steps that moved each weight, the loss, and all weights after each step."""
        rate = schedule(config, 2.0**FREEZE_EXPONENT)
        tx = optax.with_extra_args_support(arm.transformation(config, rate, seed, ulp))

        def step(carry, now):
            (stored, state, last), (i, batch) = carry, now
            gradient = jax.grad(task.loss)(arm.values(stored), *task.batch(data, batch))
            updates, state = tx.update(gradient, state, stored, **arm.extra_args(arm.grid(stored)))
            after = optax.apply_updates(stored, updates)
            pairs = ag.from_grid(stored), ag.from_grid(after)
            last = jax.tree.map(lambda last, x, y: jnp.where(x != y, i + 1, last), last, *pairs)
            return (after, state, last), (after if record else None)

        stored = arm.stored(start)
        carry = stored, tx.init(stored), jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.int32), start)
        (stored, _, last), trace = jax.lax.scan(step, carry, (jnp.arange(config.steps), rows))
        return last, task.loss(arm.values(stored), *data[2:]), trace

    def run(data, start, rows, seed):
        trace = trajectory(float32, data, start, rows, seed, True)[2]
        trace = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, trace)
        scale = jax.tree.map(lambda q: q.scale, gridded(start, arm.format), is_leaf=is_stored)
        predicted = ag.diagnostics.predict_freeze(trace, arm.format, scale=scale).last_move
        observed, loss, _ = trajectory(arm, data, start, rows, seed, False)
        numbers = {"loss": loss}
        for name, last in (("predicted", predicted), ("observed", observed)):
            last = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(last)])
            numbers[f"{name}_never"] = jnp.mean(last == 0)
            # Weights that have stopped for good at the end of each segment.
            numbers[f"{name}_frozen"] = jnp.mean(last <= segment_ends[:, None], axis=1)
        return numbers

    return jax.jit(run)


def _histogram(first: optax.Params, now: optax.Params, format: str) -> jax.Array:
    """Counts of signed grid steps since the start, on the grid of the start."""
    flat = functools.partial(jax.tree.leaves, is_leaf=is_stored)
    numbers = lambda w: w.value(full=True) if is_stored(w) else w  # noqa: E731
    steps = [
        ag.position(numbers(w) / q.scale, format) - ag.position(numbers(q) / q.scale, format)
        for q, w in zip(flat(first), flat(now), strict=True)
    ]
    counts, _ = jnp.histogram(jnp.concatenate([jnp.ravel(x) for x in steps]), jnp.asarray(HISTOGRAM_EDGES))
    return counts.astype(jnp.int32)


def _recorded(numbers: Measured) -> Measured:
    """What a line holds of measurements: few digits, and None for NaN, which JSON does not have."""
    recorded = {name: _plain(x, 6 if name.startswith("loss") else 4) for name, x in numbers.items()}
    return recorded | {"failure": None if recorded["loss"] is not None else "the loss is not finite"}


def _plain(x: Any, digits: int) -> Any:
    if np.ndim(x):
        return [_plain(part, digits) for part in x]
    if not np.isfinite(x):
        return None
    return int(x) if np.issubdtype(x.dtype, np.integer) else float(f"{x:.{digits}g}")
