"""A recipe against its model and mesh: everything that can be known before any compute."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hackle.layers.multiverse import Tags
from hackle.layers.stack import REMAT_POLICIES
from hackle.pjit_configs import ConfigError, Preset, describe_mesh, preset
from hackle.zoo import registry
from hackle.zoo.data import load_tokenizer
from hackle.zoo.errors import UserError
from hackle.zoo.local_path import local_path
from hackle.zoo.multiverse import MultiverseConfig, add_tags, as_multiverse
from hackle.zoo.parscale import retrofit
from hackle.zoo.train.checkpoint import RunFolder, differences
from hackle.zoo.train.corpora import BRANCHES, RANDOM, check_corpus, check_packing
from hackle.zoo.train.metrics import peak_flops, train_flops_per_token
from hackle.zoo.train.optimizer import decays
from hackle.zoo.train.recipe import REQUIRED, Recipe
from hackle.zoo.train.source import fields
from hackle.zoo.train.step import Program


@contextlib.contextmanager
def user_errors(before: str = "") -> Iterator[None]:
    """Turns errors about meshes and presets into `UserError`."""
    try:
        yield
    except ConfigError as error:
        raise UserError(f"{before}{error}") from None


class Plan:
    """What a run will do.

    Args:
      recipe: the run.
      devices: to use instead of all.

    Attributes:
      config: of the model, with the recipe's overrides.
      preset, mesh, program: how it runs.
      trunk: the run that the trunk is taken from, or None.
      flops_per_token: model FLOPs of a training step; see `metrics.py`.
      peak: FLOP/s of the mesh, or None where it is not known.

    Raises:
      UserError: the recipe does not fit the model, the mesh or the run that it starts from.
    """

    def __init__(self, recipe: Recipe, devices: list[jax.Device] | None = None):
        self.recipe = recipe
        check_corpus(recipe)
        check_packing(recipe)
        with user_errors():
            self.preset: Preset = preset(recipe.preset)
            self.mesh: Mesh = self.preset.mesh(devices)
        self.config = model_config(recipe, self.preset)
        entry = registry.entry(recipe.model)
        self.model_class = entry.model_class
        if recipe.export:
            try:  # now, and not when the run is over
                registry.FAMILIES[entry.family].params.write_config(self.config)
            except UserError as error:
                raise UserError(f"{error}; set export=false to train it all the same") from None
        # A recurrence has no range of positions.
        limit = getattr(self.config, "max_length", math.inf)
        if recipe.length > limit:
            raise UserError(
                f"length={recipe.length} exceeds the rotary range of {recipe.model}; "
                f"expected at most model.max_length={limit}"
            )
        if recipe.state_clip is not None and not hasattr(self.config, "recurrence"):
            raise UserError(
                f"state_clip={recipe.state_clip}: {recipe.model} has no recurrence; expected none"
            )
        self.trunk = None if recipe.start_from is None else Trunk(recipe, self.config)
        sources = () if self.trunk is None else (self.trunk.abstract,)
        with user_errors():
            try:
                self.program = Program(
                    self._make,
                    preset=self.preset,
                    mesh=self.mesh,
                    optimizer=recipe.optimizer(),
                    learning_rate=recipe.learning_rates(),
                    batch=recipe.batch,
                    length=recipe.length,
                    vocab_size=self.config.vocab_size,
                    mode=recipe.mode,
                    accumulate=recipe.accumulate,
                    z_loss=recipe.z_loss,
                    fields=fields(recipe),
                    sources=sources,
                )
            except (ConfigError, UserError):
                raise
            except ValueError as error:  # the model refuses its config
                raise UserError(f"{recipe.model}: {error}") from error
        chosen = {"attention": recipe.attention, "recurrence": recipe.recurrence}
        if recipe.packing == BRANCHES:  # not every model knows of them
            chosen["packing"] = recipe.packing
        said = ", ".join(f"{name}={one!r}" for name, one in chosen.items() if one is not None)
        if said:
            try:
                self.program.trace_step()
            except (ValueError, NotImplementedError) as error:
                raise UserError(f"{said}: {error}") from error
        self.flops_per_token = train_flops_per_token(
            self.config, recipe.length, frozen_trunk=recipe.mode == "frozen_trunk"
        )
        self.peak = peak_flops(list(self.mesh.devices.flat))

    def _make(self, rngs: nnx.Rngs, *trunk: nnx.State) -> nnx.Module:
        if not trunk:
            return self.model_class(self.config, rngs=rngs)
        assert self.trunk is not None
        dense: Any = nnx.merge(self.trunk.graph, trunk[0])
        if isinstance(self.config, MultiverseConfig):
            return self._with_tags(dense)
        return retrofit(
            dense,
            self.config.streams,
            prefix_length=self.config.prefix_length,
            smoothing=self.config.smoothing,
            remat=self.config.remat,
            attention=self.config.attention,
            rngs=rngs,
        )

    def _with_tags(self, trunk: Any) -> nnx.Module:
        """The Multiverse model of this run, with the weights of its trunk: those of its tags are
        the trunk's own, or made from words where a tokenizer tells which."""
        if not isinstance(trunk.config, MultiverseConfig):
            if self.recipe.tokenizer is None:
                trunk = as_multiverse(trunk, self.config.tags)
            else:
                trunk = add_tags(trunk, load_tokenizer(self.recipe.tokenizer), self.config.tags)
        if trunk.config.vocab_size != self.config.vocab_size:
            raise UserError(
                f"start_from={self.recipe.start_from!r}: with its tags the trunk has a table of "
                f"{trunk.config.vocab_size} rows; expected vocab_size={self.config.vocab_size}"
            )
        return self.model_class.with_state(self.config, nnx.state(trunk))

    def check_tags(self, tags: Tags | None) -> None:
        """Raises UserError where the model's tags are not those of the corpus."""
        own = getattr(self.config, "tags", tags)
        if self.recipe.packing == BRANCHES and own != tags:
            found, expected = (one and one.tokens()["<Think>"] for one in (own, tags))
            raise UserError(
                f"tags of {self.recipe.model} are not those of {self.recipe.corpus}: <Think> is "
                f"token {found}; expected {expected}"
            )

    def check_data(self, fingerprint: str) -> None:
        """Raises UserError where the trunk read other data than those that are to go on."""
        if self.trunk is None or not self.recipe.continue_data:
            return
        if self.trunk.identity["data"] != fingerprint:
            raise UserError(
                f"data cannot go on from {self.recipe.start_from!r}: the corpus has changed; "
                "set continue_data=false"
            )

    def identity(self, data_fingerprint: str) -> dict[str, Any]:
        """What a checkpoint remembers, and what a resumed run must agree with."""
        return {
            "recipe": self.recipe.to_json(),
            "model": {
                "class": self.model_class.__name__,
                # As a checkpoint gives it back: in JSON, tuples are lists.
                "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
            },
            "precision": dataclasses.asdict(self.preset.precision),
            "data": data_fingerprint,
        }

    def describe(self) -> list[str]:
        """Lines for people."""
        r, precision = self.recipe, self.preset.precision
        trainable, frozen = self.parameters()
        streams = getattr(self.config, "streams", 1)
        kind = "attention" if hasattr(self.config, "attention") else "recurrence"
        how = f"{kind} {getattr(self.config, kind) or 'chosen by device'}"
        idle = jax.device_count() - self.mesh.size
        rest = f"; {idle} more devices are idle, preset=any_fsdp takes all" if idle else ""
        lines = [
            f"model: {r.model} ({streams} stream{'s' * (streams > 1)}), "
            f"{trainable + frozen:,} parameters, {trainable:,} trainable, {frozen:,} frozen",
            f"mesh: {self.preset.name}: {describe_mesh(self.mesh)}{rest}",
            f"dtypes: parameters {precision.params}, compute {precision.compute}; "
            f"{how}; remat {self.config.remat}",
        ]
        if self.trunk is not None:
            lines.append(f"trunk: {self.trunk.folder.path}, step {self.trunk.step}")
        lines.append(
            f"plan: {r.steps:,} steps of {r.batch} x {r.length} = {r.batch * r.length:,} tokens"
            f"{f' in {r.accumulate} parts' if r.accumulate > 1 else ''}, {r.tokens:,} in all; "
            f"{r.schedule} learning rate {r.learning_rate:g}; "
            f"{self.flops_per_token / 1e6:,.1f} MFLOPs a token"
        )
        return lines

    def decay_groups(self) -> tuple[list[str], list[str]]:
        """Names of trainable parameters with and without weight decay."""
        paths = list(nnx.to_flat_state(self.program.abstract.trainable).paths)
        groups: tuple[list[str], list[str]] = ([], [])
        for path in paths:
            groups[0 if decays(path) else 1].append(".".join(map(str, path)))
        return groups

    def parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of frozen parameters."""

        def count(state: nnx.State) -> int:
            return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))

        return count(self.program.abstract.trainable), count(self.program.abstract.frozen)


def model_config(recipe: Recipe, preset: Preset) -> Any:
    """The config of the recipe's model: overrides, vocabulary, and how it runs filled in.

    Raises:
      UserError: unknown model or field, or a value of the wrong type.
    """
    entry = registry.entry(recipe.model)
    fields = {field.name: field for field in dataclasses.fields(entry.config)}
    for name, value in recipe.overrides.items():
        if name not in fields:
            raise UserError(
                f"unknown config field model.{name} of {recipe.model}; fields: {', '.join(fields)}"
            )
        own = {"vocab_size", *registry.EXECUTION} & {name}
        if own:
            raise UserError(f"model.{name}: set the recipe's own field {name} instead")
        old = getattr(entry.config, name)
        kinds = (int, float) if type(old) is float else (type(old),)
        if type(value) not in kinds:
            raise UserError(f"model.{name}={value!r}; expected {type(old).__name__}, as {old!r}")
    remat = preset.remat if recipe.remat == "preset" else recipe.remat
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat={remat!r}; expected preset or one of {', '.join(REMAT_POLICIES)}")
    config = dataclasses.replace(entry.config, **recipe.overrides, vocab_size=recipe.vocab_size)
    return registry.run_as(
        config, remat=remat, attention=recipe.attention, recurrence=recipe.recurrence
    )


class Trunk:
    """The finished run that a two-stage run starts from.

    Raises:
      UserError: no checkpoint, another model than the trunk of this one, or data that do not go
        on where `continue_data` wants them to.
    """

    def __init__(self, recipe: Recipe, config: Any):
        assert recipe.start_from is not None
        branching = isinstance(config, MultiverseConfig)
        if not branching and getattr(config, "streams", 1) < 2:
            raise UserError(
                "start_from needs a ParScale model of two or more streams, or a Multiverse model; "
                f"got {recipe.model}"
            )
        if recipe.start_from == REQUIRED:
            raise UserError(
                "this recipe starts from a trained P=1 run; give --set start_from=DIR, the --out "
                "of that run"
            )
        self.folder = RunFolder(local_path(recipe.start_from, "start_from"))
        step = self.folder.latest()
        if step is None:
            hint = "; it is a published model: scripts/convert.py import makes a run of it"
            published = (self.folder.path / "config.json").is_file()
            raise UserError(
                f"start_from={recipe.start_from!r} holds no finished checkpoint{hint * published}"
            )
        self.step = step
        self.identity = self.folder.identity(step)
        whole = self.identity["recipe"]["steps"]
        if self.identity["data"] != "unknown" and step < whole:  # unknown: an imported model
            raise UserError(
                f"start_from={recipe.start_from!r} stopped at step {step} of {whole}; "
                "finish it first"
            )
        theirs = dict(self.identity["model"]["config"])
        ours = dataclasses.asdict(config)
        if theirs.get("streams", 1) != 1:
            raise UserError(
                f"start_from={recipe.start_from!r} has {theirs['streams']} streams; expected 1"
            )
        # What is the run's own, or checked where the trunk's weights are taken over.
        free = ["streams", "prefix_length", "smoothing", "embedding_std", *registry.EXECUTION]
        free += (
            ["tags", "vocab_size", "max_length"]
            if branching
            else ["qkv_bias", "qk_norm", "rope_scaling"]
        )
        for name in free:
            theirs.pop(name, None)
            ours.pop(name, None)
        if found := differences(theirs, ours):
            raise UserError(f"start_from={recipe.start_from!r} is no trunk of this model: {found}")
        if recipe.continue_data and recipe.corpus != RANDOM:
            names = ("corpus", "tokenizer", "vocab_size", "batch", "length", "packing", "seed")
            before, now = self.identity["recipe"], recipe.to_json()
            if found := differences({n: before[n] for n in names}, {n: now[n] for n in names}):
                raise UserError(
                    f"data cannot go on from {recipe.start_from!r}: {found}; "
                    "make them equal or set continue_data=false"
                )
        self.graph, self.abstract = nnx.split(self.folder.abstract_model(self.step))
