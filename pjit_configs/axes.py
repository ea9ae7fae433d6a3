"""The only list of axis names: logical axes of arrays, and the mesh axes they can lie over.

Parameters carry one logical name per dimension (`hackle.layers.parameter`). Activations are
constrained only where sharding is decided: batch, length and stream by name, every other dimension
by None. So `embed` is said of parameters alone: fully sharded training splits it over the devices
that also split the batch, which an activation's own width must not be.
"""

AXES: dict[str, str] = {
    # activations
    "batch": "rows of a batch",
    "length": "tokens of a row",
    # activations and parameters
    "stream": "the P learned views of one input (ParScale)",
    # parameters
    "layers": "depth: blocks stacked for the scan",
    "vocab": "entries of the vocabulary",
    "embed": "model width D, of a parameter",
    "embed_out": "second D of the aggregator's D x D matrices",
    "stream_score": "the P scores that the aggregator gives at a token",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head_width": "width of one head",
    "mlp": "hidden width of the MLP",
    "state": "channels of a recurrent state",
    "gates": "gates of a recurrent cell, or those of them that see one kind of state",
    "taps": "inputs that a convolution over time sees",
    "prefix": "positions of a learned key-value prefix",
}

MESH_AXES: tuple[str, ...] = (
    "data",  # rows of the batch; parameters are copied
    "fsdp",  # rows of the batch; parameters are split and gathered where they are used
    "stream",  # streams (ParScale) or branches; only their join communicates
    "seq",  # segments of the sequence
    "tensor",  # heads, hidden widths and vocabulary
)
