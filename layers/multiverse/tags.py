"""The control tags of a text that branches: which token opens and closes what."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Token id of `<Think>` in the published tokenizer; the other eleven tags follow it.
_PUBLISHED = 151665


class Tag(NamedTuple):
    """`<word>` and `</word>`, and the ids of these two tokens."""

    word: str
    open: int
    close: int

    @classmethod
    def at(cls, word: str, first: int) -> "Tag":
        """A tag whose two tokens have the ids `first` and `first + 1`."""
        return cls(word, first, first + 1)


def _numbered(words: Sequence[str], first: int) -> list[tuple[Tag]]:
    return [(Tag.at(word, first + 2 * i),) for i, word in enumerate(words)]


_THINK, _PARALLEL, _GOAL, _OUTLINE, _PATH, _CONCLUSION = _numbered(
    ("Think", "Parallel", "Goal", "Outline", "Path", "Conclusion"), _PUBLISHED
)


@dataclasses.dataclass(frozen=True)
class Tags:
    """The tags that play each role in the grammar; `Tags()` is Multiverse's published set.

        Document   := text | think-open Item* think-close text
        Item       := text | Block
        Block      := parallel-open Goal Path+ Conclusion parallel-close
        Goal       := goal-open (outline-open text outline-close)* goal-close
        Path       := path-open Item* path-close
        Conclusion := conclusion-open text conclusion-close

    A role is a tuple of tags. Where it is empty, the set of tags lacks the role and the grammar is
    read without it; where it has several, any of them plays it. The think tags may also be left
    out of a document, whose blocks then stand in plain text.

    Raises:
      ValueError: a token has two roles, an id is negative, there is no path, or nothing that ends
        the last path (conclusion or parallel).
    """

    think: tuple[Tag, ...] = _THINK
    parallel: tuple[Tag, ...] = _PARALLEL
    goal: tuple[Tag, ...] = _GOAL
    outline: tuple[Tag, ...] = _OUTLINE
    path: tuple[Tag, ...] = _PATH
    conclusion: tuple[Tag, ...] = _CONCLUSION

    def __post_init__(self):
        if not self.path:
            raise ValueError("tags have no path; nothing could branch")
        if not self.conclusion and not self.parallel:
            raise ValueError("tags have neither conclusion nor parallel; no block could end")
        seen: dict[int, str] = {}
        for text, token in self.tokens().items():
            if token < 0 or token in seen:
                other = f", which {seen[token]} has too" if token in seen else ""
                raise ValueError(f"tag {text} has token id {token}{other}")
            seen[token] = text

    @classmethod
    def numbered(cls, first: int) -> "Tags":
        """The published tags, in their order, at the ids from `first` on.

        Raises:
          ValueError: `first` is negative; so for the other sets.
        """
        shift = first - _PUBLISHED
        moved = {
            name: tuple(Tag(tag.word, tag.open + shift, tag.close + shift) for tag in role)
            for name, role in cls().roles().items()
        }
        return cls(**moved)

    @classmethod
    def parathinker(cls, first: int = _PUBLISHED, paths: int = 8) -> "Tags":
        """ParaThinker (arXiv 2509.04475): `<think1>` .. `<think8>`, then one `<summary>`."""
        thinks = tuple(Tag.at(f"think{k + 1}", first + 2 * k) for k in range(paths))
        summary = (Tag.at("summary", first + 2 * paths),)
        return cls(think=(), parallel=(), goal=(), outline=(), path=thinks, conclusion=summary)

    @classmethod
    def npr(cls, first: int) -> "Tags":
        """NPR (arXiv 2512.07461): guideline, plan, step, takeaway; nothing around a block."""
        goal, outline, path, conclusion = _numbered(
            ("guideline", "plan", "step", "takeaway"), first
        )
        return cls((), (), goal, outline, path, conclusion)

    @classmethod
    def threadweaver(cls, first: int) -> "Tags":
        """ThreadWeaver (arXiv 2512.07843): Parallel, Outlines, Outline, Thread; no conclusion."""
        words = ("Parallel", "Outlines", "Outline", "Thread")
        parallel, goal, outline, path = _numbered(words, first)
        return cls((), parallel, goal, outline, path, ())

    def roles(self) -> dict[str, tuple[Tag, ...]]:
        """Role -> its tags, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def tokens(self) -> dict[str, int]:
        """Text of a tag -> token id, in the order in which they are added to a tokenizer."""
        found = {}
        for role in self.roles().values():
            for tag in role:
                found[f"<{tag.word}>"] = tag.open
                found[f"</{tag.word}>"] = tag.close
        return found

    def beyond(self, rows: int) -> str | None:
        """The first tag without a row in a table of `rows` rows, in words; None if all have one."""
        for text, token in self.tokens().items():
            if token >= rows:
                return f"tag {text} has token id {token}"
        return None

    def located(self, token_id: Callable[[str], int | None]) -> "Tags":
        """The same tags at the ids that a tokenizer gives their texts.

        Raises:
          ValueError: a text is not one token, `token_id` gives None.
        """

        def find(text: str) -> int:
            found = token_id(text)
            if found is None:
                raise ValueError(f"the tokenizer has no token {text}")
            return found

        roles = {
            name: tuple(Tag(w, find(f"<{w}>"), find(f"</{w}>")) for w, *_ in role)
            for name, role in self.roles().items()
        }
        return Tags(**roles)


def embed_tags(table: jax.Array, tags: Tags, encode: Callable[[str], Sequence[int]]) -> jax.Array:
    """First embedding of every tag: the mean of the rows of the word in its brackets.

    A closing tag keeps its slash: `</Path>` starts as the mean of the tokens of "/Path". A head
    that is not tied gets the same treatment, on its own rows.

    Args:
      table: `[V, D]`, one row a token.
      encode: token ids of a plain text.

    Returns:
      The table with the rows of the tags replaced, in its dtype; the means are float32 or wider.

    Raises:
      ValueError: the table has no row for a tag, or a word has no tokens, or tokens that are
        tags themselves or outside the table.
    """
    tokens = tags.tokens()
    rows = table.shape[0]
    if (reason := tags.beyond(rows)) is not None:
        raise ValueError(f"{reason}, but the table has {rows} rows")
    words: list[np.ndarray] = []
    for text in tokens:
        word = np.asarray(encode(text.strip("<>")), np.int64)
        if word.size == 0 or np.isin(word, list(tokens.values())).any() or word.max() >= rows:
            raise ValueError(
                f"the word of tag {text} has tokens {word.tolist()}; expected some of "
                f"0..{rows - 1} that are no tags"
            )
        words.append(word)
    counts = np.array([word.size for word in words])
    parts = jnp.asarray(table)[np.concatenate(words)]
    parts = parts.astype(jnp.promote_types(parts.dtype, jnp.float32))
    owners = np.repeat(np.arange(counts.size), counts)
    means = jax.ops.segment_sum(parts, owners, counts.size) / counts[:, None].astype(parts.dtype)
    ids = np.fromiter(tokens.values(), np.int64)
    return jnp.asarray(table).at[ids].set(means.astype(table.dtype))
