"""Ways to train: a format, an optimizer that may know its spacing, and a place to keep the weights."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from config import CONTROL, StudyConfig

import altgrad_jax as ag


@dataclasses.dataclass(frozen=True)
class Arm:
    """One cell of the matrix.

    Optimizers: AdamW; AdamW with gradients multiplied by the stiffness *before* Adam (AltGrad's ManifoldAdamW), with
    Adam's directions multiplied *after* it, or *both*; momentum in grid steps without weight decay (AltGrad's
    GridOptim), which on float32 master weights makes fractions of steps.

    Storages: float32 weights, which no pass rounds, with AdamW alone; the same with all optimizers, as a control of
    what stiffness does without a grid ("unrounded"); float32 master weights with a rounded forward pass; numbers of
    the grid alone, rounded stochastically or to nearest; positions with 8 more bits.
    """

    task: str
    format: str
    optimizer: str
    storage: str

    @property
    def key(self) -> str:
        return f"{self.task}/{self.format}/{self.optimizer}/{self.storage}"

    @property
    def on_grid(self) -> bool:
        return self.storage in ("stochastic", "nearest", "fraction8")

    @property
    def fraction_bits(self) -> int:
        return 8 if self.storage == "fraction8" else 0

    def stored(self, params: optax.Params) -> optax.Params:
        """Float32 weights as this arm keeps them."""
        return gridded(params, self.format, self.fraction_bits) if self.on_grid else params

    def grid(self, stored: optax.Params) -> optax.Params:
        """The weights as GridArrays, rounded to nearest where they are float32."""
        return stored if self.on_grid else gridded(stored, self.format)

    def values(self, stored: optax.Params, grid: optax.Params | None = None) -> optax.Params:
        """The weights of the forward pass. Their gradient is that of the stored ones: it passes straight through."""
        if self.storage in ("float32", CONTROL):
            return stored
        return ag.from_grid(self.grid(stored) if grid is None else grid)

    def extra_args(self, grid: optax.Params) -> dict[str, Any]:
        """What the optimizer has to be told: on_grid knows the scales of its grids, others do not."""
        if self.on_grid:
            return {}
        return {"grid_scale": jax.tree.map(lambda q: q.scale, grid, is_leaf=is_stored)}

    def transformation(
        self, config: StudyConfig, learning_rate: Callable, seed: jax.Array, ulp: float
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer. Stiffness and steps are relative to `ulp`, a typical spacing: learning rates then mean the
        same in every arm, and eps and weight decay what they mean in AdamW."""
        if self.optimizer == "grid_sgd":
            return self._grid_sgd(config, lambda step: learning_rate(step) / ulp, seed)
        stiffness = optax.chain(ag.stiffness_precondition(format=self.format), optax.scale(1 / ulp))
        tx = optax.chain(
            stiffness if self.optimizer in ("before", "both") else optax.identity(),
            optax.scale_by_adam(config.b1, config.b2, config.eps),
            stiffness if self.optimizer in ("after", "both") else optax.identity(),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(learning_rate),
            optax.snapshot("intended", lambda updates: updates),
        )
        if not self.on_grid:
            return tx
        return ag.on_grid(tx, rounding="nearest" if self.storage == "nearest" else "stochastic", seed=seed)

    def _grid_sgd(self, config, learning_rate, seed):
        fine = 2**self.fraction_bits
        if self.on_grid:
            rate = lambda step: fine * learning_rate(step)  # noqa: E731
            return ag.grid_sgd(rate, config.b1, max_steps=fine * config.max_steps, seed=seed)
        return optax.chain(
            optax.trace(config.b1),
            optax.scale_by_learning_rate(learning_rate),
            optax.clip(config.max_steps),
            ag.stiffness_precondition(format=self.format),
            optax.snapshot("intended", lambda updates: updates),
        )

    def intended(
        self, state: optax.OptState, stored: optax.Params, rate: jax.Array, ulp: float, max_steps: int
    ) -> optax.Updates:
        """The movement that the optimizer meant in the update that made this state, in real units.

        Args:
            state: After the update.
            stored: The weights before it.
            rate: The learning rate of the step.
            ulp: As in `transformation`.
            max_steps: Of grid_sgd.
        """
        if self.optimizer == "grid_sgd" and self.on_grid:

            def movement(momentum, q):
                steps = jnp.clip(-rate / ulp * momentum, -max_steps, max_steps)
                return steps * q.scale * ag.spacing(q.value(full=True) / q.scale, self.format)

            return jax.tree.map(movement, optax.tree.get(state, "trace"), stored)
        return optax.tree.get(state, "intended")


def jobs(config: StudyConfig) -> list[tuple[str, Arm]]:
    """What a study does, in the order of its lines: ("study" or "freeze", arm)."""
    result = []
    for task in config.tasks:
        cells = itertools.product(config.storages, config.optimizers, config.formats)
        # Weights that know no grid are trained with AdamW alone: the same run in every format, as a check.
        result += [("study", Arm(task, f, o, s)) for s, o, f in cells if s != "float32" or o == "adamw"]
        if config.freeze_seeds:
            result += [("freeze", Arm(task, format, "adamw", "nearest")) for format in config.formats]
    return result


def is_stored(leaf: Any) -> bool:
    return isinstance(leaf, ag.GridArray)


def gridded(params: optax.Params, format: str, fraction_bits: int = 0) -> optax.Params:
    """Nearest numbers of a grid, 8-bit formats with a scale per row; 16-bit ones reach far enough without."""
    scale = None if ag.as_format(format).bits <= 8 else 1.0
    return ag.to_grid(params, format, fraction_bits=fraction_bits, scale=scale)


@functools.partial(jax.jit, static_argnames="format")
def ulp_exponent(params: optax.Params, format: str) -> jax.Array:
    """The power of two nearest to the geometric mean of the spacing at the weights, as its exponent."""
    leaves = jax.tree.leaves(gridded(params, format), is_leaf=is_stored)
    ulps = [q.scale * ag.spacing(q.value() / q.scale, format) for q in leaves]
    return jnp.round(jnp.mean(jnp.log2(jnp.concatenate([jnp.ravel(u) for u in ulps]))))


def schedule(config: StudyConfig, learning_rate: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Linear warm-up, then a cosine to zero."""
    warm_up = max(1, round(config.warm_up * config.steps))

    def rate(step):
        falling = (1 + jnp.cos(jnp.pi * (step - warm_up) / (config.steps - warm_up))) / 2
        return learning_rate * jnp.where(step < warm_up, (step + 1) / warm_up, falling)

    return rate
