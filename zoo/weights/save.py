"""`save_pretrained`: a model as a published folder, one tensor in host memory at a time."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from hackle.zoo import registry
from hackle.zoo.errors import UserError
from hackle.zoo.local_path import local_path
from hackle.zoo.weights.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    Parameter,
    parameters,
)
from hackle.zoo.weights.tensor_file import floating, write_file


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    parameter: Parameter
    layer: int | None

    def fetch(self) -> np.ndarray:
        value = self.parameter.variable.get_value()
        if self.layer is not None:
            value = _layer(value, self.layer)
        return self.parameter.row.to_published(np.asarray(value))


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    dtype: DTypeLike | None = "float32",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
    files: Iterable[str | Path] = (),
) -> None:
    """Writes a model as a published folder: safetensors, their index if sharded, config.json.

    The folder appears complete or not at all: everything is written beside it under a temporary
    name, flushed, and renamed.

    Args:
      model: a model of the zoo; its parameters may be sharded over the devices of this process.
      folder: must not exist, or be empty, unless `overwrite`.
      dtype: of all tensors; float32 as in the released files. None keeps the model's.
      max_shard_bytes: a file holds at most this many bytes of data, and at least one tensor.
      overwrite: replace a checkpoint; other files of the folder, such as a tokenizer, stay.
      extra: fields of config.json that do not concern the model, e.g. `eos_token_id`.
      files: to copy into the folder, e.g. a tokenizer.json.

    Raises:
      UserError: the folder holds something already, cannot be written, or the disk is too small;
        the model's config has no published form; an `extra` field concerns the model.
    """
    family = registry.family_of(model)
    fields = family.params.write_config(model.config)
    misplaced = sorted(set(extra or ()) - set(family.params.IGNORED))
    if misplaced:
        raise UserError(f"extra config fields {', '.join(misplaced)} would change the model")
    tensors, kind = _tensors(model, family), None if dtype is None else floating(dtype)
    if kind is None:
        kinds = {np.dtype(t.parameter.variable.get_value().dtype) for t in tensors}
        if len(kinds) > 1:
            said = ", ".join(sorted(map(str, kinds)))
            raise UserError(f"parameters differ in dtype ({said}); choose one with dtype=")
        kind = kinds.pop()
    fields |= {"torch_dtype": str(kind), **(extra or {})}
    shards = _shards(tensors, kind.itemsize, max_shard_bytes)

    check_target(folder, overwrite)
    target = Path(os.path.realpath(local_path(folder, "folder")))
    temporary = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    try:
        _check_space(temporary, sum(math.prod(t.shape) for t in tensors) * kind.itemsize)
        _write(temporary, fields, shards, kind)
        for file in files:
            shutil.copyfile(file, temporary / Path(file).name)
        _replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensors(model: Any, family: registry.Family) -> list[_Tensor]:
    """All published tensors of a model, layer by layer as in the released files."""
    found = []
    for order, parameter in enumerate(parameters(nnx.state(model), family)):
        shape = parameter.row.published_shape(parameter.shape)
        for layer, name in enumerate(parameter.row.names(parameter.shape)):
            at = layer if parameter.row.stacked else None
            found.append((order, _Tensor(name, shape, parameter, at)))
    stacked = [order for order, tensor in found if tensor.layer is not None]

    def place(item: tuple[int, _Tensor]) -> tuple[int, int, int]:
        order, tensor = item
        if tensor.layer is None:
            return (0 if order < stacked[0] else 2, 0, order)
        return (1, tensor.layer, order)

    return [tensor for _, tensor in sorted(found, key=place)]


@jax.jit
def _layer(stack: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _shards(tensors: list[_Tensor], itemsize: int, limit: int) -> dict[str, list[_Tensor]]:
    """File name -> its tensors, filled in order."""
    if limit < 1:
        raise UserError(f"max_shard_bytes={limit}; expected at least 1")
    groups: list[list[_Tensor]] = []
    room = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.shape) * itemsize
        if not groups or nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def _write(
    folder: Path, fields: dict[str, Any], shards: dict[str, list[_Tensor]], dtype: np.dtype
) -> None:
    for file, group in shards.items():
        write_file(
            folder / file,
            {tensor.name: tensor.shape for tensor in group},
            dtype,
            ((tensor.name, tensor.fetch()) for tensor in group),
        )
    if len(shards) > 1:
        total = sum(math.prod(t.shape) * dtype.itemsize for group in shards.values() for t in group)
        places = {tensor.name: file for file, group in shards.items() for tensor in group}
        _write_json(
            folder / INDEX_FILE,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))},
        )
    _write_json(folder / CONFIG_FILE, fields)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_target(folder: str | Path, overwrite: bool = False) -> None:
    """Refuses a folder that `save_pretrained` would refuse, before there is a model to save.

    Raises:
      UserError: it holds something, is a file, or cannot be made.
    """
    target = Path(os.path.realpath(local_path(folder, "folder")))
    above = next(p for p in (target, *target.parents) if p.exists())
    if not above.is_dir():
        raise UserError(f"cannot write {target}: {above} is a file")
    probe = above / f".writable-{os.getpid()}"
    try:
        # Trying is the only test that read-only file systems and administrators do not fool.
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror} in {above}") from error
    held = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if not held:
        return
    if not overwrite:
        raise UserError(f"folder {target} is not empty (it holds {held[0]}); choose another")
    if CONFIG_FILE not in held:
        raise UserError(f"folder {target} holds {held[0]} and no {CONFIG_FILE}: not a checkpoint")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"cannot write {folder.parent}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _replace(temporary: Path, target: Path) -> None:
    """Renames the finished folder into place; what an old one held besides weights moves along."""
    old = None
    if target.is_dir() and any(target.iterdir()):
        for path in target.iterdir():
            ours = path.name in (CONFIG_FILE, INDEX_FILE) or path.suffix == ".safetensors"
            ours = ours or (temporary / path.name).exists()
            if not ours and path.is_dir():
                shutil.copytree(path, temporary / path.name)
            elif not ours:
                shutil.copy2(path, temporary / path.name)
        old = temporary.with_name(temporary.name + "-old")
        target.rename(old)
    temporary.rename(target)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
