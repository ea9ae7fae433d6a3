"""The letters of the generated problems: a character is a token, and its code point is the id.

ASCII stands for itself, the twelve tags of Multiverse (arXiv 2506.09991) are the code points from
128 on, and 0 ends a text. So a text is encoded by looking at its bytes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hackle.layers.multiverse import Tags
from hackle.zoo.errors import UserError

END = "\0"
END_ID = 0
FIRST_TAG = 128
TAG_IDS = Tags.numbered(FIRST_TAG)
SPELLINGS = tuple(TAG_IDS.tokens())
(
    THINK, END_THINK, PARALLEL, END_PARALLEL, GOAL, END_GOAL,
    OUTLINE, END_OUTLINE, PATH, END_PATH, CONCLUSION, END_CONCLUSION,
) = _LETTERS = tuple(map(chr, TAG_IDS.tokens().values()))  # fmt: skip
TAGS = "".join(_LETTERS)
VOCAB_SIZE = FIRST_TAG + len(TAGS)
# Ends the index of an outline or a path, as in "1.2: ...".
INDEX_END = (ord(":"),)

_WITHOUT_TAGS = str.maketrans("", "", TAGS)
_SPELLED = str.maketrans(dict(zip(TAGS, SPELLINGS, strict=True)))


def encode(text: str) -> np.ndarray:
    """Token ids, int32.

    Raises:
      UserError: a character that is neither ASCII nor a tag.
    """
    try:
        ids = np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int32)
    except UnicodeEncodeError as error:
        ids = np.array([ord(text[error.start])])
    if ids.size and ids.max() >= VOCAB_SIZE:
        letter = chr(ids[ids >= VOCAB_SIZE][0])
        raise UserError(f"the problems' alphabet has no {letter!r}; expected ASCII and tags")
    return ids


def decode(ids: Sequence[int] | np.ndarray) -> str:
    """The text of token ids; one that no text has, which a model can write, becomes "?"."""
    return "".join(chr(i) if 0 <= i < VOCAB_SIZE else "?" for i in ids)


def given(ids: np.ndarray) -> np.ndarray:
    """Bool `[n]`: which of the ids of a trace, int `[n]`, its decoder writes and not the model.

    They are the tags of paths with their indices, and of conclusions (`generate_branches`). The
    paths of a block begin alike, and do not see each other: which index comes next cannot be known,
    and to train it would only add noise.
    """
    found = ids == ord(CONCLUSION)
    ends = np.append(np.flatnonzero(ids == INDEX_END[0]), len(ids))
    for start in np.flatnonzero(ids == ord(PATH)):
        found[start : ends[np.searchsorted(ends, start)] + 1] = True
    return found


def without_tags(text: str) -> str:
    """The text a model writes that knows no branches: the same characters, but for the tags."""
    return text.translate(_WITHOUT_TAGS)


def spelled(text: str) -> str:
    """For people: tags spelled out, and no end of text."""
    return text.translate(_SPELLED).replace(END, "")


def read(spelling: str) -> str:
    """The text that `spelled` shows as `spelling`, without its end."""
    for tag, name in zip(TAGS, SPELLINGS, strict=True):
        spelling = spelling.replace(name, tag)
    return spelling


def write_tokenizer(path: Path) -> None:
    """Writes this alphabet as a tokenizer.json, for all that reads published folders."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    from hackle.zoo.data.tokenizer import END_OF_TEXT

    special = {END_ID: END_OF_TEXT}
    special |= {FIRST_TAG + place: name for place, name in enumerate(SPELLINGS)}
    vocabulary = {special.get(i, chr(i)): i for i in range(VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(special[i], special=True, normalized=False) for i in sorted(special)]
    )
    path.write_text(backend.to_str(), encoding="utf-8")
