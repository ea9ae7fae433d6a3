"""Countdown: reach a number from others, every one used once; sub-searches side by side.

After APR (Adaptive Parallel Reasoning, arXiv 2504.15466): its moves, its heuristic and its beams,
in shorter lines. The survivors of the root's beam are the paths of one block.
"""

import dataclasses
import functools
import re
from collections import Counter
from typing import ClassVar

from hackle.zoo.mapreduce.draw import Draw
from hackle.zoo.mapreduce.problem import Kind, Problem, block, require, trace

Numbers = tuple[int, ...]

# a, operator, b, result, and the places of a and b, the smaller first.
Move = tuple[int, str, int, int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown(Kind):
    """`countdown 32: 20 3 19 21`, answered by operations, `21/3=7 20-7=13 19+13=32`.

    A path begins with its first operation and the numbers that it leaves, tries the best next ones
    depth first, and ends with `found` and the operations, or with `none`. The block concludes
    with the number of the first path that found something. Only problems whose search succeeds
    are made.

    Attributes:
      numbers: that are given.
      largest: of them.
      targets: the least and the largest number to reach.
      width: paths, at least and at most: the beam of the root.
      beam: next operations that a path tries, at least and at most, the same in all its nodes.
      limit: results above it are not considered.
    """

    name: ClassVar[str] = "countdown"
    numbers: int = 4
    largest: int = 25
    targets: tuple[int, int] = (10, 100)
    width: tuple[int, int] = (3, 5)
    beam: tuple[int, int] = (2, 3)
    limit: int = 199

    def __post_init__(self):
        require(self, "numbers", self.numbers >= 3, "at least 3")
        require(self, "largest", self.largest >= 1, "at least 1")
        require(self, "limit", self.limit >= max(self.largest, self.targets[1]),
                f"at least largest={self.largest} and the largest target")  # fmt: skip
        for name, least in (("targets", 2), ("width", 2), ("beam", 1)):
            low, high = getattr(self, name)
            require(self, name, least <= low <= high, f"two numbers, {least} <= first <= second")

    def attempt(self, draw: Draw) -> Problem | None:
        target = draw.between(*self.targets)
        given = tuple(draw.between(1, self.largest) for _ in range(self.numbers))
        roots = draw.shuffle(self._best(given, target, draw.between(*self.width)))
        beam = draw.between(*self.beam)
        goals, paths, found = [], [], []
        for text, _, left in roots:
            lines, solution = self._search(left, target, beam)
            goals.append(f"{text}\n")
            found.append(None if solution is None else " ".join([text, *solution]))
            end = "none" if found[-1] is None else f"found {found[-1]}"
            paths.append(f"{text}: {' '.join(map(str, left))}\n{lines}{end}\n")
        first = next((place for place, solution in enumerate(found) if solution), None)
        if first is None:
            return None
        answer = found[first]
        assert answer is not None
        thoughts = block("", goals, paths, f"{first + 1} found\n")
        prompt = f"countdown {target}: {' '.join(map(str, given))}\n"
        return Problem(self.name, prompt, trace(thoughts, answer))

    def _best(self, numbers: Numbers, target: int, count: int) -> list[tuple[str, int, Numbers]]:
        """The `count` most promising moves, best first: each as text, its result, and the numbers
        that are left, the result last."""
        distance = distances(target, self.limit)
        total = sum(distance[number] for number in numbers)
        scored: dict[tuple, tuple] = {}
        for move in moves(numbers):
            a, operator, b, result, *_ = move
            if result <= self.limit:
                # Equal numbers lead to the same; the first of them stands for all.
                score = total - distance[a] - distance[b] + distance[result]
                scored.setdefault((a, operator, b), (score, len(scored), move))
        found = []
        for *_, (a, operator, b, result, i, j) in sorted(scored.values())[:count]:
            rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
            found.append((f"{a}{operator}{b}={result}", result, (*rest, result)))
        return found

    def _search(self, numbers: Numbers, target: int, beam: int) -> tuple[str, list[str] | None]:
        """Depth first: the lines of a search, and the operations that reach the target."""
        if len(numbers) == 2:
            tried = []
            for text, result, _ in self._best(numbers, target, 4):
                tried.append(text)
                if result == target:
                    return " ".join(tried) + "\n", [text]
            return " ".join(tried) + "\n", None
        lines = ""
        for text, _, left in self._best(numbers, target, beam):
            lines += f"{text}: {' '.join(map(str, left))}\n"
            below, solution = self._search(left, target, beam)
            lines += below
            if solution is not None:
                return lines, [text, *solution]
        return lines, None

    def identity(self, prompt: str) -> str:
        target, given = read_prompt(prompt)
        return f"{target}: {sorted(given)}"

    def solved_by(self, prompt: str, answer: str) -> bool:
        """Replays the operations: each takes two numbers that are left and puts back its result,
        which must be right; in the end the target alone is left."""
        target, given = read_prompt(prompt)
        left = Counter(given)
        for operation in answer.split(" "):
            match = _OPERATION.fullmatch(operation)
            if match is None:
                return False
            a, b, result = int(match[1]), int(match[3]), int(match[4])
            left.subtract((a, b))
            if min(left.values()) < 0 or value(a, match[2], b) != result:
                return False
            left[result] += 1
        return +left == Counter([target])


_OPERATION = re.compile(r"(\d{1,9})([-+*/])(\d{1,9})=(\d{1,9})", re.ASCII)


def read_prompt(prompt: str) -> tuple[int, Numbers]:
    """Target and numbers of a prompt."""
    target, given = prompt.removeprefix("countdown ").split(": ")
    return int(target), tuple(map(int, given.split()))


def value(a: int, operator: str, b: int) -> int | None:
    """What a move gives; None where it is not allowed (below 0, or a remainder)."""
    if operator == "+":
        return a + b
    if operator == "*":
        return a * b
    if operator == "-":
        return a - b if a >= b else None
    return a // b if b and a % b == 0 else None


def moves(numbers: Numbers) -> list[Move]:
    """All moves, pair by pair in order."""
    found = []
    for i, first in enumerate(numbers):
        for j in range(i + 1, len(numbers)):
            second = numbers[j]
            large, small = (second, first) if first <= second else (first, second)
            found.append((first, "+", second, first + second, i, j))
            found.append((first, "*", second, first * second, i, j))
            found.append((large, "-", small, large - small, i, j))
            if small and large % small == 0:
                found.append((large, "/", small, large // small, i, j))
    return found


@functools.lru_cache(maxsize=512)
def distances(target: int, limit: int) -> list[int]:
    """How far each of 0, 1, ..., `limit` is from the nearest factor of the target, 1 left out.

    Their sum over the numbers that are left is the heuristic of APR's code (its text adds the
    numbers first).
    """
    factors = [factor for factor in range(2, target + 1) if target % factor == 0]
    return [min(abs(number - factor) for factor in factors) for number in range(limit + 1)]
