"""What trained models write for held-out problems: decoded, judged, kept, and summed up."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hackle.layers.causal_decoder import CausalDecoder
from hackle.layers.language_model import LanguageModel
from hackle.zoo.errors import UserError
from hackle.zoo.generate import generate, generate_branches
from hackle.zoo.mapreduce import sets
from hackle.zoo.mapreduce.alphabet import END_ID, INDEX_END, decode, encode, spelled
from hackle.zoo.mapreduce.form import judge
from hackle.zoo.mapreduce.problem import Kind


class Written(NamedTuple):
    """What a decoder made of a prompt.

    Attributes:
      tokens: new ones, in the order of the text.
      critical_path: of them, those that had to wait for one another.
    """

    tokens: Sequence[int]
    critical_path: int


class Decoder(Protocol):
    """Writes after prompts, of which it takes `batch` at once."""

    batch: int

    def __call__(self, prompts: list[list[int]]) -> list[Written]: ...


class SequentialDecoder:
    """Greedy, one token after the other."""

    batch = 48

    def __init__(self, model: LanguageModel, *, max_new_tokens: int):
        self._model, self._most = model, max_new_tokens

    def __call__(self, prompts: list[list[int]]) -> list[Written]:
        found = generate(self._model, prompts, max_new_tokens=self._most, eos=END_ID)
        return [Written(tokens, len(tokens)) for tokens in found]


class BranchDecoder:
    """Greedy, paths side by side; one prompt at a time."""

    batch = 1

    def __init__(self, model: CausalDecoder, *, max_new_tokens: int):
        self._model, self._most = model, max_new_tokens

    def __call__(self, prompts: list[list[int]]) -> list[Written]:
        found = []
        for prompt in prompts:
            draft = generate_branches(
                self._model, prompt, max_new_tokens=self._most, index_end=INDEX_END, eos=END_ID
            )
            found.append(Written(draft.tokens, draft.critical_path))
        return found


DECODERS: Mapping[str, Callable[..., Decoder]] = {
    "parallel": BranchDecoder,
    "sequential": SequentialDecoder,
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One problem, decoded and judged; as JSON takes it.

    Attributes:
      index: of the problem, in the validation split of its set.
      tokens, critical_path: numbers of them, see `Written`.
      text: what was written, tags spelled out.
    """

    index: int
    kind: str
    well_formed: bool
    correct: bool
    fault: str
    tokens: int
    critical_path: int
    text: str


def evaluate(
    load: Callable[[], Decoder],
    kinds: Sequence[Kind],
    path: Path,
    *,
    problems: int,
    tagged: bool,
    until: float = math.inf,
    tell: Callable[[list[Outcome]], None] = lambda found: None,
) -> list[Outcome]:
    """Decodes the first `problems` held-out problems of a set, those that `path` has not yet.

    Every batch is added to the file when it is done, one line an outcome.

    Args:
      load: gives the decoder; called once, if there is something to decode.
      kinds: of the set.
      path: JSONL; of the same model and set.
      tagged: whether the model writes tags.
      until: `time.monotonic()` at which to stop; the batch that has begun is finished.
      tell: called with all outcomes after every batch.

    Returns:
      The outcomes there are, in order.

    Raises:
      UserError: the file is of something else.
    """
    found = read_outcomes(path)[:problems]
    for one in found:
        if one.kind != kinds[one.index % len(kinds)].name:
            raise UserError(f"{path} holds outcomes of other problems; remove it")
    decoder = None
    while len(found) < problems and time.monotonic() < until:
        decoder = decoder or load()
        indices = range(len(found), min(len(found) + decoder.batch, problems))
        asked = [sets.problem(kinds, "validation", index) for index in indices]
        written = decoder([encode(one.prompt).tolist() for one in asked])
        for index, problem, made in zip(indices, asked, written, strict=True):
            text, size = decode(made.tokens), len(made.tokens)
            kind = kinds[index % len(kinds)]
            verdict = judge(kind, problem.prompt, text, tagged=tagged)
            found.append(
                Outcome(index, kind.name, *verdict, size, made.critical_path, spelled(text))
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            for one in found[indices.start :]:
                file.write(json.dumps(dataclasses.asdict(one)) + "\n")
        tell(found)
    return found


def read_outcomes(path: Path) -> list[Outcome]:
    """The outcomes in a file; a last line that was cut off is left out, and removed.

    Raises:
      UserError: a line is none.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        return [Outcome(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no outcomes: {error}") from None


def summary(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Shares in per cent, and means; None where there is nothing to count."""
    found = list(outcomes)

    def mean(values: Iterable[float], scale: float = 1.0) -> float | None:
        values = list(values)
        return scale * sum(values) / len(values) if values else None

    tokens, path = (mean(getattr(o, name) for o in found) for name in ("tokens", "critical_path"))
    return {
        "problems": len(found),
        "accuracy %": mean((o.correct for o in found), 100),
        "well formed %": mean((o.well_formed for o in found), 100),
        "tokens": tokens,
        "critical path": path,
        "tokens / critical path": tokens / path if tokens and path else None,
    }


def difference(
    pairs: Iterable[tuple[Sequence[Outcome], Sequence[Outcome]]],
) -> tuple[int, float, float]:
    """Accuracy of the first of each pair less that of the second, on problems that both have.

    Pairs are given the same problems: what they make of one is averaged first.

    Returns:
      How many problems those are; the difference in per cent, and its standard error over the
      choice of problems, which ones that both solve or neither does not make larger.
    """
    gaps: dict[int, list[int]] = {}
    for one, other in pairs:
        right: Mapping[int, bool] = {o.index: o.correct for o in other}
        for o in one:
            if o.index in right:
                gaps.setdefault(o.index, []).append(o.correct - right[o.index])
    if not gaps:
        return 0, math.nan, math.nan
    each = [sum(some) / len(some) for some in gaps.values()]
    mean = sum(each) / len(each)
    variance = sum(gap * gap for gap in each) / len(each) - mean**2
    return len(each), 100 * mean, 100 * math.sqrt(max(variance, 0.0) / len(each))
