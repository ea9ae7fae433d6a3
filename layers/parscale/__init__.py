"""ParScale (arXiv 2505.10475): P streams through one set of weights, joined by an aggregator."""

from hackle.layers.parscale.aggregator import StreamAggregator
from hackle.layers.parscale.prefix import StreamPrefix
from hackle.layers.parscale.streams import join_streams, split_streams, stream_weights

__all__ = [
    "StreamAggregator",
    "StreamPrefix",
    "join_streams",
    "split_streams",
    "stream_weights",
]
