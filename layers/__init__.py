"""hackle.layers: layers for one's own Flax project, importable one by one.

Plain arguments, no config objects; needs jax, flax and numpy only.
"""

if not __name__.startswith("hackle."):
    raise ImportError(f"import this package as 'hackle.layers', not as {__name__!r}")

from hackle.layers import cache, multiverse, parscale, recurrent, sharding
from hackle.layers.attention import attention, attention_with_lse, masks, merge_attention
from hackle.layers.convolution import CausalConv
from hackle.layers.decoder import DecoderBlock, SelfAttention
from hackle.layers.embedding import Embedding, project_to_vocabulary
from hackle.layers.linear import Linear
from hackle.layers.mlp import GatedMLP
from hackle.layers.norm import GatedRMSNorm, RMSNorm
from hackle.layers.parameter import parameter
from hackle.layers.rotary import Llama3Scaling, rotary
from hackle.layers.stack import REMAT_POLICIES, Stack

__all__ = [
    "REMAT_POLICIES",
    "CausalConv",
    "DecoderBlock",
    "Embedding",
    "GatedMLP",
    "GatedRMSNorm",
    "Linear",
    "Llama3Scaling",
    "RMSNorm",
    "SelfAttention",
    "Stack",
    "attention",
    "attention_with_lse",
    "cache",
    "masks",
    "merge_attention",
    "multiverse",
    "parameter",
    "parscale",
    "project_to_vocabulary",
    "recurrent",
    "rotary",
    "sharding",
]
