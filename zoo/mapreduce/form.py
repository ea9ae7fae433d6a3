"""Is what a model wrote well formed, and is its answer right?"""

import re
from typing import NamedTuple

from hackle.zoo.mapreduce.alphabet import (
    CONCLUSION,
    END,
    END_CONCLUSION,
    END_GOAL,
    END_OUTLINE,
    END_PARALLEL,
    END_PATH,
    END_THINK,
    GOAL,
    OUTLINE,
    PARALLEL,
    PATH,
    TAGS,
    THINK,
    spelled,
)
from hackle.zoo.mapreduce.problem import ANSWER, Kind, numbered


class Verdict(NamedTuple):
    """What a checker says of an output.

    Attributes:
      well_formed: it is what the grammar allows, to its end.
      correct: its answer is right.
      fault: of the form, in words; "" where there is none.
    """

    well_formed: bool
    correct: bool
    fault: str


def judge(kind: Kind, prompt: str, output: str, *, tagged: bool) -> Verdict:
    """The verdict on `output`, what a model wrote after the prompt, its end of text included.

    Args:
      tagged: whether it should be in Multiverse's form, or without any tag.
    """
    fault = ""
    try:
        (_check_tagged if tagged else _check_plain)(output)
    except FormError as error:
        fault = str(error)
    answer = answer_of(output)
    return Verdict(not fault, answer is not None and kind.solved_by(prompt, answer), fault)


def answer_of(output: str) -> str | None:
    """What stands between the last "Answer: " and the end of the text; None without either."""
    _, found, rest = output.rpartition(ANSWER)
    answer, ended, _ = rest.partition(END)
    return answer if found and ended else None


class FormError(ValueError):
    """An output is not of the form that it should have."""


_ANSWER_LINE = re.compile(f"{ANSWER}[^\n{END}{TAGS}]+{END}")
_PLAIN = re.compile(f"(?:[^{END}{TAGS}]*\n)?{_ANSWER_LINE.pattern}")
_PIECE = re.compile(f"[{TAGS}]|[^{TAGS}]+")


def _check_plain(output: str) -> None:
    if _PLAIN.fullmatch(output) is None:
        raise FormError("no line of an answer at the end, or a tag")


def _check_tagged(output: str) -> None:
    """The grammar that the published data are checked with, by recursive descent.

    Think holds text and blocks, and an answer follows it. A block holds a goal of outlines, as
    many paths of the same indices in the same order, and a conclusion, with no text between them;
    a path holds text and blocks.
    """
    pieces = _PIECE.findall(output)
    at = 0

    def next_is(tag: str) -> bool:
        return at < len(pieces) and pieces[at] == tag

    def take(tag: str) -> None:
        nonlocal at
        if not next_is(tag):
            found = spelled(pieces[at])[:20] if at < len(pieces) else "the end"
            raise FormError(f"{found!r} where {spelled(tag)} should be (piece {at})")
        at += 1

    def text() -> str:
        nonlocal at
        if at < len(pieces) and pieces[at] not in TAGS:
            at += 1
            return pieces[at - 1]
        return ""

    def items(inside: str) -> None:
        text()
        while next_is(PARALLEL):
            block(inside)
            text()

    def index(inside: str, place: int) -> str:
        name, words = numbered(inside, place), text()
        if not words.startswith(f"{name}: "):
            raise FormError(f"{words[:20]!r} where index {name} should be (piece {at - 1})")
        return name

    def block(inside: str) -> None:
        take(PARALLEL)
        take(GOAL)
        text()
        count = 0
        while next_is(OUTLINE) or not count:
            take(OUTLINE)
            count += 1
            index(inside, count)
            take(END_OUTLINE)
        take(END_GOAL)
        for place in range(1, count + 1):
            take(PATH)
            items(index(inside, place))
            take(END_PATH)
        take(CONCLUSION)
        text()
        take(END_CONCLUSION)
        take(END_PARALLEL)

    take(THINK)
    items("")
    take(END_THINK)
    if _ANSWER_LINE.fullmatch(text()) is None:
        raise FormError("no answer at the end")
    if at < len(pieces):
        raise FormError(f"{spelled(pieces[at])!r} after the answer")
