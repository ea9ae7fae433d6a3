"""Generated problems that split, run side by side and join: traces in Multiverse's form, checked.

    kind = Countdown()
    one = kind.problem("train", 0)
    one.prompt, one.trace, one.sequential
    judge(kind, one.prompt, one.trace, tagged=True)  # well formed, correct

`ProblemRows(kinds_of("mapreduce"), "train", length=1024, tagged=True)` are rows for training.
"""

from hackle.zoo.mapreduce.arithmetic import Arithmetic
from hackle.zoo.mapreduce.countdown import Countdown
from hackle.zoo.mapreduce.form import Verdict, judge
from hackle.zoo.mapreduce.problem import Kind, Problem
from hackle.zoo.mapreduce.rows import ProblemRows
from hackle.zoo.mapreduce.sets import SETS, fingerprint, kinds_of, problem
from hackle.zoo.mapreduce.table import Table

__all__ = [
    "SETS",
    "Arithmetic",
    "Countdown",
    "Kind",
    "Problem",
    "ProblemRows",
    "Table",
    "Verdict",
    "fingerprint",
    "judge",
    "kinds_of",
    "problem",
]
