"""Multiverse (arXiv 2506.09991): texts that split into sibling paths and join again."""

from hackle.layers.multiverse.grammar import MAX_DEPTH, BranchError
from hackle.layers.multiverse.state import BranchState, Place
from hackle.layers.multiverse.structure import BranchStructure, branch_structure
from hackle.layers.multiverse.tags import Tag, Tags, embed_tags

__all__ = [
    "MAX_DEPTH",
    "BranchError",
    "BranchState",
    "BranchStructure",
    "Place",
    "Tag",
    "Tags",
    "branch_structure",
    "embed_tags",
]
