"""Dense decoders of the Qwen2 / Qwen2.5 family."""

from hackle.zoo.dense.modeling import DenseConfig, DenseLM

__all__ = ["DenseConfig", "DenseLM"]
