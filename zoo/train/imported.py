"""A published model as a run folder, so that recipes can start from it."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
from orbax.checkpoint import v1 as ocp

from hackle.zoo.errors import UserError
from hackle.zoo.train import checkpoint
from hackle.zoo.train.recipe import Recipe


def write_run(folder: str | Path, model: Any, source: str | Path) -> None:
    """Writes `folder` as a run whose only checkpoint, step 0, holds the parameters of `model`.

    It has neither optimiser nor place in any data: it serves as `start_from` with
    `continue_data=False`, and resuming it is refused since its corpus is no corpus.

    Raises:
      UserError: the folder holds something already, or cannot be written.
    """
    run = checkpoint.RunFolder(folder)
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another")
    recipe = {**Recipe().to_json(), "model": str(source), "corpus": f"that of {source}"}
    identity = {
        "recipe": recipe,
        "model": {"class": type(model).__name__, "config": dataclasses.asdict(model.config)},
        "precision": {"params": "as published", "compute": "as published"},
        "data": "unknown",
    }
    try:
        run.checkpoints.mkdir(parents=True)
        ocp.save_checkpointables(
            (run.checkpoints / "0").absolute(),
            {"parameters": checkpoint._named(nnx.state(model, nnx.Param))[0]},
            custom_metadata={
                "format_version": checkpoint.FORMAT_VERSION,
                "identity": identity,
                "data": None,
            },
        )
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
