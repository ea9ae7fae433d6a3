"""Arithmetic in parts: the terms of an expression at once, then the expression of their values."""

import dataclasses
import re
from typing import ClassVar

from hackle.zoo.mapreduce.draw import Draw
from hackle.zoo.mapreduce.problem import Kind, Problem, block, numbered, require, trace

# Of operators and values: `values[0] operators[0] values[1] ...`, from left to right.
_Chain = tuple[list[str], list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic(Kind):
    """`solve (7*8+13)-(40-8)`: a path for each bracket, and brackets in brackets are blocks again.

    Values are never negative.

    Attributes:
      parts: brackets of a block, at most; at least 2.
      terms: numbers or products in an innermost bracket, at most; at least 2.
      largest: of the numbers; the factors of products have one digit.
      depth: blocks inside one another, at most.
    """

    name: ClassVar[str] = "arithmetic"
    parts: int = 4
    terms: int = 3
    largest: int = 99
    depth: int = 2

    def __post_init__(self):
        require(self, "parts", self.parts >= 2, "at least 2")
        require(self, "terms", self.terms >= 2, "at least 2")
        require(self, "largest", self.largest >= 1, "at least 1")
        require(self, "depth", self.depth >= 1, "at least 1")

    def attempt(self, draw: Draw) -> Problem:
        text, value, thoughts = self._brackets(draw, "", self.depth)
        return Problem(self.name, f"solve {text}\n", trace(thoughts, str(value)))

    def solved_by(self, prompt: str, answer: str) -> bool:
        return answer == str(value_of(prompt.removeprefix("solve ").strip()))

    def _brackets(self, draw: Draw, inside: str, depth: int) -> tuple[str, int, str]:
        """An expression of brackets: its text, its value, and its block below path `inside`."""
        parts = []
        for place in range(1, draw.between(2, self.parts) + 1):
            nested = depth > 1 and draw.between(1, 3) == 1
            index = numbered(inside, place)
            parts.append(self._brackets(draw, index, depth - 1) if nested else self._terms(draw))
        texts, values, solutions = zip(*parts, strict=True)
        operators = _operators(draw, values)
        conclusion, value = _from_left(operators, values)
        text = f"({texts[0]})"
        text += "".join(f"{op}({part})" for op, part in zip(operators, texts[1:], strict=True))
        goals = [f"{part}\n" for part in texts]
        return text, value, block(inside, goals, list(solutions), conclusion)

    def _terms(self, draw: Draw) -> tuple[str, int, str]:
        """An innermost bracket: its text, its value, and the lines that lead there."""
        texts, values, lines = [], [], ""
        for _ in range(draw.between(2, self.terms)):
            if draw.between(1, 3) == 1:
                a, b = draw.between(2, 9), draw.between(2, 9)
                texts.append(f"{a}*{b}")
                values.append(a * b)
                lines += f"{a}*{b}={a * b}\n"
            else:
                values.append(draw.between(1, self.largest))
                texts.append(str(values[-1]))
        operators = _operators(draw, values)
        steps, value = _from_left(operators, values)
        text = texts[0] + "".join(op + t for op, t in zip(operators, texts[1:], strict=True))
        return text, value, lines + steps


def _operators(draw: Draw, values) -> list[str]:
    """+ or - before every value but the first; + where the sum would fall below 0."""
    found, total = [], values[0]
    for value in values[1:]:
        minus = draw.between(0, 1) == 1 and value <= total
        found.append("-" if minus else "+")
        total += -value if minus else value
    return found


def _from_left(operators, values) -> tuple[str, int]:
    """The lines of sums and differences from left to right, and the last value."""
    lines, total = "", values[0]
    for op, value in zip(operators, values[1:], strict=True):
        result = total + value if op == "+" else total - value
        lines += f"{total}{op}{value}={result}\n"
        total = result
    return lines, total


_LEXEME = re.compile(r"\d+|[-+*()]")


def value_of(text: str) -> int:
    """The value of an expression of whole numbers, + - * and brackets.

    Raises:
      ValueError: it is none.
    """
    lexemes = _LEXEME.findall(text)
    if "".join(lexemes) != text:
        raise ValueError(f"{text!r} is no expression")
    lexemes.reverse()

    def sum_() -> int:
        total = product()
        while lexemes and lexemes[-1] in "+-":
            total += product() if lexemes.pop() == "+" else -product()
        return total

    def product() -> int:
        total = factor()
        while lexemes and lexemes[-1] == "*":
            lexemes.pop()
            total *= factor()
        return total

    def factor() -> int:
        if not lexemes:
            raise ValueError(f"{text!r} ends too early")
        first = lexemes.pop()
        if first != "(":
            return int(first)
        value = sum_()
        if not lexemes or lexemes.pop() != ")":
            raise ValueError(f"{text!r} has an open bracket")
        return value

    value = sum_()
    if lexemes:
        raise ValueError(f"{text!r} is no expression")
    return value
