"""Sets of kinds by name, and problems drawn from a set."""

from collections.abc import Mapping, Sequence

from hackle.zoo.errors import unknown
from hackle.zoo.mapreduce.arithmetic import Arithmetic
from hackle.zoo.mapreduce.countdown import Countdown
from hackle.zoo.mapreduce.problem import Kind, Problem
from hackle.zoo.mapreduce.table import Table

EASY = (
    Arithmetic(parts=2, terms=2, largest=9, depth=1),
    Table(lines=2, columns=2, questions=2, largest=9),
    Countdown(numbers=3, largest=9, targets=(5, 30), width=(2, 3), beam=(1, 2), limit=99),
)
FULL = (Arithmetic(), Table(), Countdown())

# What a recipe can name as its corpus.
SETS: Mapping[str, tuple[Kind, ...]] = {
    "mapreduce": FULL,
    "mapreduce-easy": EASY,
    **{f"mapreduce-{kind.name}": (kind,) for kind in FULL},
}


def kinds_of(name: str) -> tuple[Kind, ...]:
    """The kinds of the set called `name`.

    Raises:
      UserError: no such set.
    """
    if name not in SETS:
        raise unknown("set of problems", name, SETS)
    return SETS[name]


def problem(kinds: Sequence[Kind], split: str, index: int, *, seed: int = 0) -> Problem:
    """Problem `index` of a set, whose kinds take turns; see `Kind.problem`."""
    return kinds[index % len(kinds)].problem(split, index, seed=seed)


def fingerprint(kinds: Sequence[Kind], *, tagged: bool) -> str:
    """Two runs with the same one are trained on the same tokens."""
    form = "branches, what the decoder writes is given" if tagged else "sequential"
    return f"{tuple(kinds)} {[kind.edition for kind in kinds]} {form}"
