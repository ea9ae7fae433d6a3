"""Attention over described masks; see `dispatch.attention`."""

from hackle.layers.attention import masks
from hackle.layers.attention.dispatch import attention, attention_with_lse, merge_attention

__all__ = ["attention", "attention_with_lse", "masks", "merge_attention"]
