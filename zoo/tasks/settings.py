"""How a model is trained on a task, as numbers."""

import dataclasses
import math

from hackle.zoo.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How one model is trained on one task; the defaults are ParaRNN's (arXiv 2510.21450).

    Attributes:
      epochs: at most; the learning rate falls to 0 over them, as a cosine.
      stop_after: epochs after which to stop, wherever the schedule is; None is all of them.
      batch: rows of a step.
      train_rows, test_rows: sizes of the two splits.
      held_out_rows: of the split that tells when to stop.
      seeds: number of models trained; they differ in first weights and order of rows.
      check_every: epochs between looks at the held-out rows.
      state_clip: bound of the state matrices, applied after every step; None for no bound.
      seed: of the rows, the first weights and the order of rows.

    Raises:
      UserError: a value that cannot be.
    """

    epochs: int = 3000
    stop_after: int | None = None
    batch: int = 16
    train_rows: int = 10_000
    test_rows: int = 100_000
    held_out_rows: int = 10_000
    learning_rate: float = 5e-4
    weight_decay: float = 1e-6
    seeds: int = 3
    check_every: int = 1
    state_clip: float | None = 0.9
    seed: int = 0

    def __post_init__(self):
        for name in (
            "epochs", "batch", "train_rows", "test_rows", "held_out_rows", "seeds", "check_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.batch > self.train_rows:
            raise UserError(f"batch={self.batch}; expected at most train_rows={self.train_rows}")
        if self.stop_after is not None and not 1 <= self.stop_after <= self.epochs:
            raise UserError(f"stop_after={self.stop_after}; expected 1 to epochs={self.epochs}")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate={self.learning_rate}; expected a number above 0")
        for name in ("weight_decay", "seed"):
            if not getattr(self, name) >= 0:  # nor is it NaN
                raise UserError(f"{name}={getattr(self, name)}; expected at least 0")
        if self.state_clip is not None and not self.state_clip > 0:
            raise UserError(f"state_clip={self.state_clip}; expected more than 0")
