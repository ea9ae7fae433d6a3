"""ParScale (arXiv 2505.10475): P streams through one dense trunk."""

from hackle.zoo.parscale.modeling import (
    ParScaleConfig,
    ParScaleLM,
    is_stream_parameter,
    retrofit,
)

__all__ = ["ParScaleConfig", "ParScaleLM", "is_stream_parameter", "retrofit"]
