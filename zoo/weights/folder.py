"""A published checkpoint folder, checked as a whole before any of its data is read."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from hackle.zoo import registry
from hackle.zoo.errors import UserError
from hackle.zoo.local_path import local_path
from hackle.zoo.registry import Family
from hackle.zoo.weights.table import Row, by_path
from hackle.zoo.weights.tensor_file import FLOATS, TensorInfo, read_header

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_NAMES_SHOWN = 8
# A name on the Hub: owner and repository.
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded; `problems` lists everything that is wrong with it."""

    def __init__(self, folder: Path, problems: list[str]):
        super().__init__(f"checkpoint {folder}: " + "; ".join(problems))
        self.folder = folder
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of ours and where it comes from: `row.names(shape)` in the published files."""

    path: tuple[Any, ...]
    variable: nnx.Variable
    row: Row

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder that passed every check that needs no data.

    Attributes:
      fields: the raw config.json.
      tensors: published name -> place, exactly those that the model has.
    """

    folder: Path
    family: Family
    config: Any
    fields: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def parameters(self) -> list[Parameter]:
        return parameters(abstract_model(self.family, self.config)[1], self.family)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.stop - info.start for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Dtype code -> number of tensors."""
        codes = [info.dtype for info in self.tensors.values()]
        return {code: codes.count(code) for code in sorted(set(codes))}


def abstract_model(family: Family, config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and abstract state (`jax.ShapeDtypeStruct` leaves) of a model; no memory is used.

    Raises:
      UserError: the config's values do not make a model.
    """
    try:
        return nnx.split(nnx.eval_shape(lambda: family.model_class(config, rngs=nnx.Rngs(0))))
    except ValueError as error:
        raise UserError(f"{type(config).__name__}: {error}") from error


def parameters(state: nnx.State, family: Family) -> list[Parameter]:
    """The parameters of a (possibly abstract) state beside their rows, in the order of the table.

    Raises:
      KeyError: the family's table has no row for a parameter.
    """
    variables = {tuple(path): variable for path, variable in nnx.to_flat_state(state)}
    dotted = {".".join(map(str, path)): path for path in variables}
    rows = by_path(family.params.ROWS)
    without = [name for name in dotted if name not in rows]
    if without:
        raise KeyError(f"{family.name}/params.py has no row for {', '.join(without)}")
    return [
        Parameter(dotted[name], variables[dotted[name]], row)
        for name, row in rows.items()
        if name in dotted
    ]


def published_shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a published checkpoint of this config."""
    found = {}
    for parameter in parameters(abstract_model(family, config)[1], family):
        shape = parameter.row.published_shape(parameter.shape)
        found.update(dict.fromkeys(parameter.row.names(parameter.shape), shape))
    return found


def read_config(folder: str | Path) -> tuple[Family, Any, dict[str, Any]]:
    """Family, config and raw fields of a folder's config.json.

    Raises:
      UserError: no such folder or file, a run of scripts/train.py instead of the model in it, not
        JSON, an unsupported model type or field.
    """
    folder = local_path(folder, "checkpoint folder")
    if (inside := published(folder)) != folder:
        raise UserError(
            f"checkpoint folder {folder} is a training run; expected the model in it: {inside}"
        )
    fields = read_json(folder / CONFIG_FILE)
    if fields.get("model_type") is None:
        raise UserError(f"{folder / CONFIG_FILE}: field model_type is missing")
    try:
        family = registry.family_of_fields(fields)
        return family, family.params.read_config(fields), fields
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def published(folder: str | Path) -> Path:
    """The published folder that `folder` is, or that a finished run has inside; `~` is expanded.

    Raises:
      UserError: it is neither; says what to give instead.
    """
    folder = local_path(folder, "checkpoint folder")
    if folder.is_file():
        raise UserError(
            f"checkpoint folder {folder} is a file; expected the folder that holds it: "
            f"{folder.parent}"
        )
    if not folder.is_dir():
        hint, name = "", folder.as_posix()
        # With a local folder of the owner's name it is more likely a path mistyped.
        if _HUB_NAME.fullmatch(name) and not folder.parent.exists():
            hint = (
                "; expected a local folder: if this is a name on the Hub, download it first with "
                f"`hf download {name} --local-dir DIR`"
            )
        raise UserError(f"checkpoint folder {folder} does not exist{hint}")
    for found in (folder, folder / "model"):
        if (found / CONFIG_FILE).is_file():
            return found
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"checkpoint folder {folder} is a training run without an exported model; finish "
            f"it, or write one with scripts/convert.py export {folder} OUT"
        )
    raise UserError(
        f"checkpoint folder {folder} holds no {CONFIG_FILE}; expected a published model"
    )


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Checks a folder: its config, its files, and every tensor's name, shape and dtype.

    Raises:
      CheckpointError: with all problems that the headers show: missing and damaged files,
        missing, unexpected and mis-shaped tensors, dtypes that are no floating-point numbers.
      UserError: the folder or its config cannot be read, or the config is not supported.
    """
    folder = local_path(folder, "checkpoint folder")
    family, config, fields = read_config(folder)
    expected = published_shapes(family, config)
    tensors, problems = _read_headers(folder)
    if not problems or tensors:
        problems += _compare(expected, tensors, family, complete=not problems)
    if problems:
        raise CheckpointError(folder, problems)
    for extra in sorted(tensors.keys() - expected.keys()):
        if not _equal(tensors.pop(extra), tensors[family.params.TIED[extra]]):
            problems.append(
                f"tie_word_embeddings is true, yet {extra} differs from {family.params.TIED[extra]}"
            )
    if problems:
        raise CheckpointError(folder, problems)
    return Checkpoint(folder, family, config, fields, tensors)


