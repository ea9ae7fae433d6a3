"""Every model by name: our sizes, and the 67 released ParScale checkpoints that map to them."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from flax import nnx

from hackle.zoo.dense import params as dense_params
from hackle.zoo.dense.modeling import DenseConfig, DenseLM
from hackle.zoo.errors import UserError, unknown
from hackle.zoo.multiverse import params as multiverse_params
from hackle.zoo.multiverse.modeling import MultiverseConfig, MultiverseLM
from hackle.zoo.pararnn import params as pararnn_params
from hackle.zoo.pararnn.modeling import CELLS, ParaRNNConfig, ParaRNNLM
from hackle.zoo.parscale import params as parscale_params
from hackle.zoo.parscale.modeling import ParScaleConfig, ParScaleLM


@dataclasses.dataclass(frozen=True)
class Family:
    """What the zoo needs to know about one folder of models.

    Attributes:
      params: module with `ROWS`, `TIED`, `IGNORED`, `read_config` and `write_config`.
      model_types: of a published config.json.
      marker: a field of config.json that only this family has, where another one shares its
        model types.
    """

    name: str
    model_class: type[Any]
    config_class: type[Any]
    params: ModuleType
    model_types: tuple[str, ...]
    marker: str | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A named model: `model_class(config, rngs=...)` makes it."""

    name: str
    family: str
    config: Any
    model_class: type[Any]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("dense", DenseLM, DenseConfig, dense_params, tuple(dense_params.MODEL_TYPES)),
        Family(
            "parscale", ParScaleLM, ParScaleConfig, parscale_params, (parscale_params.MODEL_TYPE,)
        ),
        Family(
            "multiverse",
            MultiverseLM,
            MultiverseConfig,
            multiverse_params,
            tuple(multiverse_params.MODEL_TYPES),
            marker=multiverse_params.MARKER,
        ),
        Family("pararnn", ParaRNNLM, ParaRNNConfig, pararnn_params, (pararnn_params.MODEL_TYPE,)),
    )
}

STREAMS = (1, 2, 4, 8)

_DENSE = {
    "dense-tiny": DenseConfig.tiny,
    "qwen2.5-0.5b": DenseConfig.qwen2_5_0_5b,
    "qwen2.5-1.5b": DenseConfig.qwen2_5_1_5b,
    "qwen2.5-3b": DenseConfig.qwen2_5_3b,
    "qwen2.5-7b": DenseConfig.qwen2_5_7b,
    "qwen2.5-14b": DenseConfig.qwen2_5_14b,
    "qwen2.5-32b": DenseConfig.qwen2_5_32b,
    "qwen2.5-72b": DenseConfig.qwen2_5_72b,
    "qwen3-0.6b": DenseConfig.qwen3_0_6b,
    "qwen3-1.7b": DenseConfig.qwen3_1_7b,
    "qwen3-4b": DenseConfig.qwen3_4b,
    "qwen3-8b": DenseConfig.qwen3_8b,
    "qwen3-14b": DenseConfig.qwen3_14b,
    "qwen3-32b": DenseConfig.qwen3_32b,
    "llama3-8b": DenseConfig.llama3_8b,
    "llama3-70b": DenseConfig.llama3_70b,
    "llama3.1-8b": DenseConfig.llama3_1_8b,
    "llama3.1-70b": DenseConfig.llama3_1_70b,
    "llama3.2-1b": DenseConfig.llama3_2_1b,
    "llama3.2-3b": DenseConfig.llama3_2_3b,
}

_PARSCALE = {
    "parscale-tiny": ParScaleConfig.tiny,
    "parscale-0.7b": ParScaleConfig.parscale_0_7b,
    "parscale-0.9b": ParScaleConfig.parscale_0_9b,
    "parscale-1.3b": ParScaleConfig.parscale_1_3b,
    "parscale-1.8b": ParScaleConfig.parscale_1_8b,
    "parscale-3b": ParScaleConfig.parscale_3b,
    "parscale-4.7b": ParScaleConfig.parscale_4_7b,
    "parscale-qwen-3b": ParScaleConfig.qwen_3b,
}

_MULTIVERSE = {
    "multiverse-tiny": MultiverseConfig.tiny,
    "multiverse-32b": MultiverseConfig.multiverse_32b,
}

_PARARNN = {
    "pararnn-tiny": ParaRNNConfig.tiny,
    "pararnn-400m": ParaRNNConfig.pararnn_400m,
    "pararnn-1b": ParaRNNConfig.pararnn_1b,
    "pararnn-2.9b": ParaRNNConfig.pararnn_2_9b,
    "pararnn-7b": ParaRNNConfig.pararnn_7b,
}

