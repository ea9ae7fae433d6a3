"""Named rule tables: which mesh axes each logical axis lies over.

A table maps every logical axis to a mesh axis, a tuple of mesh axes, or None (not split). A rule
over a mesh axis of size 1 does nothing, so a table fits every mesh that leaves its axes at 1.
"""

from hackle.pjit_configs.axes import AXES
from hackle.pjit_configs.errors import unknown

MeshAxes = str | tuple[str, ...] | None
Rules = dict[str, MeshAxes]

# One copy of everything; the same work on every device. For debugging.
_REPLICATED: Rules = dict.fromkeys(AXES, None)

# Rows of the batch are split over both data axes whatever the parameters do.
_DATA: Rules = {**_REPLICATED, "batch": ("data", "fsdp"), "length": "seq"}

# Each device holds some streams and their prefixes, and a copy of the trunk. `stream_score` stays
# whole: the softmax over streams needs all scores, and they are P numbers a token.
_STREAMS: Rules = {**_DATA, "stream": "stream"}

# Every large parameter has exactly one `embed`, so splitting it splits them all evenly.
_FSDP: Rules = {**_STREAMS, "embed": "fsdp"}

# The inner width of attention, recurrence, MLP and aggregator is split, so each costs one
# all-reduce. Key and value heads follow the query heads that read them.
_TENSOR: Rules = {
    **_STREAMS,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "state": "tensor",
    "vocab": "tensor",
    "embed_out": "tensor",
}

_FSDP_TENSOR: Rules = {**_TENSOR, "embed": "fsdp"}

# For more tensor devices than key-value heads: those few are copied instead.
_SHARED_KV: Rules = {"kv_heads": None}

RULES: dict[str, Rules] = {
    "replicated": _REPLICATED,
    "data": _DATA,
    "streams": _STREAMS,
    "fsdp": _FSDP,
    "tensor": _TENSOR,
    "tensor_shared_kv": {**_TENSOR, **_SHARED_KV},
    "fsdp_tensor": _FSDP_TENSOR,
    "fsdp_tensor_shared_kv": {**_FSDP_TENSOR, **_SHARED_KV},
    # Decoding reads every weight once a token: they stay where they are, and nothing gathers them.
    "decode": _TENSOR,
    "decode_shared_kv": {**_TENSOR, **_SHARED_KV},
}


def rule_table(name: str) -> Rules:
    """A copy of the table called `name`.

    Raises:
      ConfigError: there is none.
    """
    if name not in RULES:
        raise unknown("rule table", name, RULES)
    return dict(RULES[name])
