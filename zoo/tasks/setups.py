"""The tasks by name: what ParaRNN (arXiv 2510.21450) trains on each, and how.

Where nothing else is said, as in the paper: up to 3000 epochs of 10,000 rows, 16 a step, learning
rate 5e-4. Cycle navigation, modular arithmetic and A5 are not in its first version.
"""

import dataclasses

from hackle.zoo.errors import UserError, unknown
from hackle.zoo.tasks.memory import Hops, KeepNth, Recall
from hackle.zoo.tasks.settings import Settings
from hackle.zoo.tasks.state_tracking import A5, CycleNavigation, ModularArithmetic, Parity
from hackle.zoo.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Setup:
    """A task, the form of the models on it, and how every one is trained on it.

    Attributes:
      cell_only: no convolution, norm, gate or output projection around the cell, and no
        convolution before the transformer's attention.
      mlp_width: of the MLP behind a recurrent mixer, both with a residual, as in the language
        model's block; 0 is the mixer alone, and the only width beside `cell_only`.
      add_positions: sinusoids are added to the embedded tokens.

    Raises:
      UserError: an MLP beside `cell_only`.
    """

    task: Task
    cell_only: bool = False
    mlp_width: int = 0
    add_positions: bool = False
    training: Settings = dataclasses.field(default_factory=Settings)

    def __post_init__(self):
        if self.cell_only and self.mlp_width:
            raise UserError(f"mlp_width={self.mlp_width} with cell_only; expected 0")


# A state that never fades needs a state matrix without a bound: parity cannot be solved with one.
_UNBOUNDED = Settings(state_clip=None)

SETUPS: dict[str, Setup] = {
    # The paper's settings: solved within ten epochs.
    "parity": Setup(Parity(), cell_only=True, training=_UNBOUNDED),
    # At the paper's rate an LSTM sits still for eight epochs first.
    "keep-nth": Setup(
        KeepNth(), cell_only=True, add_positions=True, training=Settings(learning_rate=2e-3)
    ),
    # A hundred answers a row: at this rate two epochs are enough.
    "1-hop": Setup(Hops(hops=1, symbols=10), training=Settings(learning_rate=3e-3)),
    # Two answers a row: few rows are learnt by heart, and the last errors go as the rate falls.
    "recall": Setup(
        Recall(), training=Settings(train_rows=100_000, batch=64, learning_rate=5e-3, epochs=30)
    ),
    # The slowest by far, so that larger steps pay. A second look-up in what the first one gave is
    # what an MLP is for: without one, 86 to 88 % after 100 epochs.
    "2-hop": Setup(
        Hops(hops=2, symbols=5),
        mlp_width=128,
        training=Settings(train_rows=100_000, batch=64, learning_rate=1e-2, epochs=100),
    ),
    "cycle-navigation": Setup(CycleNavigation(), training=_UNBOUNDED),
    "modular-arithmetic": Setup(ModularArithmetic(), training=_UNBOUNDED),
    "a5": Setup(A5(), training=_UNBOUNDED),
}


def setup(name: str, *, length: int | None = None) -> Setup:
    """The setup called `name`, with rows of the paper's length 100 or of another.

    Raises:
      UserError: no such name, or a length that the task cannot have.
    """
    if name not in SETUPS:
        raise unknown("task", name, SETUPS)
    found = SETUPS[name]
    if length is None:
        return found
    return dataclasses.replace(found, task=dataclasses.replace(found.task, length=length))
