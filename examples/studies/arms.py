"""The arms of the studies: ways to keep the weights and the moments, and the rivals as Optax chains."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax

import altgrad_jax as ag
from altgrad_jax.factored import scale_by_factored_rms

WEIGHT_DECAY, EPS = 0.01, 1e-8
Optimizer = Callable[..., optax.GradientTransformation]  # of (schedule, b1, b2, seed)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to keep the weights and the moments."""

    name: str
    optimizer: Optimizer
    format: str | None = None  # None: float32 weights
    fraction_bits: int = 0
    forward: str | None = None  # Format of the forward pass alone: float32 weights, rounded to nearest.
    twin: str | None = None  # The float32 arm of the same order and second moment.
    shift: int = 0  # Of the center of the learning rates, in powers of sqrt(2).
    headline: bool = False  # More seeds, and other hyperparameters.

    def store(self, params: optax.Params) -> optax.Params:
        if self.format is None:
            return params
        return ag.to_grid(params, self.format, fraction_bits=self.fraction_bits)

    def values(self, params: optax.Params) -> optax.Params:
        return ag.from_grid(params if self.forward is None else ag.to_grid(params, self.forward))


# float32


def adamw(schedule, b1, b2, seed):
    return optax.adamw(schedule, b1, b2, EPS, weight_decay=WEIGHT_DECAY)


def normalized(schedule, b2, factored):
    """A second moment, weight decay and learning rate: what `ag.grid_adamw` has inside."""
    whole = optax.scale_by_rms(b2, EPS, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(
        scale_by_factored_rms(b2, EPS) if factored else whole,
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(schedule),
    )


def laprop(schedule, b1, b2, seed, factored=False):
    return optax.chain(normalized(schedule, b2, factored), optax.ema(b1))


factored_laprop = functools.partial(laprop, factored=True)


def rmsprop(schedule, b1, b2, seed, factored=False):
    return normalized(schedule, b2, factored)


def lion(schedule, b1, b2, seed):
    """With the decays that its authors give language models (Chen et al. 2023, arXiv 2302.06675), not AdamW's."""
    return optax.lion(schedule, 0.95, 0.98, weight_decay=WEIGHT_DECAY)


def muon(schedule, b1, b2, seed):
    """For the layers, at the rates of AdamW (arXiv 2502.16982); AdamW for embeddings, head and norms."""

    def matrices(params):
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree.map_with_path(lambda path, w: matrix if w.ndim == 3 else None, params)

    options = {"adam_b1": b1, "adam_b2": b2, "weight_decay": WEIGHT_DECAY, "adam_weight_decay": WEIGHT_DECAY}
    return optax.contrib.muon(schedule, muon_weight_dimension_numbers=matrices, consistent_rms=0.2, **options)


def by_stiffness(format: str, where: str = "after") -> Optimizer:
    """AdamW with gradients ("before" Adam, as in AltGrad) or directions ("after") times the stiffness of a format.

    The stiffness is that of the grid that holds the weights, or else of the one that `to_grid` would make, over its
    geometric mean. In a uniform format, after Adam, it is a learning rate per row. Biases and gains have none.
    """
    stiffness = ag.stiffness_precondition(format=format, max_stiffness=float("inf"))

    def update(updates, state, params, *, grid_scale=None, **extra_args):
        del extra_args  # Those of other transformations of the chain.
        grid_scale = scales(params, format) if grid_scale is None else grid_scale
        stiff, _ = stiffness.update(jax.tree.map(jnp.ones_like, params), state, params, grid_scale=grid_scale)
        pairs = zip(jax.tree.leaves(stiff), jax.tree.leaves(grid_scale), strict=True)
        average = jnp.exp(jnp.concatenate([jnp.ravel(jnp.log(s)) for s, scale in pairs if jnp.ndim(scale)]).mean())
        return jax.tree.map(
            lambda u, s, scale: u * (s / average) if jnp.ndim(scale) else u, updates, stiff, grid_scale
        ), state

    def optimizer(schedule, b1, b2, seed):
        adam = optax.scale_by_adam(b1, b2, EPS)
        relative = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
        return optax.chain(
            *((relative, adam) if where == "before" else (adam, relative)),
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.scale_by_learning_rate(schedule),
        )

    return optimizer


def scales(params: optax.Params, format: str) -> optax.Params:
    """Those of the rows that a grid would have; 1 for leaves that are not stored."""
    return jax.tree.map(lambda x: x.scale if is_grid(x) else 1.0, ag.to_grid(params, format), is_leaf=is_grid)


def is_stored(params: optax.Params) -> optax.Params:
    """Which leaves `ag.to_grid` stores: neither biases nor gains."""
    return jax.tree.map(is_grid, ag.to_grid(params), is_leaf=is_grid)


def is_grid(leaf) -> bool:
    return isinstance(leaf, ag.GridArray)


# Weights on a grid


def two_bytes(schedule, b1, b2, seed):
    return ag.grid_adamw(schedule, b1, b2, EPS, WEIGHT_DECAY, seed=seed)


def three_bytes(schedule, b1, b2, seed):
    return ag.grid_adamw(schedule, b1, b2, EPS, WEIGHT_DECAY, second_moment="8bit", seed=seed)


def no_momentum(schedule, b1, b2, seed):
    return ag.grid_adamw(schedule, 0.0, b2, EPS, WEIGHT_DECAY, seed=seed)


def compressed(optimizer: Optimizer, **fields: tuple[str, ...]) -> Optimizer:
    """Any float32 optimizer on stored weights, rounded stochastically, with its moments in one byte."""

    def stored(schedule, b1, b2, seed):
        inner = ag.on_grid(optimizer(schedule, b1, b2, seed), seed=seed)
        return ag.compress_state(inner, seed=seed, min_size=256, **fields)

    return stored


def stored(optimizer: Optimizer) -> Optimizer:
    """Any float32 optimizer on stored weights, rounded stochastically; its state as it is."""
    return lambda schedule, b1, b2, seed: ag.on_grid(optimizer(schedule, b1, b2, seed), seed=seed)


def four_bits(schedule, b1, b2, seed):
    """A momentum of 4 bits, rounded stochastically, after the factored second moment. (Kept in float32 here.)"""

    def init(params):
        return jax.random.key(seed), jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        key, momentum = jax.random.split(state[0])[0], state[1]
        moved = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * u, momentum, updates)

        def kept(path, m, stored):
            if not stored:
                return m
            scale = ag.power_of_two_scale(m, "float4_e2m1fn", -1)
            own = jax.random.fold_in(key, hash_of(path))
            return scale * ag.round_stochastic(own, m / scale, "float4_e2m1fn")

        return moved, (jax.random.split(state[0])[1], jax.tree.map_with_path(kept, moved, is_stored(params)))

    return ag.on_grid(
        optax.chain(normalized(schedule, b2, True), optax.GradientTransformation(init, update)), seed=seed
    )


