"""Whole models, and what they need to be trained and talked to."""

if not __name__.startswith("hackle."):
    raise ImportError("import hackle.zoo, not zoo: a second copy of its classes would not compare")
