"""Multiverse (arXiv 2506.09991): a dense decoder that writes paths side by side and joins them."""

from hackle.zoo.multiverse.modeling import (
    MultiverseConfig,
    MultiverseLM,
    add_tags,
    as_multiverse,
)

__all__ = ["MultiverseConfig", "MultiverseLM", "add_tags", "as_multiverse"]
