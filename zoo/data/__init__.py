"""Corpora, tokenizers and packed batches.

    prepared = prepare("python", "data")            # or prepare("path/to/folder", "data")
    train = batches(prepared, "train", batch=8, length=512, seed=0)
    batch = next(train)                             # tokens, positions, segment_ids

Each name is imported at first use: a tokenizer needs `tokenizers` alone (extra `hf`), the rest
needs the extra `train`. Nothing here imports TensorFlow, and jax only comes in with grain.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hackle.zoo.data.files import Corpus, SourceFile
    from hackle.zoo.data.packing import PACKINGS, Packing
    from hackle.zoo.data.pipeline import batch_source, batches
    from hackle.zoo.data.prepared import Prepared, Split, load_prepared, open_corpus, prepare
    from hackle.zoo.data.python_source import list_python_source
    from hackle.zoo.data.text_folder import list_text_folder
    from hackle.zoo.data.tokenizer import (
        END_OF_TEXT,
        Tokenizer,
        extend_tokenizer,
        load_tokenizer,
        train_tokenizer,
    )

__all__ = [
    "END_OF_TEXT",
    "PACKINGS",
    "Corpus",
    "Packing",
    "Prepared",
    "SourceFile",
    "Split",
    "Tokenizer",
    "batch_source",
    "batches",
    "extend_tokenizer",
    "list_python_source",
    "list_text_folder",
    "load_prepared",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "train_tokenizer",
]

_HOMES = {
    "files": ("Corpus", "SourceFile"),
    "packing": ("PACKINGS", "Packing"),
    "pipeline": ("batch_source", "batches"),
    "prepared": ("Prepared", "Split", "load_prepared", "open_corpus", "prepare"),
    "python_source": ("list_python_source",),
    "text_folder": ("list_text_folder",),
    "tokenizer": (
        "END_OF_TEXT",
        "Tokenizer",
        "extend_tokenizer",
        "load_tokenizer",
        "train_tokenizer",
    ),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
