"""Training of small models on a task from several seeds, with everything on the device.

A batch of 16 short rows is far too little work to send to a device step by step, so all steps
between two checks are one compiled scan over rows that lie there.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hackle.zoo.tasks.settings import Settings
from hackle.zoo.tasks.task import Rows, Task
from hackle.zoo.train.loss import token_losses
from hackle.zoo.train.optimizer import AdamW, schedule

# Rows of an evaluation that are in memory at once, for every seed.
EVALUATED = 500


@dataclasses.dataclass(frozen=True)
class Check:
    """One look at all seeds: training loss since the last, and accuracy on the held-out rows."""

    epoch: int
    loss: list[float]
    accuracy: list[float]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
      accuracy: share of right answers on the test rows, by seed.
      checks: in order; the last one is where the training stopped.
      params: state of the models, with a leading axis of seeds.
      seconds: from the first step to the last check.
    """

    accuracy: list[float]
    checks: list[Check]
    params: Any
    seconds: float

    @property
    def best(self) -> float:
        return max(self.accuracy)


def train(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    task: Task,
    settings: Settings,
    *,
    tell: Callable[[Check], bool | None] = lambda check: None,
) -> Outcome:
    """Trains until a seed answers all held-out rows, or to the last epoch; then tests.

    Args:
      make_model: a model `tokens [B, T] -> logits [B, T, C]` of random numbers.
      tell: called with every check; True ends the training.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
    keys = jax.random.split(jax.random.key(settings.seed), settings.seeds)
    params = jax.jit(jax.vmap(lambda key: nnx.state(make_model(nnx.Rngs(key)))))(keys)
    steps = settings.train_rows // settings.batch
    optimizer = AdamW(
        beta2=0.999,
        weight_decay=settings.weight_decay,
        clip=None,
        state_clip=settings.state_clip,
    ).transform(schedule("cosine", settings.learning_rate, steps=settings.epochs * steps))
    moments = jax.jit(jax.vmap(optimizer.init))(params)

    def loss(params, rows):
        nll, _, _ = token_losses(nnx.merge(graph, params)(rows["tokens"]), rows["targets"])
        return jnp.sum(nll * rows["mask"]) / jnp.sum(rows["mask"])

    def epoch(state, key, rows):
        def step(state, chosen):
            params, moments = state
            value, gradient = jax.value_and_grad(loss)(
                params, jax.tree.map(lambda array: array[chosen], rows)
            )
            updates, moments = optimizer.update(gradient, moments, params)
            params = optax.apply_updates(params, updates)
            return (params, moments), value

        order = jax.random.permutation(key, settings.train_rows)[: steps * settings.batch]
        state, losses = jax.lax.scan(step, state, order.reshape(steps, settings.batch))
        return state, losses.mean()

    # Seeds go one after the other: a kernel that fills the chip gains nothing from `vmap`, and
    # not every one has it.
    @partial(jax.jit, donate_argnums=0)
    def epochs(state, keys, rows):
        one = lambda state, keys: jax.lax.scan(partial(epoch, rows=rows), state, keys)
        state, losses = jax.lax.map(lambda x: one(*x), (state, keys))
        return state, losses.mean(axis=1)

    @jax.jit
    def right_answers(params, rows):
        def count(params):
            logits = nnx.merge(graph, params)(rows["tokens"])
            return jnp.sum(token_losses(logits, rows["targets"])[2] * rows["mask"])

        return jax.lax.map(count, params)

    def accuracy(params, rows: Rows) -> list[float]:
        right = sum(np.asarray(right_answers(params, part), np.int64) for part in _parts(rows))
        return [float(count) for count in right / rows["mask"].sum()]

    rows = jax.device_put(task.rows("train", 0, settings.train_rows, seed=settings.seed))
    held_out = task.rows("validation", 0, settings.held_out_rows, seed=settings.seed)
    state, checks, start = (params, moments), [], time.monotonic()
    last = settings.stop_after or settings.epochs
    for first in range(0, last, settings.check_every):
        after = min(first + settings.check_every, last)
        state, losses = epochs(state, order_keys(settings, first, after), rows)
        check = Check(after, losses.tolist(), accuracy(state[0], held_out))
        checks.append(check)
        if tell(check) or max(check.accuracy) == 1:
            break
    seconds = time.monotonic() - start
    test = task.rows("test", 0, settings.test_rows, seed=settings.seed)
    return Outcome(accuracy(state[0], test), checks, state[0], seconds)


def order_keys(settings: Settings, first: int, after: int) -> jax.Array:
    """Keys `[seeds, after - first]` of the row orders, each of its seed and epoch alone."""
    of_epochs = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    of_seeds = jax.vmap(of_epochs, in_axes=(0, None))
    start = jax.random.key(settings.seed + 1)
    return of_seeds(of_epochs(start, jnp.arange(settings.seeds)), jnp.arange(first, after))


def _parts(rows: Rows) -> Iterator[Rows]:
    for first in range(0, len(rows["tokens"]), EVALUATED):
        yield {name: array[first : first + EVALUATED] for name, array in rows.items()}
