"""Which dtypes parameters are kept in and computed in."""

import dataclasses

from hackle.pjit_configs.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtype names. Layers keep norms, softmax and aggregation in float32 whatever `compute` is.

    Attributes:
      params: what the optimiser updates and the checkpoint holds.
      compute: what parameters are cast to before the forward pass.
    """

    params: str = "float32"
    compute: str = "bfloat16"

    def __post_init__(self):
        for field in ("params", "compute"):
            value = getattr(self, field)
            if value not in _DTYPES:
                raise ConfigError(f"precision {field} is {value!r}; expected one of {_DTYPES}")


PRECISIONS: dict[str, Precision] = {
    "mixed": Precision("float32", "bfloat16"),
    "float32": Precision("float32", "float32"),
    "bfloat16": Precision("bfloat16", "bfloat16"),
}
