"""on_grid around the optimizers of optax and optax.contrib, with 8 fraction bits, against float32 master weights.

Left out, with the reason: `optax.lbfgs` (a line search, refused by on_grid), `optax.contrib.sophia` (needs the loss
itself for its Hessian, through arguments of its own) and `optax.contrib.dog` (its step is the distance from the start
over the norm of the gradients: from a start on the grid the first steps differ only by the rounding, and it does not
converge in 50 steps).
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib
from quick import some

import altgrad_jax as ag

OPTIMIZERS = {
    "adabelief": lambda: optax.adabelief(1e-2),
    "adadelta": lambda: optax.adadelta(1.0),
    "adafactor": lambda: optax.adafactor(1e-2),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(1e-2),
    "adamax": lambda: optax.adamax(1e-2),
    "adamaxw": lambda: optax.adamaxw(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "adan": lambda: optax.adan(1e-2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "fromage": lambda: optax.fromage(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "lars": lambda: optax.lars(1.0),
    "lion": lambda: optax.lion(3e-3),
    "manifold_adamw": lambda: ag.manifold_adamw(1e-2, format="float8_e4m3fn"),
    "nadam": lambda: optax.nadam(1e-2),
    "nadamw": lambda: optax.nadamw(1e-2),
    "novograd": lambda: optax.novograd(1e-2),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.05),
    "polyak_sgd": lambda: optax.polyak_sgd(1.0),
    "radam": lambda: optax.radam(1e-2),
    "rmsprop": lambda: optax.rmsprop(5e-3),
    "rprop": lambda: optax.rprop(1e-3),
    "sgd": lambda: optax.sgd(0.1),
    "sgd momentum": lambda: optax.sgd(0.05, 0.9),
    "sgd nesterov": lambda: optax.sgd(0.05, 0.9, nesterov=True),
    "sign_sgd": lambda: optax.sign_sgd(3e-3),
    "sm3": lambda: optax.sm3(0.1),
    "yogi": lambda: optax.yogi(1e-2),
    "contrib.ademamix": lambda: contrib.ademamix(1e-2),
    "contrib.cocob": lambda: contrib.cocob(),
    "contrib.dadapt_adamw": lambda: contrib.dadapt_adamw(1.0),
    "contrib.momo_adam": lambda: contrib.momo_adam(1e-2),
    "contrib.muon": lambda: contrib.muon(1e-2),
    "contrib.prodigy": lambda: contrib.prodigy(1.0),
    "contrib.schedule_free_adamw": lambda: contrib.schedule_free_adamw(1e-2, warmup_steps=5),
}
# Their moments are in the fields that compress_state knows; those of sm3 are in others.
COMPRESSED = {
    name: {}
    for name in (
        "adabelief",
        "adam",
        "adamax",
        "adamaxw",
        "adamw",
        "amsgrad",
        "lamb",
        "lars",
        "lion",
        "manifold_adamw",
        "nadam",
        "nadamw",
        "novograd",
        "radam",
        "rmsprop",
        "yogi",
        "contrib.ademamix",
        "contrib.muon",
        "contrib.schedule_free_adamw",
    )
} | {"sgd momentum": {}, "sgd nesterov": {}, "sm3": {"first": ("nu",), "second": ()}}
FORMAT = "float8_e4m3fn"
QUICK = ("adamw", "sm3", "contrib.schedule_free_adamw")


@functools.cache
def task():
    """A teacher, a student of another initialization, stored with 8 fraction bits, and the loss of its values."""

    def network(keys):
        return {
            "in": jax.random.normal(keys[0], (8, 16)) / 8**0.5,
            "bias": 0.1 * jax.random.normal(keys[1], (16,)),
            "out": jax.random.normal(keys[2], (16, 4)) / 4,
        }

    def forward(params, x):
        return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]

    keys = jax.random.split(jax.random.key(0), 7)
    x = jax.random.normal(keys[6], (256, 8))
    y = forward(network(keys[:3]), x)
    student = ag.to_grid(network(keys[3:6]), FORMAT, fraction_bits=8)
    return student, lambda params: jnp.mean((forward(params, x) - y) ** 2)


def final_loss(tx, params, values, loss):
    """Loss after 50 steps of gradients with respect to the values that the parameters have in the forward pass."""

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(values(params))
        updates, state = tx.update(gradients, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=50))((params, tx.init(params)))
    return float(loss(values(params)))


@functools.cache
def master_loss(name):
    """Loss that the optimizer reaches with float32 master weights of the same values in the forward pass."""
    student, loss = task()

    def fake_quantized(params):
        return jax.tree.map(
            lambda q, w: ag.fake_quantize(w, FORMAT, q.scale) if isinstance(q, ag.GridArray) else w,
            student,
            params,
            is_leaf=lambda leaf: isinstance(leaf, ag.GridArray),
        )

    tx = optax.with_extra_args_support(OPTIMIZERS[name]())
    master = final_loss(tx, ag.from_grid(student, full=True), fake_quantized, loss)
    assert master < 0.6 * float(loss(ag.from_grid(student))), "The task must be one that the optimizer learns."
    return master


@pytest.mark.parametrize("name", some(OPTIMIZERS, QUICK.__contains__))
def test_reaches_the_loss_of_float32_master_weights(name):
    student, loss = task()
    stored = final_loss(ag.on_grid(OPTIMIZERS[name]()), student, ag.from_grid, loss)
    assert stored <= 1.1 * master_loss(name), (stored, master_loss(name))


@pytest.mark.parametrize("name", some(COMPRESSED, "sm3".__eq__))
def test_reaches_it_with_moments_in_one_byte(name):
    student, loss = task()
    tx = ag.compress_state(ag.on_grid(OPTIMIZERS[name]()), min_size=1, **COMPRESSED[name])
    stored = final_loss(tx, student, ag.from_grid, loss)
    assert stored <= 1.1 * master_loss(name), (stored, master_loss(name))
