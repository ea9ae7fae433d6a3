"""A text that branches while it is written: its tokens, where they are, and what they cost."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from hackle.layers.multiverse import BranchStructure, Place


class Written(NamedTuple):
    """A token, where it is, and whether the model chose it; the decoder wrote the others."""

    token: int
    place: Place
    chosen: bool


@dataclasses.dataclass
class Fork:
    """The paths of a block, in the order of their outlines."""

    paths: "list[list[Written | Fork]]"


@dataclasses.dataclass
class Draft:
    """What follows a prompt: a tree of tokens, whose forks hold paths written side by side.

    Attributes:
      parts: tokens and forks, in the order of the text.
      start: position of the first token.
      steps: turns of the model, the prompt's included.
      finish: why it ended; None while it is written. "stop": at a token that stops it. "length":
        the next tokens would exceed a `limit`. "malformed": a tag broke the grammar, or the text
        stopped within a block; see `error`.
      error: what is wrong with a malformed text.
      limit: which one it reached: "tokens" and "critical_path" are those of `Limits`, "positions"
        is the model's rotary range.
    """

    parts: list[Written | Fork]
    start: int
    steps: int = 0
    finish: Literal["stop", "length", "malformed"] | None = None
    error: str | None = None
    limit: Literal["tokens", "critical_path", "positions"] | None = None

    def written(self) -> Iterator[Written]:
        """All tokens in the order of the text: a fork's paths one after the other."""
        return walk(self.parts)

    @property
    def tokens(self) -> list[int]:
        """Token ids in the order of the text."""
        return [one.token for one in self.written()]

    @property
    def total(self) -> int:
        """How many tokens were written, over all paths, those of the decoder included."""
        return sum(1 for _ in self.written())

    @property
    def critical_path(self) -> int:
        """How many tokens had to be written one after the other; `total` if none branched."""
        return max((one.place.position + 1 - self.start for one in self.written()), default=0)

    @property
    def forks(self) -> int:
        """How many blocks were written side by side."""
        return _count(self.parts)

    def structure(self, depth: int) -> BranchStructure:
        """Block and path `[depth, L]` and position `[L]` of the tokens, as they were decoded."""
        written = [*self.written()]
        block, path = np.zeros((2, depth, len(written)), np.int32)
        for at, one in enumerate(written):
            block[: len(one.place.block), at] = one.place.block
            path[: len(one.place.path), at] = one.place.path
        positions = np.array([one.place.position for one in written], np.int32)
        return BranchStructure(block, path, positions)


def walk(parts: list[Written | Fork]) -> Iterator[Written]:
    """The tokens of a tree, a fork's paths one after the other."""
    for part in parts:
        if isinstance(part, Fork):
            for path in part.paths:
                yield from walk(path)
        else:
            yield part


def _count(parts: list[Written | Fork]) -> int:
    forks = [part for part in parts if isinstance(part, Fork)]
    return len(forks) + sum(_count(path) for fork in forks for path in fork.paths)
