"""Meshes, sharding rules and presets as data; imports no model code."""

if not __name__.startswith("hackle."):
    raise ImportError("import hackle.pjit_configs, not pjit_configs: a second copy of its classes would not compare")
