"""What a problem is: a prompt, a verified trace in Multiverse's form, and who may train on it."""

import abc
import dataclasses
import hashlib
from typing import Any, ClassVar

from hackle.zoo.errors import UserError
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
    THINK,
    without_tags,
)
from hackle.zoo.mapreduce.draw import Draw

SPLITS = ("train", "validation")
# A problem is held out when its hash, read as a fraction, is below this share.
VALIDATION_SHARE = 1 / 16
ANSWER = "Answer: "
_ATTEMPTS = 10_000  # of which one in hundreds gives a problem, for the sizes of `sets`


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem and how it is solved; texts in the letters of `alphabet`.

    Attributes:
      kind: name of its kind.
      prompt: one line.
      trace: what the model is to write, from the opening Think tag to the end of the text.
    """

    kind: str
    prompt: str
    trace: str

    @property
    def sequential(self) -> str:
        """The same trace for a model without branches: the same tokens, but for the tags."""
        return without_tags(self.trace)


class Kind(abc.ABC):
    """A kind of problem; a frozen dataclass whose fields are its sizes.

    Attributes:
      edition: raised when texts of the kind change, so that no run goes on with other ones.
      depth: blocks inside one another, at most.
    """

    name: ClassVar[str]
    edition: ClassVar[int] = 1
    depth: int = 1

    @abc.abstractmethod
    def attempt(self, draw: Draw) -> Problem | None:
        """A random problem, or None where the choices did not lead to one."""

    @abc.abstractmethod
    def solved_by(self, prompt: str, answer: str) -> bool:
        """Whether an answer is right, from the two texts alone. Never raises for bad answers."""

    def identity(self, prompt: str) -> str:
        """What is equal for two problems that must be in the same split."""
        return prompt

    def split_of(self, prompt: str) -> str:
        """Which of `SPLITS` a problem belongs to, by the hash of what it is."""
        text = f"{self.name} {self.identity(prompt)}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "big") < VALIDATION_SHARE * 2**64
        return "validation" if held_out else "train"

    def problem(self, split: str, index: int, *, seed: int = 0) -> Problem:
        """Problem `index` of a split: it depends on the kind, the seed, the split and `index`.

        Raises:
          UserError: unknown split, or a negative number; sizes for which none of 10,000 attempts
            gave a problem of the split.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        for name, value in (("index", index), ("seed", seed)):
            if value < 0:
                raise UserError(f"{name}={value}; expected at least 0")
        draw = Draw(seed, SPLITS.index(split), index)
        for _ in range(_ATTEMPTS):
            found = self.attempt(draw)
            if found is not None and self.split_of(found.prompt) == split:
                return found
        raise UserError(f"{self}: no problem of split {split!r} in {_ATTEMPTS:,} attempts")


def require(kind: Any, name: str, holds: bool, expected: str) -> None:
    """Raises the one-line error about field `name` of a kind unless it `holds`."""
    if not holds:
        raise UserError(f"{kind.name}: {name}={getattr(kind, name)}; expected {expected}")


def numbered(inside: str, place: int) -> str:
    """Index of path `place` (from 1) of a block in the path with index `inside`, "" for none."""
    return f"{inside}.{place}" if inside else str(place)


def block(inside: str, goals: list[str], paths: list[str], conclusion: str) -> str:
    """A Parallel block; each text of whole lines. Its paths are numbered below `inside`."""
    names = [numbered(inside, place) for place in range(1, len(goals) + 1)]
    parts = [PARALLEL, GOAL]
    parts += [f"{OUTLINE}{n}: {text}{END_OUTLINE}" for n, text in zip(names, goals, strict=True)]
    parts.append(END_GOAL)
    parts += [f"{PATH}{n}: {text}{END_PATH}" for n, text in zip(names, paths, strict=True)]
    parts += [CONCLUSION, conclusion, END_CONCLUSION, END_PARALLEL]
    return "".join(parts)


def trace(thoughts: str, answer: str) -> str:
    """The whole of what the model writes."""
    return f"{THINK}{thoughts}{END_THINK}{ANSWER}{answer}{END}"
