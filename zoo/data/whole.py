"""Rows of whole documents, for those that no border of a row may tear apart."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hackle.zoo.data.packing import Batch


class Document(NamedTuple):
    """A prompt and what a model is to write after it.

    Attributes:
      tokens: int [n], both.
      prompt: how many of them are the prompt, which is not trained.
      given: bool [n], tokens that are not the model's to write, and not trained either. None:
        there are none behind the prompt.
    """

    tokens: np.ndarray
    prompt: int
    given: np.ndarray | None = None


def next_fit(sizes: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Which documents go into which row, in their order: a row is full when the next one does
    not fit. One that is longer than a row has a row for itself.

    Args:
      sizes: of the documents, in tokens.

    Returns:
      First document and one past the last of every row.
    """
    rows, start, left = [], 0, length
    for number, size in enumerate(sizes):
        if size > left and number > start:
            rows.append((start, number))
            start, left = number, length
        left -= size
    return [*rows, (start, len(sizes))] if len(sizes) else []


def lay(rows: Sequence[Sequence[Document]], length: int) -> Batch:
    """Lays documents one after the other into rows; what does not fit at the end is cut off.

    Returns:
      "tokens", "positions", "segment_ids", "loss_mask", each int32 [B, length]. Documents count
      from 1 in each row, `loss_mask` is 1 for the tokens that are trained, and padding is 0 in
      all four.
    """
    names = ("tokens", "positions", "segment_ids", "loss_mask")
    batch = {name: np.zeros((len(rows), length), np.int32) for name in names}
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            stop = min(start + len(document.tokens), length)
            here = (row, slice(start, stop))
            batch["tokens"][here] = document.tokens[: stop - start]
            batch["positions"][here] = np.arange(stop - start)
            batch["segment_ids"][here] = number
            batch["loss_mask"][row, start + document.prompt : stop] = 1
            if document.given is not None:
                batch["loss_mask"][here][document.given[: stop - start]] = 0
            start = stop
    return batch
