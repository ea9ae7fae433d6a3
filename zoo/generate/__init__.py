"""Writing text with a model of the zoo."""

from hackle.zoo.generate.decode import generate, stream
from hackle.zoo.generate.sampling import Sampling

__all__ = ["Sampling", "generate", "stream"]
