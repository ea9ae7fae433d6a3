"""What a preset is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from hackle.pjit_configs.chips import CHIPS, Chip
from hackle.pjit_configs.errors import ConfigError
from hackle.pjit_configs.mesh import build_mesh, mesh_sizes
from hackle.pjit_configs.precision import PRECISIONS, Precision
from hackle.pjit_configs.remat import REMAT
from hackle.pjit_configs.rules import Rules
from hackle.pjit_configs.sharding import shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Mesh, rules and dtypes for one purpose on one kind of hardware.

    Attributes:
      name: also the name of its file.
      description: one line: what it is for.
      chip: key of `CHIPS`; None for whatever is there.
      mesh_shape: size by mesh axis; axes left out have size 1, one may be -1 (what is left).
      rules: logical axis -> mesh axes; see `rules.py`.
      precision: dtypes of parameters and of computation.
      remat: what the backward pass recomputes, a key of `REMAT`.
    """

    name: str
    description: str
    chip: str | None
    mesh_shape: dict[str, int]
    rules: Rules
    precision: Precision = PRECISIONS["mixed"]
    remat: str = "none"

    def __post_init__(self):
        if self.chip is not None and self.chip not in CHIPS:
            raise ConfigError(f"preset {self.name}: unknown chip {self.chip!r}; see chips.py")
        if self.remat not in REMAT:
            raise ConfigError(f"preset {self.name}: unknown remat {self.remat!r}; see remat.py")
        # Any -1 is taken as 1 here: this checks the names and the sizes.
        mesh_sizes({axis: 1 if size == -1 else size for axis, size in self.mesh_shape.items()})

    @property
    def hardware(self) -> Chip | None:
        """Peaks and memory of `chip`."""
        return None if self.chip is None else CHIPS[self.chip]

    @property
    def hbm_bytes(self) -> int | None:
        """Memory of one device; None where it is not known beforehand."""
        return None if self.hardware is None else self.hardware.hbm_bytes

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices`; see `build_mesh` for None and for what is refused."""
        try:
            return build_mesh(self.mesh_shape, devices)
        except ConfigError as error:
            raise ConfigError(f"preset {self.name}: {error}") from None

    def shardings(self, abstract_state: Any, mesh: Mesh | None = None) -> Any:
        """A `NamedSharding` for every array of a state; see `hackle.pjit_configs.shardings`.

        Args:
          abstract_state: e.g. `nnx.split(nnx.eval_shape(make))[1]`, or any tree that holds it.
          mesh: None builds `self.mesh()`.
        """
        return shardings(abstract_state, self.rules, self.mesh() if mesh is None else mesh)

    def replace(self, **changes: Any) -> "Preset":
        """A changed copy."""
        return dataclasses.replace(self, **changes)
