"""Tasks as the studies see them, and one arm on one task as a jitted function of lanes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from arms import Arm, is_stored

HYPERPARAMETERS = ("learning_rate", "b1", "b2", "warm_up", "end", "spike", "seed")


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data and its loss."""

    name: str
    data: Callable[[], Any]  # What all seeds share.
    start: Callable[[jax.Array, Any], tuple[optax.Params, Any]]  # (key, data) -> initial weights, problem
    loss: Callable[[optax.Params, Any, jax.Array], jax.Array]  # (parameters, problem, key of the batch)
    validation: Callable[[optax.Params, Any], jax.Array]  # (parameters, problem)
    center: int  # The exponent of sqrt(2) around which learning rates are searched.
    steps: int = 2000
    select: int = 4  # Seeds that choose a learning rate,
    seeds: int = 24  # and the most that evaluate it.

    def matrices(self) -> int:
        """How many numbers `ag.to_grid` stores: all except biases and gains."""
        params, _ = jax.eval_shape(self.start, jax.random.key(0), self.data())
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(is_stored(params)), strict=True)
        return sum(leaf.size for leaf, stored in pairs if stored)


def trainer(task: Task, arm: Arm) -> Callable[..., jax.Array]:
    """A jitted function of the data and of one array `[lanes]` of each of `HYPERPARAMETERS`.

    It gives the validation losses at the end, `[lanes]`. The learning rate rises from 0 over the share `warm_up` of
    the steps and falls to `end` of itself as a cosine; the gradient of step 5 is multiplied by `spike`.
    """

    def run(data, learning_rate, b1, b2, warm_up, end, spike, seed):
        rising = jnp.maximum(1, jnp.round(warm_up * task.steps))

        def schedule(step):
            falling = (1 + jnp.cos(jnp.pi * (step - rising) / (task.steps - rising))) / 2
            return learning_rate * jnp.where(step < rising, step / rising, end + (1 - end) * falling)

        key, batches = jax.random.split(jax.random.key(seed))
        tx = arm.optimizer(schedule, b1, b2, seed)
        params, problem = task.start(key, data)
        params = arm.store(params)

        def step(carry, i):
            params, state = carry
            gradient = jax.grad(task.loss)(arm.values(params), problem, jax.random.fold_in(batches, i))
            gradient = jax.tree.map(lambda g: g * jnp.where(i == 5, spike, 1), gradient)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(task.steps))
        return task.validation(arm.values(params), problem)

    return jax.jit(jax.vmap(run, in_axes=(None, *[0] * len(HYPERPARAMETERS))))


def bytes_per_weight(task: Task, arm: Arm) -> float:
    """Bytes of parameters and optimizer state for each number of a matrix."""

    def resident():
        params = arm.store(task.start(jax.random.key(0), task.data())[0])
        return params, arm.optimizer(lambda step: 1e-3, 0.9, 0.99, 0).init(params)

    kept = jax.tree.leaves(jax.eval_shape(resident))
    return round(sum(x.size * x.dtype.itemsize for x in kept) / task.matrices(), 3)