def _compare(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorInfo],
    family: Family,
    complete: bool,
) -> list[str]:
    problems = []
    missing = [name for name in expected if name not in tensors]
    if missing and complete:  # what lies in a damaged file is not missing on top of that
        problems.append(f"{len(missing)} missing tensors: {_some(missing)}")
    extra = [
        name
        for name in tensors
        if name not in expected and family.params.TIED.get(name) not in expected
    ]
    if extra:
        problems.append(f"{len(extra)} unexpected tensors: {_some(extra)}")
    for name, source in family.params.TIED.items():
        if name in tensors and name not in expected and source in expected:
            expected = {**expected, name: expected[source]}
    shapes = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} tensors of another shape: {_some(shapes)}")
    dtypes = [
        f"{name} is {tensors[name].dtype}"
        for name in expected
        if name in tensors and tensors[name].dtype not in FLOATS
    ]
    if dtypes:
        problems.append(
            f"{len(dtypes)} tensors of a dtype other than {', '.join(FLOATS)}: {_some(dtypes)}"
        )
    return problems


def _read_headers(folder: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """All tensors of a folder, and what is wrong with its files."""
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        single = folder / SINGLE_FILE
        if not single.exists():
            return {}, [f"neither {SINGLE_FILE} nor {INDEX_FILE} in the folder"]
        try:
            return read_header(single), []
        except UserError as error:
            return {}, [str(error)]
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        return {}, [f"{INDEX_FILE} has no weight_map from tensor names to file names"]
    tensors: dict[str, TensorInfo] = {}
    problems = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            problems.append(f"{INDEX_FILE} names a file outside the folder: {file}")
            continue
        listed = [name for name, place in weight_map.items() if place == file]
        if not (folder / file).exists():
            problems.append(f"missing file {file} with {len(listed)} tensors: {_some(listed)}")
            continue
        try:
            found = read_header(folder / file)
        except UserError as error:
            problems.append(str(error))
            continue
        absent = [name for name in listed if name not in found]
        if absent:
            problems.append(f"{file} lacks {len(absent)} tensors of the index: {_some(absent)}")
        unlisted = [name for name in found if weight_map.get(name) != file]
        if unlisted:
            problems.append(
                f"{file} has {len(unlisted)} tensors not in the index: {_some(unlisted)}"
            )
        tensors.update((name, found[name]) for name in listed if name in found)
    return tensors, problems


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file cannot be read, or holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def _equal(a: TensorInfo, b: TensorInfo, rows: int = 4096) -> bool:
    """Whether two tensors of one shape hold the same numbers; a few rows in memory at a time."""
    left, right = a.map(), b.map()
    return all(
        np.array_equal(
            left[i : i + rows].astype(np.float32), right[i : i + rows].astype(np.float32)
        )
        for i in range(0, a.shape[0], rows)
    )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