Keep = Callable[..., jax.Array]  # of (key, owed, step, end)


def carrying(format: str, b1, seed, keep: Keep, within: float = 1.0, room: float = 0.0) -> optax.GradientTransformation:
    """A momentum that carries the error of rounding, with another rule for what weights owe.

    Emulated: weights and what they owe are float32, with the numbers that bytes would hold. Weights owe nothing at the
    start, there is no bias correction, and the exponents of rows follow without a delay.

    `keep` gives what is kept of what weights owe, from the steps of the grid at the weights and from the power of two
    at which the grid of their row ends. A weight that owes at most `within` steps is rounded to nearest, others at
    random. Rows have room for `room` times what is owed.
    """

    def init(params):
        return jax.random.key(seed), jax.tree.map(jnp.zeros_like, params), scales(params, format)

    def update(updates, state, params):
        following, key = jax.random.split(state[0])

        def moved(path, u, owed, w, scale):
            owed += u
            move = (1 - b1) * owed
            if not jnp.ndim(scale):
                return move, owed - move, scale
            near = jnp.abs(owed) <= within * scale * ag.spacing(w / scale, format)
            target = w + jnp.where(near, owed, move)
            # A row above half of its largest number grows, one below a 16th shrinks.
            fit = ag.power_of_two_scale(2 * jnp.maximum(jnp.abs(target), room * jnp.abs(owed - move)), format, -1)
            scale = jnp.where((fit > scale) | (fit <= scale / 8), fit, scale)
            rounding, keeping = jax.random.split(jax.random.fold_in(key, hash_of(path)))
            target /= scale
            number = jnp.where(near, ag.round_nearest(target, format), ag.round_stochastic(rounding, target, format))
            change, step = scale * number - w, scale * ag.spacing(number, format)
            return change, keep(keeping, owed - change, step, scale * 2.0 ** ag.as_format(format).maxexp), scale

        results = jax.tree.map_with_path(moved, updates, state[1], params, state[2])
        changes, owed, scale = unzipped(results, updates)
        return changes, (following, owed, scale)

    return optax.GradientTransformation(init, update)


def numbers_of(format: str, unit: Callable[[jax.Array, jax.Array], jax.Array]) -> Keep:
    """Keeps numbers of a format times a unit, a function of step and end."""

    def keep(key, owed, step, end):
        size = unit(step, end)
        return size * ag.round_stochastic(key, owed / size, format)

    return keep


def unzipped(results: optax.Params, like: optax.Params) -> tuple:
    """A tree of tuples as a tuple of trees."""
    columns = zip(*jax.tree.structure(like).flatten_up_to(results), strict=True)
    return tuple(jax.tree.unflatten(jax.tree.structure(like), column) for column in columns)


