"""Published rows of Multiverse-1K as training rows: chats, their tokens, and the staged mixture.

A row (arXiv 2506.09991, its data set) has a question, an answer, and how the answer was found in
three forms: the original chain of thought, the same with tags, and that with the tags and what
they brought taken out again. A run goes through eight stages, from original chains alone to
tagged ones alone.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hackle.layers.multiverse import BranchError, Tags, branch_structure
from hackle.zoo.data.files import fraction
from hackle.zoo.data.packing import Batch, seeded_order
from hackle.zoo.data.tokenizer import FILE_NAME, Tokenizer, extend_tokenizer, load_tokenizer
from hackle.zoo.data.whole import Document, lay, next_fit
from hackle.zoo.errors import UserError
from hackle.zoo.local_path import local_path

# Form of a chain of thought -> its field, and what is said behind the question.
_ALONE = " Think step by step before answering."
FORMS = {
    "tagged": (
        "deepseek_thinking_trajectory_parallel",
        " Think step by step and in parallel before answering.",
    ),
    "untagged": ("deepseek_thinking_trajectory_sequential", _ALONE),
    "original": ("deepseek_thinking_trajectory", _ALONE),
}

# A question is held out when its hash, read as a fraction, is below this share.
VALIDATION_SHARE = 0.02

# Qwen2.5's chat template: what stands before the question, between it and the answer, and behind.
BEFORE = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n<|im_start|>user\n"
)
BETWEEN = "<|im_end|>\n<|im_start|>assistant\n"
BEHIND = "<|im_end|>\n"


class Stage(NamedTuple):
    """Which of the tagged and of the original conversations a stage has: from and to, in tenths
    of their order."""

    tagged: tuple[int, int]
    original: tuple[int, int]


# 0, 0, 10, 50, 50, 90, 100 and 100 % of tagged conversations; each stage as long as one pass.
STAGES = (
    Stage((0, 0), (0, 10)),
    Stage((0, 0), (0, 10)),
    Stage((0, 1), (1, 10)),
    Stage((0, 5), (0, 5)),
    Stage((5, 10), (5, 10)),
    Stage((1, 10), (0, 1)),
    Stage((0, 10), (0, 0)),
    Stage((0, 10), (0, 0)),
)


def staged_order(
    tagged: int, original: int, *, seed: int, stages: Sequence[Stage] = STAGES
) -> np.ndarray:
    """The conversations of all stages, one after the other, int64.

    Both kinds are put in a seeded order first, of which stages take parts; then each stage is
    put in an order of its own. Numbers from `tagged` on are original conversations.

    Args:
      tagged, original: how many there are of each kind.
      seed: other seeds give other orders.
      stages: parts of both orders.
    """
    first = seeded_order(tagged, seed, 0)
    second = tagged + seeded_order(original, seed, 1)
    found = []
    for number, stage in enumerate(stages):
        parts = [
            order[len(order) * low // 10 : len(order) * high // 10]
            for order, (low, high) in ((first, stage.tagged), (second, stage.original))
        ]
        here = np.concatenate(parts)
        found.append(here[seeded_order(len(here), seed, 2, number)])
    return np.concatenate(found)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises:
      UserError: no such file, a line that is no JSON object, or a field that is missing or no
        text; names the line.
    """
    path = Path(path)
    try:
        # Not splitlines: JSON may hold other ends of lines, such as U+2028, as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    rows = []
    needed = ("question", "deepseek_attempt", *(field for field, _ in FORMS.values()))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: {error}") from None
        for name in needed:
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path} line {number}: {name} is {value!r}; expected text")
        rows.append(row)
    return rows


def conversation(row: dict[str, Any], form: str) -> tuple[str, str]:
    """Question and answer of a row, as the published script writes them.

    Args:
      form: of the chain of thought, one of `FORMS`.
    """
    field, suffix = FORMS[form]
    thoughts = row[field].strip()
    if form == "original":
        thoughts = f"<Think>\n{thoughts}\n</Think>"
    answer = row["deepseek_attempt"]
    if "Answer:" not in answer:
        answer = f"Answer: {answer}"
    return row["question"] + suffix, f"{thoughts}\n\n{answer.strip()}"


def wrong_index(text: str) -> str | None:
    """Which path has another index than the outline in its place, in words; None if there is none.

    Args:
      text: a tagged chain that follows the grammar. An index is the number, or numbers with dots,
        and a colon that an outline or a path begins with; those without one are not compared.
    """
    announced: list[list[str]] = []  # indices of the outlines of each open block
    for match in _INDEXED.finditer(text):
        tag, index = match[1], match[2]
        if tag == "Parallel":
            announced.append([])
        elif tag == "/Parallel":
            announced.pop()
        elif tag == "Outline":
            announced[-1].append(index)
        elif announced[-1]:
            expected = announced[-1].pop(0)
            if expected and index and expected != index:
                return f"a path has index {index}, but its outline {expected}"
    return None


_INDEXED = re.compile(r"<(/?Parallel|Outline|Path)>(?:\s*(\d+(?:\.\d+)*):)?")


