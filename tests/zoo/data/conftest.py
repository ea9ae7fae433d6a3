"""One tiny corpus of made-up code, prepared once."""

import itertools
import random
from pathlib import Path

import pytest

from hackle.zoo.data import Prepared, prepare

FILES = 40


def write_corpus(folder: Path, files: int = FILES, seed: int = 0) -> Path:
    """Files of very unequal length: some shorter than a row, some many rows long."""
    source = random.Random(seed)
    words = [
        "def",
        "return",
        "value",
        "naïve",
        "if",
        "    ",
        "\n",
        "x = 1",
        "日本",
        "(a, b):\n",
        "#",
    ]
    for i in range(files):
        count = source.choice([1, 3, 10, 60, 400])
        text = f"# file {i}\n" + " ".join(source.choice(words) for _ in range(count))
        path = folder / f"part{i % 3}" / f"file{i:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "My code")


@pytest.fixture(scope="session")
def prepared(corpus_folder, tmp_path_factory) -> Prepared:
    return prepare(corpus_folder, tmp_path_factory.mktemp("data"), vocab_size=300)


@pytest.fixture(scope="session")
def documents(prepared) -> list[list[int]]:
    """Token lists of the train split in stored order."""
    tokens, offsets = prepared.tokens("train"), prepared.offsets("train")
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
