"""The slow, obvious packer. Tests and the benchmark hold `packing.Rows` to it."""

from collections.abc import Sequence

Row = tuple[list[int], list[int], list[int]]


def pack(documents: Sequence[Sequence[int]], length: int, packing: str = "documents") -> list[Row]:
    """Joins `documents` in the order given and cuts rows of `length`.

    Returns:
      One (tokens, positions, segment_ids) per row, the last one padded with zeros.
    """
    rows: list[Row] = []
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    for document in documents:
        position = 0
        segment = segments[-1] + 1 if segments else 1
        for token in document:
            tokens.append(token)
            positions.append(len(tokens) - 1 if packing == "stream" else position)
            segments.append(1 if packing == "stream" else segment)
            position += 1
            if len(tokens) == length:
                rows.append((tokens, positions, segments))
                tokens, positions, segments = [], [], []
                position, segment = 0, 1
    if tokens:
        padding = [0] * (length - len(tokens))
        rows.append((tokens + padding, positions + padding, segments + padding))
    return rows
