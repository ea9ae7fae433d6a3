"""Checkpoints of a run: written whole or not at all, and continued only as what they are.

    OUT/checkpoints/<step>/     one directory a checkpoint, renamed into place when it is complete
        parameters/             by dotted name, trainable and frozen alike
        rest/                   counters, key and optimiser
        _CHECKPOINT_METADATA    format version, identity of the run, place in the data

Names do not depend on classes of flax or optax, and shardings are no part of a file: a checkpoint
loads onto any mesh.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from hackle.pjit_configs import Preset
from hackle.zoo import registry
from hackle.zoo.errors import UserError
from hackle.zoo.local_path import local_path
from hackle.zoo.train.recipe import FREE_ON_RESUME
from hackle.zoo.train.step import TrainState

FORMAT_VERSION = 1
METADATA_FILE = "_CHECKPOINT_METADATA"
_MODEL_FREE = frozenset(registry.EXECUTION)


class RunFolder:
    """The folder of a run, for reading.

    Raises:
      UserError: the path is a URL.
    """

    def __init__(self, path: str | Path):
        self.path = local_path(path, "run folder")
        self.checkpoints = self.path / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(
            int(entry.name)
            for entry in self.checkpoints.iterdir()
            # Incomplete ones have another name until they are complete.
            if entry.name.isdecimal() and (entry / METADATA_FILE).is_file()
        )

    def latest(self) -> int | None:
        """Step of the last complete checkpoint, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays: "identity" and "data".

        Raises:
          UserError: damaged, or of another format.
        """
        path = self.checkpoints / str(step)
        try:  # orbax would take what it cannot parse for no metadata
            text = (path / METADATA_FILE).read_text(encoding="utf-8")
            found = json.loads(text)["custom_metadata"]
            version = found["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, error) from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"checkpoint {path} has format version {version!r}; expected {FORMAT_VERSION}"
            )
        return found

    def identity(self, step: int) -> dict[str, Any]:
        """`Plan.identity` of the run that saved the checkpoint."""
        return self.metadata(step)["identity"]

    def abstract_model(self, step: int) -> nnx.Module:
        """The model of the checkpoint, without arrays.

        Raises:
          UserError: its class is not in the zoo, or has other config fields now.
        """
        model = self.identity(step)["model"]
        for family in registry.FAMILIES.values():
            if family.model_class.__name__ == model["class"]:
                break
        else:
            raise UserError(f"{self.path}: no model class {model['class']!r} in the zoo")
        try:
            config = family.config_class(**model["config"])
            return nnx.eval_shape(lambda: family.model_class(config, rngs=nnx.Rngs(0)))
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path}: config of {model['class']}: {error}") from error

    def parameters(self, step: int, abstract: nnx.State) -> nnx.State:
        """The parameters of a checkpoint in the structure of `abstract`, whose leaves may carry
        shardings.

        Raises:
          UserError: the checkpoint is damaged, or has other parameters.
        """
        names, _ = _named(abstract)
        found = _load(self.checkpoints / str(step), parameters=names)
        return _renamed(abstract, found["parameters"])


def load_model(
    run: str | Path,
    *,
    step: int | None = None,
    preset: Preset | None = None,
    dtype: Any = None,
) -> Any:
    """The model of a run folder, with trained parameters.

    Args:
      run: what `scripts/train.py --out` was given.
      step: of the checkpoint; None is the last one.
      preset: where to place the parameters; None is one device.
      dtype: of the parameters; None as stored.

    Raises:
      UserError: no such checkpoint, or a damaged one.
    """
    folder = RunFolder(run)
    steps = folder.steps()
    if not steps or (step is not None and step not in steps):
        wanted = "complete checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{run} holds no {wanted}; steps: {steps or 'none'}")
    step = steps[-1] if step is None else step
    graph, state = nnx.split(folder.abstract_model(step))
    if preset is None:
        placed = jax.tree.map(lambda _: None, state)
    else:
        placed = preset.shardings(state)
    state = folder.parameters(step, with_shardings(state, placed))
    if dtype is not None:
        state = jax.tree.map(lambda x: x.astype(dtype), state)
    return nnx.merge(graph, state)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """`abstract` with the sharding of each array; None is the default device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves, tree = jax.tree.flatten(abstract)
    places = jax.tree.leaves(shardings) or [one] * len(leaves)
    return jax.tree.unflatten(tree, [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for leaf, place in zip(leaves, places, strict=True)
    ])  # fmt: skip