class Encoder:
    """Conversations as tokens of a Qwen tokenizer that knows the tags.

    Attributes:
      tokenizer: with the tags.
      tags: their ids.
    """

    def __init__(self, tokenizer: str | Path, folder: Path):
        """
        Args:
          tokenizer: a tokenizer.json, or a folder with one. Tags that it lacks are added.
          folder: where the tokenizer with tags is written.

        Raises:
          UserError: no tokenizer, one without the tokens of the chat template, or an unwritable
            folder.
        """
        given = load_tokenizer(tokenizer)
        for token in ("<|im_start|>", "<|im_end|>"):
            if given.backend.token_to_id(token) is None:
                raise UserError(f"tokenizer {given.path} has no {token}; expected one of Qwen2.5")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer = extend_tokenizer(given, Tags().tokens(), folder / FILE_NAME)
        except OSError as error:
            raise UserError(f"cannot write data folder {folder}: {error.strerror}") from None
        self.tags = Tags().located(self.tokenizer.backend.token_to_id)
        self._before, self._between, self._behind = (
            self.tokenizer.encode(text, special=True) for text in (BEFORE, BETWEEN, BEHIND)
        )

    def document(self, question: str, answer: str, *, tagged: bool) -> Document:
        """The tokens of a chat, int32 `[n]`.

        The question is plain text, whatever it spells. Of the answer only the tags are special
        tokens, or only those of thinking where it is not `tagged`.
        """
        prompt = [*self._before, *self.tokenizer.encode(question.strip()), *self._between]
        tags = [*self.tags.tokens()][: None if tagged else 2]
        pieces = re.split(f"({'|'.join(map(re.escape, tags))})", answer)
        written = [
            token
            for piece in pieces
            for token in self.tokenizer.encode(piece, special=piece in tags)
        ]
        tokens = np.array([*prompt, *written, *self._behind], np.int32)
        return Document(tokens, len(prompt))


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
    """A file of published rows, encoded.

    Attributes:
      tagged, original: to train on, in the order of the file. `tagged` are without tags for the
        baseline that knows no branches.
      held_out: the other ones, as in `tagged`.
      tokenizer: with the tags.
      tags: their ids.
      fingerprint: two runs with the same one read the same tokens.
    """

    tagged: list[Document]
    original: list[Document]
    held_out: list[Document]
    tokenizer: Tokenizer
    tags: Tags
    fingerprint: str


def encode_file(
    path: str | Path, data_dir: str | Path, tokenizer: str | Path, *, tagged: bool, depth: int
) -> Conversations:
    """Encodes all conversations of a file of published rows.

    Args:
      path: JSONL.
      data_dir: the tokenizer with tags is written into a folder in it.
      tokenizer: see `Encoder`.
      tagged: False takes the tags out, for the baseline.
      depth: blocks inside one another, at most.

    Raises:
      UserError: see `read_rows` and `Encoder`; a chain that does not follow the grammar, or whose
        paths have other indices than their outlines (names the line's number among the rows, and
        the token or the index); no row to train on.
    """
    path = local_path(path, "corpus")
    rows = read_rows(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    encoder = Encoder(tokenizer, local_path(data_dir, "data_dir") / "conversations" / digest[:12])
    kept, plain, held_out = [], [], []
    for number, row in enumerate(rows, 1):
        forms = ("tagged" if tagged else "untagged", "original")
        one, other = (
            encoder.document(*conversation(row, form), tagged=form == "tagged") for form in forms
        )
        if tagged:
            try:
                for document in (one, other):  # both are trained, in a batch of one structure
                    branch_structure(document.tokens, encoder.tags, depth=depth)
            except BranchError as error:
                raise UserError(f"{path} row {number}: {error}") from None
            if (reason := wrong_index(row[FORMS["tagged"][0]])) is not None:
                raise UserError(f"{path} row {number}: {reason}")
        question = hashlib.sha256(row["question"].encode()).hexdigest()
        if fraction(question) < VALIDATION_SHARE:
            held_out.append(one)
        else:
            kept.append(one)
            plain.append(other)
    if not kept:
        raise UserError(f"{path} holds no row to train on")
    identity = f"conversations {digest} {encoder.tokenizer.sha256} {tagged}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return Conversations(kept, plain, held_out, encoder.tokenizer, encoder.tags, fingerprint)


class ConversationRows:
    """Rows of whole conversations; a `RowSource` for `Batches`.

    Documents longer than a row are cut at its end, which leaves what is before as it was: their
    structure and loss hang on earlier tokens alone.

    Args:
      documents: in the order in which rows are filled.
      length: tokens in a row.

    Attributes:
      count: rows.
      cut: documents among them that are longer than a row.
    """

    def __init__(self, documents: Sequence[Document], length: int):
        self._documents, self._length = documents, length
        sizes = [len(document.tokens) for document in documents]
        self._places = next_fit(sizes, length)
        self.count = len(self._places)
        self.cut = sum(size > length for size in sizes)

    def take(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, as `lay` makes it; a negative number gives a row of padding."""
        places = [self._places[row] if row >= 0 else (0, 0) for row in rows]
        return lay([self._documents[start:stop] for start, stop in places], self._length)

    def __repr__(self) -> str:
        return f"ConversationRows({len(self._documents)} documents, {self._length})"
