"""Which tag may follow which: the one grammar of branching texts.

A text that branches needs no stack to be read. The tag before says what may come next, up to two
counts: how many paths are open, and whether the think tag is. `structure.py` applies this table to
whole batches at once, `state.py` to one token after the other.

What becomes of malformed text, in both:

    a block or path that is open at the end       error; none where the text was cut
    a closing tag without its opening one          error
    a path outside of a block, or within a path    error
    a block without goal, paths or conclusion      error
    a think tag within a block, or never closed    error
    paths nested deeper than 6, or a lower limit   error
    outlines, but not one for each path            error, at the tag that ends the paths
    a goal without outlines                        taken; it announces no number of paths
    one path, or many                              taken
    text between the paths of a block              taken into the path before it ("strict"), or
                                                   left outside of all paths ("published")
    other text where only tags belong              taken; it belongs to what is around it
"""

import functools

import numpy as np

from hackle.layers.multiverse.tags import Tags

MAX_DEPTH = 6

# Symbols: twice the place of a role in `Tags`, and one more for the closing tag.
THINK, THINK_END, PARALLEL, PARALLEL_END, GOAL, GOAL_END = range(6)
OUTLINE, OUTLINE_END, PATH, PATH_END, CONCLUSION, CONCLUSION_END = range(6, 12)
# Where a document ends, and the next one starts.
BORDER = 12

FOLLOWS: dict[int, tuple[int, ...]] = {
    BORDER: (THINK, PARALLEL, BORDER),
    THINK: (PARALLEL, THINK_END),
    THINK_END: (THINK, BORDER),
    PARALLEL: (GOAL,),
    GOAL: (OUTLINE, GOAL_END),
    OUTLINE: (OUTLINE_END,),
    OUTLINE_END: (OUTLINE, GOAL_END),
    GOAL_END: (PATH,),
    PATH: (PARALLEL, PATH_END),
    PATH_END: (PATH, CONCLUSION),
    CONCLUSION: (CONCLUSION_END,),
    CONCLUSION_END: (PARALLEL_END,),
    PARALLEL_END: (PARALLEL, PATH_END, THINK_END, BORDER),
}


class BranchError(ValueError):
    """A text that does not follow the grammar.

    Attributes:
      index: of the token at which this shows, in its row.
      row: of the batch; None where there is only one.
    """

    def __init__(self, reason: str, index: int, row: int | None = None):
        self.reason, self.index, self.row = reason, index, row
        place = f"token {index}" if row is None else f"row {row}, token {index}"
        super().__init__(f"{place}: {reason}")


@functools.cache
def symbols_of(tags: Tags) -> dict[int, int]:
    """Token id -> symbol."""
    return {
        token: 2 * place + side
        for place, role in enumerate(tags.roles().values())
        for tag in role
        for side, token in enumerate((tag.open, tag.close))
    }


@functools.cache
def follows(tags: Tags) -> np.ndarray:
    """Bool `[13, 13]`: may the second symbol follow the first, in the grammar of these tags?

    A role that the tags lack is read through: what may follow it takes its place.
    """
    present = {BORDER, *symbols_of(tags).values()}
    table = np.zeros((13, 13), bool)
    for first, seconds in FOLLOWS.items():
        waiting, seen = list(seconds), set()
        while waiting:
            second = waiting.pop()
            if second in present:
                table[first, second] = True
            elif second not in seen:
                seen.add(second)
                waiting.extend(FOLLOWS[second])
    return table


def name(tags: Tags, symbol: int) -> str:
    """How messages call a symbol: the text of its first tag."""
    if symbol == BORDER:
        return "the end of the document"
    word = list(tags.roles().values())[symbol // 2][0].word
    return f"</{word}>" if symbol % 2 else f"<{word}>"
