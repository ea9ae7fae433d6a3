"""hackle: models that split, run side by side, and join, in JAX and Flax NNX.

`hackle.layers` (importable one by one), `hackle.zoo` (whole models, data, training, generation)
and `hackle.pjit_configs` (meshes and shardings as data) are imported where they are used; this
file imports none of them.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hackle")
except PackageNotFoundError:  # a bare checkout on sys.path, never installed
    __version__ = "0+unknown"
