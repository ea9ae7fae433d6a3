"""Writing text with a model of the zoo."""

from hackle.zoo.generate.branches import generate_branches, stream_branches
from hackle.zoo.generate.decode import generate, stream
from hackle.zoo.generate.draft import Draft
from hackle.zoo.generate.sampling import Sampling
from hackle.zoo.generate.writer import Limits

__all__ = [
    "Draft",
    "Limits",
    "Sampling",
    "generate",
    "generate_branches",
    "stream",
    "stream_branches",
]