# AltGrad's E3M4 ends at 31, here two binades below the weights, and its E0M7 has the numbers k / 128.
ON_GRID = {"keep": numbers_of("E3M4", lambda step, end: end / 128), "room": 4.0}
CARRIES = {
    "owed as in on_grid": ON_GRID,
    "owed in float32": {"keep": lambda key, owed, step, end: owed},
    "owed in quarters of a step": {"keep": numbers_of("E0M7", lambda step, end: 32 * step)},
    "owed in 16ths of a step": {"keep": numbers_of("E0M7", lambda step, end: 8 * step)},
    "owed in steps, E3M4": {"keep": numbers_of("E3M4", lambda step, end: step)},
    "nearest within a quarter": ON_GRID | {"within": 0.25},
}


def carried(format: str, rule: str) -> Optimizer:
    """The order of `ag.grid_adamw`, with another rule for what weights owe."""
    return lambda schedule, b1, b2, seed: optax.chain(
        normalized(schedule, b2, True), carrying(format, b1, seed, **CARRIES[rule])
    )


def hash_of(path) -> int:
    return sum(map(ord, jax.tree_util.keystr(path)))


# Rivals


def scale_by_apollo_mini(b1, b2, seed, period=200, growth=1.01):
    """APOLLO-Mini (Zhu et al. 2024, arXiv 2412.05270): Adam of a random projection to rank 1 scales the gradient.

    The matrices of the layers are multiplied by sqrt(128) times the ratio of the norms of Adam's update and of the
    projected gradient. The norm of an update grows by at most 1 % per step. All else has Adam, as in its authors' code.
    """
    adam = optax.scale_by_adam(b1, b2, EPS)

    def projected(step, updates):
        def of(path, g):
            if g.ndim < 3:
                return g
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step // period), hash_of(path))
            return jax.random.normal(key, (1, g.shape[-2])) @ g

        return jax.tree.map_with_path(of, updates)

    def init(params):
        small = jax.tree.map(lambda p: jnp.zeros_like(p[..., :1, :] if p.ndim > 2 else p), params)
        norms = jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], 1, 1) if p.ndim > 2 else ()), params)
        return jnp.int32(0), adam.init(small), norms

    def update(updates, state, params=None):
        step, inner, before = state
        small = projected(step, updates)
        moved, inner = adam.update(small, inner)

        def scaled(g, r, m, last):
            if g.ndim < 3:
                return m, last
            update = 128**0.5 * norm(m) / (norm(r) + EPS) * g
            limit = jnp.where(last > 0, growth * last, jnp.inf)
            update *= jnp.minimum(1, limit / (norm(update) + EPS))
            return update, norm(update)

        updates, norms = unzipped(jax.tree.map(scaled, updates, small, moved, before), updates)
        return updates, (step + 1, inner, norms)

    return optax.GradientTransformation(init, update)


def norm(x):
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def apollo_mini(schedule, b1, b2, seed):
    return optax.chain(
        scale_by_apollo_mini(b1, b2, seed),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(schedule),
    )


def scale(schedule, b1, b2, seed):
    """SCALE (Glentis et al. 2025, arXiv 2506.16659): all columns have a root mean square of 1, as in its authors' code.

    The head has a momentum before, and vectors have Adam.
    """
    columns = optax.stateless_with_tree_map(
        lambda g, _: g / jnp.maximum(jnp.sqrt(jnp.mean(g * g, axis=-2, keepdims=True)), EPS)
    )

    def kind(path, stored):
        return ("head" if "head" in str(path[-1]) else "matrix") if stored else "vector"

    parts = {
        "vector": optax.scale_by_adam(b1, b2, EPS),
        "head": optax.chain(optax.ema(b1), columns),
        "matrix": columns,
    }
    return optax.chain(
        optax.partition(parts, lambda params: jax.tree.map_with_path(kind, is_stored(params))),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(schedule),
    )


