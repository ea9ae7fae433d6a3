"""One file per preset, named as the preset: `<chip><devices>_<what is split>`.

The number counts JAX devices (GPUs, or TPU chips). Each file holds one `PRESET`.
"""

import difflib
import importlib
import pkgutil

from hackle.pjit_configs.errors import ConfigError
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
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"unknown preset {name!r}; {hint}")
    return importlib.import_module(f"{__name__}.{name}").PRESET
