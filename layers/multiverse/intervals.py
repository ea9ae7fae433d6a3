"""Visibility as one interval of hidden queries per key and depth, for tiled kernels."""

import numpy as np


def hidden_intervals(block: np.ndarray, path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From which query on, and up to which, each key is hidden by a block at each depth.

    A key in a path of a block is hidden from what follows that path within its block, up to the
    conclusion. So, for causal attention in one row, query t sees key s <= t unless
    `start[d, s] <= t < stop[d, s]` at some depth d; the same as `masks.Branches`.

    Args:
      block, path: int `[..., depth, S]` of a `BranchStructure`.

    Returns:
      `start` and `stop`, int32 `[..., depth, S]`; both 0 where a key is in no path.

    Raises:
      ValueError: a path is not one run of tokens, or a block is not one run of paths. The
        published layout leaves text between siblings outside; use `masks.Branches` there.
    """
    block, path = np.asarray(block), np.asarray(path)
    if block.shape != path.shape or block.ndim < 2:
        raise ValueError(f"block {block.shape} and path {path.shape} must be [..., depth, S]")
    shape, length = block.shape, max(block.shape[-1], 1)
    block, path = block.reshape(-1), path.reshape(-1)
    start = _run_ends("a path", length, block, path)
    stop = _run_ends("a block", length, block)
    return start.reshape(shape), stop.reshape(shape)


def _run_ends(what: str, length: int, block: np.ndarray, path: np.ndarray | None = None):
    """Where, in its row, the run of equal ids ends that an entry is in; 0 outside of blocks."""
    change = np.empty(block.size, bool)
    np.not_equal(block[1:], block[:-1], out=change[1:])
    if path is not None:
        change[1:] |= path[1:] != path[:-1]
    change[::length] = True
    first = np.flatnonzero(change)
    row = first // length
    runs = [row, block[first]] + ([] if path is None else [path[first]])
    inside = block[first] != 0
    names = np.stack(runs, 1)[inside]
    if len(np.unique(names, axis=0)) != len(names):
        raise ValueError(
            f"{what} is not one run of tokens, so that no interval describes what it hides; "
            "use masks.Branches"
        )
    last = np.append(first[1:], block.size)
    ends = np.where(inside, last - row * length, 0).astype(np.int32)
    return np.repeat(ends, last - first)
