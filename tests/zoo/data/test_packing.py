"""Rows against the slow packer and against the documents themselves."""

import numpy as np
import pytest

from hackle.zoo.data import reference
from hackle.zoo.data.packing import Rows, seeded_order

NAMES = ("tokens", "positions", "segment_ids")


def join(documents):
    offsets = np.cumsum([0, *map(len, documents)])
    return np.array([t for d in documents for t in d], np.uint16), offsets


def random_documents(seed):
    source = np.random.default_rng(seed)
    lengths = source.integers(1, source.choice([2, 5, 40]) + 1, source.integers(1, 30))
    return [source.integers(1, 999, n).tolist() for n in lengths]


@pytest.mark.parametrize("packing", ["documents", "stream"])
@pytest.mark.parametrize("seed", range(12))
def test_equal_to_the_reference(seed, packing):
    documents = random_documents(seed)
    for length in (2, 3, 7, 16, 64):
        for order_seed, epoch in ((None, 0), (seed, 0), (seed, 5)):
            rows = Rows(*join(documents), length=length, seed=order_seed, packing=packing)
            joined = [documents[i] for i in rows.document_order(epoch)]
            expected = reference.pack(joined, length, packing)
            assert len(expected) == rows.per_epoch
            expected = [expected[i] for i in rows.row_order(epoch)]
            batch = rows.take(np.arange(rows.per_epoch) + epoch * rows.per_epoch)
            got = zip(*(batch[name].tolist() for name in NAMES), strict=True)
            assert list(map(tuple, got)) == expected
            for name in NAMES:
                assert batch[name].dtype == np.int32
                assert batch[name].shape == (rows.per_epoch, length)


@pytest.mark.parametrize("seed", range(6))
def test_segments_of_an_epoch_put_together_are_the_documents(seed):
    """Independent of the reference: cut rows at segment ids, sort, join at positions 0."""
    source = np.random.default_rng(seed)
    # Every document is (number, 0), (number, 1), ... so that each token names its place.
    lengths = source.integers(1, 30, 20)
    documents = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    rows = Rows(*join(documents), length=8, seed=seed)
    batch = rows.take(np.arange(rows.per_epoch, 2 * rows.per_epoch))
    seen = []
    for tokens, positions, segments in zip(*(batch[name] for name in NAMES), strict=True):
        real = segments > 0
        steps = np.diff(segments[real])
        assert segments[0] == 1 and np.isin(steps, (0, 1)).all()
        for segment in range(1, segments.max() + 1):
            piece = tokens[segments == segment]
            assert len(set(piece // 100)) == 1  # of one document
            assert (np.diff(piece) == 1).all()  # in order
            assert positions[segments == segment].tolist() == list(range(len(piece)))
            seen += piece.tolist()
        for array in (tokens, positions, segments):
            assert not array[~real].any()
    assert sorted(seen) == sorted(t for d in documents for t in d)
    assert (batch["segment_ids"] == 0).sum() == rows.per_epoch * 8 - lengths.sum()
    assert (batch["segment_ids"] == 0).any(axis=1).sum() <= 1


def test_stream_is_one_segment_a_row():
    rows = Rows(*join([[1, 0], [2, 2, 0], [3, 0]]), length=3, seed=None, packing="stream")
    batch = rows.take(np.arange(3))
    assert batch["tokens"].tolist() == [[1, 0, 2], [2, 0, 3], [0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2], [0, 1, 2], [0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]


def test_rows_across_epochs_and_padding_rows():
    rows = Rows(*join(random_documents(1)), length=5, seed=3)
    wanted = np.array([7, rows.per_epoch + 2, -1, 0, 3 * rows.per_epoch])
    batch = rows.take(wanted)
    for i, row in enumerate(wanted):
        for name in NAMES:
            alone = rows.take(np.array([row]))[name][0]
            assert (batch[name][i] == alone).all()
    assert not any(batch[name][2].any() for name in NAMES)


def test_orders_are_permutations_that_differ_by_key():
    orders = [seeded_order(50, *key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (-1,))]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == len(orders)
    assert (seeded_order(50, 0, 0, 0) == orders[0]).all()


def test_order_is_pinned():
    """Resumed runs depend on it: this may change only with a format version."""
    assert seeded_order(8, 0, 0, 0).tolist() == [1, 0, 4, 6, 7, 2, 3, 5]


def test_order_is_fair():
    """Each place sees each value about equally often."""
    counts = np.zeros((6, 6), int)
    for seed in range(3000):
        counts[np.arange(6), seeded_order(6, seed, 1)] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(500)
