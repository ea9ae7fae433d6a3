"""ParaRNN (arXiv 2510.21450): language models on nonlinear recurrences."""

from hackle.zoo.pararnn.modeling import ParaRNNConfig, ParaRNNLM

__all__ = ["ParaRNNConfig", "ParaRNNLM"]
