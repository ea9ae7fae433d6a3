"""The training step: one pure function of (state, batch) under `jax.jit` with shardings."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from hackle.layers.multiverse import BranchStructure
from hackle.layers.sharding import axis_rules
from hackle.pjit_configs import Preset, batch_sharding, bytes_per_device, check_batch, replicated
from hackle.zoo.errors import UserError
from hackle.zoo.parscale import is_stream_parameter
from hackle.zoo.train.loss import (
    MAX_LOGITS,
    LossSums,
    loss_pieces,
    next_token_loss,
    next_tokens,
)
from hackle.zoo.train.optimizer import AdamW, Schedule

Batch = Mapping[str, jax.Array]
MODES = ("all", "frozen_trunk")
FIELDS: Mapping[str, tuple[int, ...]] = {"tokens": (), "positions": (), "segment_ids": ()}


class TrainState(NamedTuple):
    """Everything that a step changes, and the frozen parameters."""

    step: jax.Array
    """int32: batches seen, skipped ones too."""
    skipped: jax.Array
    """int32: batches whose loss or gradient was not finite."""
    skipped_in_row: jax.Array
    """int32: how many of the last batches, without a gap."""
    key: jax.Array
    """Random key of the run; whatever needs randomness folds in the step and the row."""
    trainable: nnx.State
    frozen: nnx.State
    optimizer: Any


class Metrics(NamedTuple):
    """Float32 or int32 scalars of one step."""

    loss: jax.Array
    """Mean -log p(target) in nats."""
    z: jax.Array
    """Mean log(Z)^2, without its coefficient."""
    accuracy: jax.Array
    grad_norm: jax.Array
    """Global norm before clipping."""
    learning_rate: jax.Array
    targets: jax.Array
    """Tokens that were predicted."""
    skipped: jax.Array
    skipped_in_row: jax.Array


class EvalSums(NamedTuple):
    """Sums over one batch; add them up over batches and divide by `targets`."""

    nll: jax.Array
    correct: jax.Array
    targets: jax.Array


def trainable_filter(mode: str) -> Callable[[tuple, Any], bool]:
    """Which parameters a mode trains: "all", or "frozen_trunk" (prefixes and aggregator only).

    Raises:
      UserError: unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "all":
        return lambda path, v: isinstance(v, nnx.Param)
    return lambda path, v: isinstance(v, nnx.Param) and is_stream_parameter(path)