# Fields of a config that say how a model runs, not what it is, and what they are when nothing is
# chosen. A family has those of them that it has a use for.
EXECUTION: dict[str, str | None] = {"remat": "none", "attention": None, "recurrence": None}


def _entries() -> dict[str, Entry]:
    found = [Entry(name, "dense", make(), DenseLM) for name, make in _DENSE.items()]
    found += [
        Entry(f"{size}-p{streams}", "parscale", make(streams=streams), ParScaleLM)
        for size, make in _PARSCALE.items()
        for streams in STREAMS
    ]
    found += [Entry(name, "multiverse", make(), MultiverseLM) for name, make in _MULTIVERSE.items()]
    found += [
        Entry(f"{size}-{cell}", "pararnn", make(cell), ParaRNNLM)
        for size, make in _PARARNN.items()
        for cell in CELLS
    ]
    return {entry.name: entry for entry in found}


def _released() -> dict[str, str]:
    """Released checkpoint -> our name."""
    found = {}
    for p in STREAMS:
        # Trained on 1T tokens, and tuned to instructions.
        for suffix in ("", "-Inst"):
            found[f"ParScale-1.8B-P{p}{suffix}"] = f"parscale-1.8b-p{p}"
        for corpus in ("Python", "Pile"):
            # Continued from Qwen2.5-3B, all weights trained.
            found[f"ParScale-QwenInit-3B-P{p}-{corpus}"] = f"parscale-qwen-3b-p{p}"
            # The scaling-law sweep.
            for size in ("0.7B", "0.9B", "1.3B", "1.8B", "3B", "4.7B"):
                found[f"ParScale-{size}-P{p}-{corpus}"] = f"parscale-{size.lower()}-p{p}"
        if p > 1:
            # On a frozen Qwen2.5-3B; only prefixes and aggregator trained.
            found[f"ParScale-Qwen-3B-P{p}-Python"] = f"parscale-qwen-3b-p{p}"
    return found


_ENTRIES = _entries()
RELEASED: dict[str, str] = _released()


def list_models() -> list[str]:
    """Our names of all models, in the order of the registry."""
    return list(_ENTRIES)


def released_models() -> list[str]:
    """Names of the 67 released ParScale checkpoints, without the `ParScale/` before them."""
    return sorted(RELEASED)


def entry(name: str) -> Entry:
    """The model called `name`: one of `list_models()`, or a released name with or without
    `ParScale/` before it.

    Raises:
      UserError: no such model; the message has the nearest names.
    """
    ours = RELEASED.get(name.removeprefix("ParScale/"), name)
    if ours not in _ENTRIES:
        raise unknown("model", name, _ENTRIES, RELEASED)
    return _ENTRIES[ours]


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> Any:
    """A new model with random parameters (float32).

    Args:
      name: as in `entry`.
      overrides: fields of its config to change.

    Raises:
      UserError: unknown name or field, or field values that do not make a model.
    """
    found = entry(name)
    known = [field.name for field in dataclasses.fields(found.config)]
    for field in overrides:
        if field not in known:
            raise unknown(f"config field of {name}", field, known)
    try:
        return found.model_class(dataclasses.replace(found.config, **overrides), rngs=rngs)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error


def run_as(config: Any, **how: str | None) -> Any:
    """The config with fields of `EXECUTION` changed; None fits families that lack the field, too.

    Raises:
      UserError: a choice that this family has no use for.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    for name, value in how.items():
        if name not in fields and value is not None:
            raise UserError(f"{name}={value!r}: {type(config).__name__} has no {name}")
    return dataclasses.replace(config, **{k: v for k, v in how.items() if k in fields})


def family_of(model: Any) -> Family:
    """The family of a model, or of a config.

    Raises:
      TypeError: it belongs to none.
    """
    for family in FAMILIES.values():
        if type(model) in (family.model_class, family.config_class):
            return family
    raise TypeError(f"{type(model).__name__} is not a model of the zoo; families: {[*FAMILIES]}")


def family_of_fields(fields: Mapping[str, Any]) -> Family:
    """The family of a published config.json, by its `model_type` and the markers.

    Raises:
      UserError: none has this model type.
    """
    model_type = fields["model_type"]
    found = [family for family in FAMILIES.values() if model_type in family.model_types]
    for family in found:
        if family.marker is not None and family.marker in fields:
            return family
    for family in found:
        if family.marker is None:
            return family
    known = ", ".join(dict.fromkeys(one for f in FAMILIES.values() for one in f.model_types))
    raise UserError(f"config.json: model_type {model_type!r} is not supported; known: {known}")
