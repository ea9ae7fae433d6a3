"""hackle.zoo: whole models, and what they need to be trained and talked to."""

if not __name__.startswith("hackle."):
    raise ImportError(f"import this package as 'hackle.zoo', not as {__name__!r}")

import importlib
from typing import Any

from hackle.zoo.errors import UserError
from hackle.zoo.registry import create, entry, list_models, released_models
from hackle.zoo.weights.load import from_pretrained
from hackle.zoo.weights.save import save_pretrained

__all__ = [
    "UserError",
    "create",
    "entry",
    "from_pretrained",
    "list_models",
    "released_models",
    "save_pretrained",
]

# Imported at first use: they need more than jax, flax and numpy.
_PARTS = (
    "data", "dense", "generate", "mapreduce", "multiverse", "pararnn", "parscale", "tasks", "train",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"hackle.zoo.{name}")
    raise AttributeError(f"module 'hackle.zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PARTS])
