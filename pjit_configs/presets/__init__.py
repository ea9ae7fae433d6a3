"""One file per preset, named as the preset: `<chip><devices>_<what is split>`.

The number counts JAX devices (GPUs, or TPU chips). Each file holds one `PRESET`.
"""

import importlib
import pkgutil

from hackle.pjit_configs.errors import unknown
from hackle.pjit_configs.presets.base import Preset


def list_presets() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
      ConfigError: there is none; names the nearest ones.
    """
    known = list_presets()
    if name not in known:
        raise unknown("preset", name, known)
    return importlib.import_module(f"{__name__}.{name}").PRESET