class Checkpoints:
    """Writes and restores the checkpoints of one run.

    Saving returns as soon as the arrays are copied; only one save is under way at a time. After
    each, all but the last `keep` are removed.

    Args:
      folder: of the run.
      identity: `Plan.identity`.
    """

    def __init__(self, folder: RunFolder, identity: Mapping[str, Any], keep: int):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every file
        self.folder = folder
        self._identity = dict(identity)
        policies = ocp.training.preservation_policies
        self._writer = ocp.training.Checkpointer(
            folder.checkpoints.absolute(),
            preservation_policy=policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: TrainState, data: Any) -> None:
        """Saves `state` after `step` steps, with the place in the data that follows it.

        Does nothing when this step is saved already. Raises what an earlier save failed with.
        """
        if any(found.step == step for found in self._writer.checkpoints):
            return
        parameters, rest = _divide(state)
        self._writer.save_checkpointables_async(
            step,
            {"parameters": _named(parameters)[0], "rest": _named(rest)[0]},
            force=True,
            custom_metadata={
                "format_version": FORMAT_VERSION,
                "identity": self._identity,
                "data": data,
            },
        )

    def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
        """The state of a checkpoint, on this run's mesh.

        Raises:
          UserError: the checkpoint is damaged.
        """
        state = with_shardings(abstract, shardings)
        parameters, rest = _divide(state)
        found = _load(
            self.folder.checkpoints / str(step),
            parameters=_named(parameters)[0],
            rest=_named(rest)[0],
        )
        trainable, frozen = _renamed(parameters, found["parameters"])
        counters = _renamed(rest, found["rest"])
        return TrainState(**counters, trainable=trainable, frozen=frozen)

    def wait(self) -> None:
        """Until the save under way is complete."""
        self._writer.wait()

    def close(self) -> None:
        self._writer.close()


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raises UserError when a run may not go on from a checkpoint, naming every difference.

    Recipe fields in `FREE_ON_RESUME`, and how the model is executed, may differ.
    """
    if saved["model"]["class"] != now["model"]["class"] or (
        found := differences(saved["model"]["config"], now["model"]["config"], _MODEL_FREE)
    ):
        found = differences(
            {"class": saved["model"]["class"], **saved["model"]["config"]},
            {"class": now["model"]["class"], **now["model"]["config"]},
            _MODEL_FREE,
        )
        raise UserError(f"checkpoint {where} is of another model: {found}")
    found = differences(saved["recipe"], now["recipe"], FREE_ON_RESUME)
    if saved["precision"] != now["precision"]:
        precision = differences(saved["precision"], now["precision"])
        found = "; ".join(filter(None, [found, f"precision of the preset: {precision}"]))
    if not found and saved["data"] != now["data"]:
        found = f"content of corpus {now['recipe']['corpus']!r} has changed"
    if found:
        raise UserError(
            f"checkpoint {where} is of another recipe: {found}; use another --out, or that recipe"
        )


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], free: frozenset[str] = frozenset()
) -> str:
    """ "name: saved X, now Y" for each field that differs, or an empty text."""
    return "; ".join(
        f"{name}: saved {saved.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*saved, *now])
        if name not in free and saved.get(name) != now.get(name)
    )


def _divide(state: TrainState) -> tuple[Any, dict[str, Any]]:
    rest = state._asdict()
    return (rest.pop("trainable"), rest.pop("frozen")), rest


def _named(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by dotted name, and the tree structure.

    A tuple at the root (the two groups of parameters) leaves no trace in the names.
    """
    roots = tree if type(tree) is tuple else (tree,)
    named = {}
    for root in roots:
        for path, leaf in jax.tree_util.tree_leaves_with_path(root):
            name = _dotted(path)
            assert name not in named, name
            named[name] = leaf
    return named, jax.tree.structure(tree)


def _renamed(like: Any, named: Mapping[str, Any]) -> Any:
    names, tree = _named(like)
    return jax.tree.unflatten(tree, [named[name] for name in names])


def _dotted(path: tuple[Any, ...]) -> str:
    # The last entry of a parameter is the value of its nnx.Variable; as a key, "value" is a name.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _load(path: Path, **abstract: Any) -> dict[str, Any]:
    try:
        return ocp.load_checkpointables(path.absolute(), abstract)
    except Exception as error:
        if isinstance(_first(error), MemoryError | jax.errors.JaxRuntimeError):
            raise  # of the device, whatever the folder holds
        raise _unreadable(path, error) from error


def _first(error: BaseException) -> BaseException:
    """What was found first: orbax speaks of handlers where a file is damaged."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _unreadable(path: Path, error: BaseException) -> UserError:
    first = _first(error)
    text = str(first).strip().splitlines()
    return UserError(
        f"checkpoint {path} cannot be read and may be damaged: {type(first).__name__}: "
        f"{text[0][:300] if text else ''}; delete this folder to go on from the checkpoint before "
        "it, or from the start"
    )
