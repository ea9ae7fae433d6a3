"""Synthetic tasks: their rows, the small models of ParaRNN on them, and how those are trained.

`TaskSource(setup("parity").task, "train", 10_000)` is a source for `grain.MapDataset.source`.
"""

from hackle.zoo.tasks.setups import SETUPS, Setup, setup
from hackle.zoo.tasks.task import Task, TaskSource

__all__ = ["SETUPS", "Setup", "Task", "TaskSource", "setup"]