# AltGrad's formats of 8 bits, from a uniform one to powers of two; under a scale E1M6 is E0M7.
FAMILY = ("E0M7", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
CARRYING = ("float8_e3m4", "float8_e4m3fn")
FACTORED, PLAIN, ROWS = "factored", "factored, no momentum", "adamw, a rate per row"
NARROW = ("float8_e3m4", "float8_e4m3fn", "E2M5", "E1M6", "E0M7", "float6_e2m3fn", "float6_e3m2fn")


def short(format: str) -> str:
    return format.rpartition("_")[2]


def by_rule(format: str, rule: str) -> str:
    """The name of the arm with a format for weights and a rule for what they owe."""
    return f"{short(format)}, {rule}"


def after(format: str) -> str:
    """The name of the arm whose stiffness is that of a format, with weights that no grid rounds."""
    return ROWS if format == FAMILY[0] else f"adamw, stiffness of {format} after"


def with_stiffness(format: str) -> Iterator[Arm]:
    """AdamW on float32 weights that the forward pass rounds, and on weights of one byte; without stiffness, and with.

    AltGrad's ManifoldAdamW is nearest to "adamw through FORMAT, stiffness before".
    """
    for name, where in (("", None), (", stiffness before", "before"), (", stiffness after", "after")):
        optimizer, shift = (by_stiffness(format, where), -2 * (where == "after")) if where else (adamw, 0)
        for storage in ("through", "on"):
            twin = f"adamw {storage} {format}" if where else "adamw"
            how = {"forward": format} if storage == "through" else {"format": format}
            yield Arm(
                f"adamw {storage} {format}{name}",
                optimizer if storage == "through" else stored(optimizer),
                **how,
                twin=twin,
                shift=shift,
            )


ARMS = {
    arm.name: arm
    for arm in (
        Arm("adamw", adamw, headline=True),
        Arm("laprop", laprop),
        Arm("rmsprop", rmsprop),
        Arm(FACTORED, factored_laprop, headline=True),
        Arm(PLAIN, functools.partial(rmsprop, factored=True), headline=True),
        Arm("muon", muon),
        Arm("lion", lion, shift=-7),
        Arm(ROWS, by_stiffness(FAMILY[0]), twin="adamw", shift=-1),
        *(Arm(after(f), by_stiffness(f), twin=ROWS, shift=-2) for f in FAMILY[1:]),
        *itertools.chain.from_iterable(map(with_stiffness, FAMILY)),
        *(Arm(f"1 byte {short(f)}", no_momentum, f, twin=PLAIN, headline=f == "float8_e3m4") for f in NARROW),
        Arm("1.5 bytes e3m4", four_bits, "float8_e3m4", twin=FACTORED),
        *(Arm(f"2 bytes {short(f)}", two_bytes, f, twin=FACTORED, headline=f == "float8_e3m4") for f in NARROW),
        *(Arm(by_rule(f, rule), carried(f, rule), twin=FACTORED) for f in CARRYING for rule in CARRIES),
        Arm("2 bytes, 16 bits e3m4", no_momentum, "float8_e3m4", 8, twin=PLAIN, headline=True),
        Arm("2 bytes, bfloat16", no_momentum, "bfloat16", twin=PLAIN, headline=True),
        Arm("2 bytes, APOLLO-Mini", stored(apollo_mini), "bfloat16", twin="apollo-mini", shift=1),
        Arm("apollo-mini", apollo_mini, shift=1),
        Arm("2 bytes, SCALE", stored(scale), "bfloat16", twin="scale", shift=-2),
        Arm("scale", scale, shift=-2),
        Arm("2 bytes, lion e3m4", compressed(lion), "float8_e3m4", twin="lion", shift=-7),
        Arm("2 bytes, muon e3m4", compressed(muon), "float8_e3m4", twin="muon"),
        Arm("3 bytes, 16 bits e3m4", two_bytes, "float8_e3m4", 8, twin=FACTORED, headline=True),
        Arm("3 bytes, laprop 16 bits", compressed(factored_laprop, first=("ema",)), "float8_e3m4", 8, twin=FACTORED),
        Arm("6 bytes, laprop 16 bits", stored(factored_laprop), "float8_e3m4", 8, twin=FACTORED),
        Arm("3 bytes, 8-bit m and v", three_bytes, "float8_e3m4", twin="laprop"),
        Arm("3 bytes, lion 16 bits", compressed(lion), "float8_e3m4", 8, twin="lion", shift=-7),
        Arm("3 bytes, muon 16 bits", compressed(muon), "float8_e3m4", 8, twin="muon"),
        Arm("4 bytes, 16 bits e3m4", compressed(adamw), "float8_e3m4", 8, twin="adamw"),
        Arm("4 bytes, bfloat16", compressed(adamw), "bfloat16", twin="adamw"),
    )
}
FORMAT_ARMS = ("adamw", *map(after, FAMILY), *(arm.name for f in FAMILY for arm in with_stiffness(f)))
CARRY_ARMS = [by_rule(f, rule) for f in CARRYING for rule in CARRIES]
# Of the formats' arms the GPT of the table trains some.
GPT_ARMS = (ROWS, after("E2M5"), after("E4M3"), "adamw through E3M4", "adamw through E3M4, stiffness before")
TABLE = [name for name in ARMS if name not in FORMAT_ARMS or name in ("adamw", *GPT_ARMS)]
LINE = (
    "adamw",
    FACTORED,
    PLAIN,
    "1 byte e3m4",
    "2 bytes, bfloat16",
    "2 bytes e3m4",
    "2 bytes E2M5",
    "3 bytes, 16 bits e3m4",
)
