"""Dense decoders: Qwen2, Qwen2.5, Qwen3 and Llama."""

from hackle.zoo.dense.modeling import DenseConfig, DenseLM

__all__ = ["DenseConfig", "DenseLM"]
