"""The tasks by name, each with what ParaRNN (arXiv 2510.21450) trains on it.

Cycle navigation, modular arithmetic and A5 are not in its first version. Like parity they ask for
a state that never fades, so their state matrices are not bounded either.
"""

import dataclasses
import difflib

from hackle.zoo.errors import UserError
from hackle.zoo.tasks.memory import Hops, KeepNth, Recall
from hackle.zoo.tasks.state_tracking import A5, CycleNavigation, ModularArithmetic, Parity
from hackle.zoo.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Setup:
    """A task and the form of the recurrent models on it.

    Attributes:
      cell_only: no convolution, norm, gate or output projection around the cell.
      add_positions: sinusoids are added to the embedded tokens.
      state_clip: bound of the state matrix (and peephole); None lets it grow, without which
        parity cannot be solved.
    """

    task: Task
    cell_only: bool = False
    add_positions: bool = False
    state_clip: float | None = 0.9


SETUPS: dict[str, Setup] = {
    "parity": Setup(Parity(), cell_only=True, state_clip=None),
    "keep-nth": Setup(KeepNth(), cell_only=True, add_positions=True),
    "recall": Setup(Recall()),
    "1-hop": Setup(Hops(hops=1, symbols=10)),
    "2-hop": Setup(Hops(hops=2, symbols=5)),
    "cycle-navigation": Setup(CycleNavigation(), state_clip=None),
    "modular-arithmetic": Setup(ModularArithmetic(), state_clip=None),
    "a5": Setup(A5(), state_clip=None),
}


def setup(name: str, *, length: int | None = None) -> Setup:
    """The setup called `name`, with rows of the paper's length 100 or of another.

    Raises:
      UserError: no such name, or a length that the task cannot have.
    """
    if name not in SETUPS:
        near = difflib.get_close_matches(name, SETUPS, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(SETUPS)}"
        raise UserError(f"unknown task {name!r}; {hint}")
    found = SETUPS[name]
    if length is None:
        return found
    return dataclasses.replace(found, task=dataclasses.replace(found.task, length=length))
