"""Between tokens and a terminal: text that grows, and tokens that end it."""

import json
from collections.abc import Sequence
from pathlib import Path

from hackle.zoo.data.tokenizer import Tokenizer
from hackle.zoo.errors import UserError


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
      UserError: a text of `texts` is not one token.
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
        stops.update([ends] if isinstance(ends, int) else ends or [])
    end = _read(folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end is not None and (token := tokenizer.backend.token_to_id(end)) is not None:
        stops.add(token)
    return frozenset(stops)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