class Program:
    """The compiled functions of one run, and where their arrays live.

    `init`, `step` and `evaluate` are pure; only this object knows the mesh.

    Args:
      make: `make(rngs, *sources) -> model`, called inside jit; the model has `.features` and
        `.logits`. `sources` are pytrees of arrays that it builds on, e.g. a trained trunk.
      preset: mesh rules and dtypes.
      mesh: `preset.mesh()`, or another one with the five axes.
      optimizer, learning_rate: see `optimizer.py`. The learning rate counts updates that were
        made; a skipped step is not one.
      mode: see `trainable_filter`.
      batch, length: shape of the arrays of a batch, over all processes.
      accumulate: microbatches of a step. The update equals that of the whole batch at once.
      z_loss: coefficient of the mean log(Z)^2.
      max_logits: bound of float32 logits held at once on a device; see `loss.loss_pieces`.
      fields: arrays of a batch and their axes after `[B, L]`, for tracing without one; see
        `source.fields`.
      sources: abstract arrays, as `make` takes them.

    Raises:
      UserError: the batch does not fit the mesh, or nothing is trainable.
      ConfigError: parameters do not fit the mesh; names the parameter.
    """

    def __init__(
        self,
        make: Callable[..., nnx.Module],
        *,
        preset: Preset,
        mesh: Mesh,
        optimizer: AdamW,
        learning_rate: Schedule,
        batch: int,
        length: int,
        vocab_size: int,
        mode: str = "all",
        accumulate: int = 1,
        z_loss: float = 0.0,
        max_logits: int = MAX_LOGITS,
        fields: Mapping[str, tuple[int, ...]] = FIELDS,
        sources: tuple[Any, ...] = (),
    ):
        if accumulate < 1 or batch % accumulate:
            raise UserError(f"batch={batch} does not divide into accumulate={accumulate} parts")
        check_batch(mesh, batch // accumulate, length)
        self.mesh, self.preset, self.mode = mesh, preset, mode
        self.batch, self.length, self.accumulate = batch, length, accumulate
        self._fields = fields
        self._make = make
        self._filter = trainable_filter(mode)
        self._learning_rate, self._z_loss = learning_rate, z_loss
        self._transform = optimizer.transform(learning_rate)
        self._compute = jnp.dtype(preset.precision.compute)
        rows = batch // accumulate // (mesh.shape["data"] * mesh.shape["fsdp"])
        split = mesh.shape["seq"] * mesh.shape["tensor"]
        self.loss_pieces = loss_pieces(rows, length, -(-vocab_size // split), max_logits)

        key = jax.eval_shape(lambda: jax.random.key(0))
        self.graph, *_ = jax.eval_shape(self._split, key, *sources)
        self.abstract: TrainState = jax.eval_shape(self._init, key, *sources)
        if not jax.tree.leaves(self.abstract.trainable):
            raise UserError(f"mode {mode!r} trains prefixes and aggregator, but the model has none")
        self.shardings: TrainState = preset.shardings(self.abstract, mesh)
        self.batch_sharding = batch_sharding(mesh)
        whole = replicated(mesh)
        self._jit_init = jax.jit(self._init, out_shardings=self.shardings)
        self._jit_step = jax.jit(
            self._step,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )
        self._jit_evaluate = jax.jit(
            self._evaluate,
            in_shardings=(self.shardings.trainable, self.shardings.frozen, self.batch_sharding),
            out_shardings=whole,
        )

    # What a run calls.

    def init(self, seed: int, *sources: Any) -> TrainState:
        """A fresh state, made in place: no unsharded array ever exists."""
        with jax.set_mesh(self.mesh):
            return self._jit_init(jax.random.key(seed), *sources)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update; `state` is donated. Returns at once, before the device is done."""
        with jax.set_mesh(self.mesh):
            return self._jit_step(state, dict(batch))

    def evaluate(self, state: TrainState, batch: Batch) -> EvalSums:
        """Loss of one batch, without an update."""
        with jax.set_mesh(self.mesh):
            return self._jit_evaluate(state.trainable, state.frozen, dict(batch))

    def model(self, state: TrainState) -> nnx.Module:
        """The model with the parameters of `state`, shared and not copied."""
        return nnx.merge(self.graph, state.trainable, state.frozen)

    def trace_step(self) -> jax.stages.Traced:
        """The step traced for abstract arrays; `.lower().compile()` gives its HLO and memory."""
        batch = {
            name: jax.ShapeDtypeStruct((self.batch, self.length, *rest), jnp.int32)
            for name, rest in self._fields.items()
        }
        with jax.set_mesh(self.mesh):
            return self._jit_step.trace(self.abstract, batch)

    def device_bytes(self) -> dict[str, int]:
        """Bytes on one device, from the shardings: parameters, optimiser, gradients, cast copy."""

        def count(field: str) -> int:
            return bytes_per_device(getattr(self.abstract, field), getattr(self.shardings, field))

        trainable, frozen = count("trainable"), count("frozen")
        kept = jnp.dtype(self.preset.precision.params).itemsize
        cast = 0 if self._compute.itemsize == kept else self._compute.itemsize
        return {
            "parameters": trainable + frozen,
            "optimizer": count("optimizer"),
            "gradients": trainable * (1 if self.accumulate == 1 else 2),
            "compute copy": (trainable + frozen) // kept * cast,
        }

    # Pure functions.

    def _split(self, key: jax.Array, *sources: Any):
        model = self._make(nnx.Rngs(params=key), *sources)
        kept = jnp.dtype(self.preset.precision.params)
        graph, *states = nnx.split(model, self._filter, ...)
        trainable, frozen = states
        return graph, _cast(trainable, kept), _cast(frozen, kept)

    def _init(self, key: jax.Array, *sources: Any) -> TrainState:
        _, trainable, frozen = self._split(jax.random.fold_in(key, 0), *sources)
        # Three arrays, not one thrice: a buffer can be donated only once.
        step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(
            step,
            skipped,
            in_row,
            jax.random.fold_in(key, 1),
            trainable,
            frozen,
            self._transform.init(trainable),
        )

    def _sums(self, trainable: nnx.State, frozen: nnx.State, batch: Batch) -> LossSums:
        """Loss sums of one (micro)batch, in the compute dtype."""
        with axis_rules(self.preset.rules):
            kept = nnx.merge(self.graph, trainable, frozen)
            model = nnx.merge(
                self.graph, _cast(trainable, self._compute), _cast(frozen, self._compute)
            )
            targets, weights = next_tokens(batch)
            features = model.features(
                batch["tokens"],
                positions=batch.get("positions"),
                segment_ids=batch.get("segment_ids"),
                branches=branches_of(batch),
            )
            # The head takes the kept parameters and casts them itself, piece by piece, so that
            # its gradient adds up over the pieces in the kept dtype.
            return next_token_loss(features, targets, weights, kept.logits, pieces=self.loss_pieces)

    def _gradients(self, state: TrainState, batch: Batch) -> tuple[nnx.State, LossSums]:
        """Gradient of the summed loss, and the sums."""

        def objective(trainable, part):
            sums = self._sums(trainable, state.frozen, part)
            return sums.nll + self._z_loss * sums.z, sums

        gradient = jax.grad(objective, has_aux=True)
        if self.accumulate == 1:
            return gradient(state.trainable, batch)

        def split(x: jax.Array) -> jax.Array:
            # Rows i, i + A, ...: a device splits its own rows, and none moves to another device.
            x = x.reshape(-1, self.accumulate, *x.shape[1:])
            return jnp.moveaxis(x, 1, 0)

        def body(total, part):
            part = jax.lax.with_sharding_constraint(part, self.batch_sharding)
            return jax.tree.map(jnp.add, total, gradient(state.trainable, part)), None

        zeros = jax.tree.map(
            jnp.zeros_like,
            jax.eval_shape(gradient, state.trainable, jax.tree.map(lambda x: split(x)[0], batch)),
        )
        grads = jax.lax.with_sharding_constraint(zeros[0], self.shardings.trainable)
        return jax.lax.scan(body, (grads, zeros[1]), jax.tree.map(split, batch))[0]

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        targets = jnp.sum(next_tokens(batch)[1])
        count = jnp.maximum(targets, 1.0)
        grads, sums = self._gradients(state, batch)
        grads = jax.tree.map(lambda g: g / count, grads)
        loss, norm = sums.nll / count, optax.tree.norm(grads)
        # The norm is finite only if every gradient is.
        finite = jnp.isfinite(loss + self._z_loss * sums.z) & jnp.isfinite(norm)
        updates, moments = self._transform.update(grads, state.optimizer, state.trainable)
        moved = optax.apply_updates(state.trainable, updates)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        new = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            key=state.key,
            trainable=keep(moved, state.trainable),
            frozen=state.frozen,
            optimizer=keep(moments, state.optimizer),
        )
        metrics = Metrics(
            loss=loss,
            z=sums.z / count,
            accuracy=sums.correct / count,
            grad_norm=norm,
            learning_rate=jnp.asarray(self._learning_rate(state.step - state.skipped), jnp.float32),
            targets=targets,
            skipped=new.skipped,
            skipped_in_row=new.skipped_in_row,
        )
        return new, metrics

    def _evaluate(self, trainable: nnx.State, frozen: nnx.State, batch: Batch) -> EvalSums:
        sums = self._sums(trainable, frozen, batch)
        return EvalSums(sums.nll, sums.correct, jnp.sum(next_tokens(batch)[1]))


def branches_of(batch: Batch) -> BranchStructure | None:
    """The branches of a batch as models take them, where it has any: depth before tokens."""
    if "block" not in batch:
        return None
    block, path = (jnp.moveaxis(batch[name], 2, 1) for name in ("block", "path"))
    return BranchStructure(block, path, batch["positions"])  # type: ignore[arg-type]


def _cast(tree: Any, dtype: jnp.dtype) -> Any:
    def of_leaf(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(of_leaf, tree)
