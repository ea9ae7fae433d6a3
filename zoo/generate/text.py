"""Between tokens and a terminal: text that grows, and tokens that end it."""

from collections.abc import Sequence
from pathlib import Path

from hackle.zoo.data.tokenizer import Tokenizer
from hackle.zoo.errors import UserError
from hackle.zoo.weights.folder import read_json


class TextStream:
    """Turns a stream of tokens into pieces of text, never splitting a character.

    A token can end inside a multi-byte character: its text waits until the character is whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = ""

    def push(self, token: int) -> str:
        """The text that `token` adds, or "" while a character is incomplete."""
        if token < self.tokenizer.vocab_size:  # a model can have more rows; they have no text
            self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special=True)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._show(text)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return self._show(self.tokenizer.decode(self.tokens, skip_special=True))

    def _show(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new


def stop_tokens(
    tokenizer: Tokenizer, folder: Path, texts: Sequence[str] | None = None
) -> frozenset[int]:
    """Ids that end a text: those of `texts`, or what the tokenizer and the model's files say.

    Published folders can name different ends in config.json, generation_config.json and
    tokenizer_config.json (ParScale's do); all of them count.

    Raises:
      UserError: a text of `texts` is not one token, or a file holds no JSON or other ends.
    """
    if texts:
        found = set()
        for text in texts:
            ids = tokenizer.encode(text, special=True)
            if len(ids) != 1:
                raise UserError(f"stop text {text!r} is {len(ids)} tokens; expected one token")
            found.add(ids[0])
        return frozenset(found)
    stops = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    for name in ("config.json", "generation_config.json"):
        ends = _read(folder / name).get("eos_token_id")
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if any(type(one) is not int for one in listed):
            raise UserError(
                f"eos_token_id={ends!r} in {folder / name}; expected an integer or a list of them"
            )
        stops.update(listed)
    end = _read(folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end is not None and (token := tokenizer.backend.token_to_id(end)) is not None:
        stops.add(token)
    return frozenset(stops)


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}
