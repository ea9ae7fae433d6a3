"""`from_pretrained`: a published folder as a model, one parameter in host memory at a time."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from hackle.zoo import registry
from hackle.zoo.weights.folder import (
    Checkpoint,
    CheckpointError,
    Parameter,
    abstract_model,
    open_checkpoint,
    parameters,
)
from hackle.zoo.weights.placement import placement
from hackle.zoo.weights.tensor_file import DTYPES, floating


def from_pretrained(
    folder: str | Path,
    *,
    mesh: Any = None,
    dtype: DTypeLike | None = None,
    remat: str = "none",
    attention: str | None = None,
    recurrence: str | None = None,
) -> Any:
    """Loads a model from a published folder: config.json and safetensors, one file or sharded.

    Everything that config and file headers can say is checked before data is read. Data then goes
    from memory-mapped files to its devices parameter by parameter; of a sharded parameter, only
    what the devices of this process hold is read.

    Args:
      folder: holds config.json and `model.safetensors`, or shards and their index.
      mesh: None puts the parameters on JAX's default device, uncommitted. A preset of
        `hackle.pjit_configs` (anything with `.shardings(abstract_state)`) says where they go. A
        plain `jax.sharding.Mesh` with hackle's axis names shards streams over `stream`, widths
        over `fsdp`, heads, MLP and vocabulary over `tensor`; axes that it lacks split nothing.
      dtype: of all parameters, e.g. "bfloat16"; None keeps what is stored.
      remat, attention, recurrence: how the model runs; fields of its config.

    Returns:
      A model of the zoo in the family that config.json names.

    Raises:
      UserError: the folder cannot be loaded, with all reasons in one line; or a parameter does
        not fit the mesh; or the model has no attention or no recurrence to choose, or none of that
        name.
    """
    wanted = None if dtype is None else floating(dtype)
    checkpoint = open_checkpoint(folder)
    config = registry.run_as(
        checkpoint.config, remat=remat, attention=attention, recurrence=recurrence
    )
    graph, state = abstract_model(checkpoint.family, config)
    where = placement(state, mesh)
    plan = [
        (parameter, _stored_dtype(parameter, checkpoint) if wanted is None else wanted)
        for parameter in parameters(state, checkpoint.family)
    ]
    loaded = {
        parameter.path: parameter.variable.replace(
            _load(parameter, kind, checkpoint, where[parameter.path])
        )
        for parameter, kind in plan
    }
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _stored_dtype(parameter: Parameter, checkpoint: Checkpoint) -> np.dtype:
    names = parameter.row.names(parameter.shape)
    codes = {checkpoint.tensors[name].dtype: name for name in names}
    if len(codes) > 1:
        said = ", ".join(f"{name} is {code}" for code, name in sorted(codes.items()))
        raise CheckpointError(
            checkpoint.folder, [f"layers differ in dtype ({said}); choose one with dtype="]
        )
    return DTYPES[next(iter(codes))]


def _load(
    parameter: Parameter, dtype: np.dtype, checkpoint: Checkpoint, sharding: Sharding | None
) -> jax.Array:
    shape, row = parameter.shape, parameter.row
    names = row.names(shape)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        # A fresh array: on a CPU, JAX may use the memory that it is given.
        part = np.empty([stop - start for start, stop in bounds], dtype)
        if not row.stacked:
            part[...] = row.read(checkpoint.tensors[row.name].map(), shape, bounds)
            return part
        start, stop = bounds[0]
        for layer in range(start, stop):
            tensor = checkpoint.tensors[names[layer]].map()
            part[layer - start] = row.read(tensor, shape, bounds[1:])
        return part

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)
