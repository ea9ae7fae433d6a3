"""Multiverse checkpoints <-> `MultiverseLM`: tensors and config.json of the trunk, and the tags.

Published weights are of the trunk's `model_type`, which is what runs them elsewhere, and do not say
which of their tokens are tags. We add one field that does, `multiverse_tags`: role -> tags, each a
word with the ids that open and close. A folder without it loads as a dense model, of which
`as_multiverse` makes a Multiverse model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from hackle.zoo.dense import params as dense
from hackle.zoo.dense.modeling import DenseConfig, DenseLM
from hackle.zoo.errors import UserError
from hackle.zoo.multiverse.modeling import MultiverseConfig, MultiverseLM

MARKER = "multiverse_tags"
MODEL_TYPES = dense.MODEL_TYPES
ROWS = dense.ROWS
TIED = dense.TIED
IGNORED = dense.IGNORED


def read_config(fields: Mapping[str, Any]) -> MultiverseConfig:
    """A config.json with tags as a `MultiverseConfig`.

    Raises:
      UserError: naming every field that is unknown or has a value this code does not support.
    """
    trunk = dense.read_config({key: value for key, value in fields.items() if key != MARKER})
    tags = fields.get(MARKER)
    if not isinstance(tags, Mapping):
        raise UserError(f"config.json: field {MARKER}={tags!r}; expected an object")
    known = {field.name: getattr(trunk, field.name) for field in dataclasses.fields(trunk)}
    try:
        # A mapping of its fields is made into tags by the config.
        return MultiverseConfig(**known, tags=tags)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"config.json: field {MARKER}: {error}") from error


def write_config(config: MultiverseConfig) -> dict[str, Any]:
    """The config.json of a `MultiverseConfig`: that of its trunk, and the tags.

    Raises:
      UserError: no published model type has what this model has.
    """
    return {**dense.write_config(_trunk(config)), MARKER: dataclasses.asdict(config.tags)}


def as_dense(model: MultiverseLM) -> DenseLM:
    """The dense model that it is, which knows of no tags; the arrays are shared, not copied."""
    return DenseLM.with_state(_trunk(model.config), nnx.state(model))


def _trunk(config: MultiverseConfig) -> DenseConfig:
    names = [field.name for field in dataclasses.fields(DenseConfig)]
    return DenseConfig(**{name: getattr(config, name) for name in names})
