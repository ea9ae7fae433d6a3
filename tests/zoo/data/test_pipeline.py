"""The iterator: order, state, processes, ends."""

import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from hackle.zoo.data import batch_source, batches, reference
from hackle.zoo.errors import UserError

NAMES = ("tokens", "positions", "segment_ids")
SHAPE = dict(batch=4, length=16)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == set(NAMES)
        for name in NAMES:
            np.testing.assert_array_equal(a[name], b[name])


def rows_of(found):
    """Every real row of these batches as (tokens, positions, segments)."""
    rows = [
        tuple(tuple(batch[name][i].tolist()) for name in NAMES)
        for batch in found
        for i in range(len(batch["tokens"]))
    ]
    return [row for row in rows if any(row[2])]


def packed(documents, packing="documents"):
    rows = reference.pack(documents, SHAPE["length"], packing)
    return [tuple(map(tuple, row)) for row in rows]


def epoch_batches(prepared):
    """Batches in which the first epoch of the train split ends."""
    return len(batch_source(prepared, "train", epochs=1, **SHAPE))


def test_shapes_and_types(prepared):
    batch = next(batches(prepared, "train", **SHAPE))
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: ((4, 16), np.dtype(np.int32)) for name in NAMES
    }


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_an_epoch_is_the_reference_rows_in_some_order(prepared, documents, packing):
    source = batch_source(prepared, "train", packing=packing, shuffle=False, epochs=1, **SHAPE)
    found = [source[i] for i in range(len(source))]
    expected = packed(documents, packing)
    assert rows_of(found) == expected
    shuffled = rows_of(batches(prepared, "train", packing=packing, epochs=1, **SHAPE))
    assert len(shuffled) == len(expected)
    pieces = sorted(t for row in shuffled for t, s in zip(row[0], row[2], strict=True) if s)
    assert pieces == sorted(t for document in documents for t in document)


def test_order_is_by_seed_and_new_each_epoch(prepared):
    count = epoch_batches(prepared)
    first = take(batches(prepared, "train", seed=1, **SHAPE), 2 * count)
    same(first, take(batches(prepared, "train", seed=1, threads=3, **SHAPE), 2 * count))
    same(first, take(batches(prepared, "train", seed=1, threads=0, **SHAPE), 2 * count))
    other = take(batches(prepared, "train", seed=2, **SHAPE), count)
    assert rows_of(other) != rows_of(first[:count])
    two = rows_of(batches(prepared, "train", seed=1, epochs=2, **SHAPE))
    half = len(two) // 2
    assert two[:half] != two[half:] and set(two[:half]) != set(two[half:])


def test_neighbouring_rows_are_from_different_documents(prepared):
    """Rows are shuffled too: a long document does not fill a batch."""
    plain = batch_source(prepared, "train", shuffle=False, epochs=1, **SHAPE)
    mixed = batch_source(prepared, "train", seed=0, epochs=1, **SHAPE)

    def continued(source):
        return sum(
            int(batch["positions"][i, 0] == 0 and batch["segment_ids"][i].max() == 1)
            and batch["tokens"][i, -1] != prepared.eos_id
            and np.array_equal(joined[at + 16 : at + 32], batch["tokens"][i + 1])
            for batch in (source[b] for b in range(len(source)))
            for i in range(3)
            for at in starts.get(batch["tokens"][i].tobytes(), [])
        )

    joined = np.asarray(prepared.tokens("train"), np.int32)
    starts: dict[bytes, list[int]] = {}
    for at in range(len(joined) - 32):
        starts.setdefault(joined[at : at + 16].tobytes(), []).append(at)
    assert continued(plain) > 20 * max(1, continued(mixed))


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_state_is_exact_in_and_across_epochs(prepared, threads):
    count = epoch_batches(prepared)
    straight = take(batches(prepared, "train", seed=5, threads=0, **SHAPE), 2 * count + 6)
    for stop in (0, 1, count // 2, count - 1, count, count + 1, 2 * count + 1):
        first = batches(prepared, "train", seed=5, threads=threads, **SHAPE)
        take(first, stop)
        state = json.loads(json.dumps(first.get_state()))
        same(take(first, 5), straight[stop : stop + 5])  # reading on does not disturb it
        second = batches(prepared, "train", seed=5, threads=threads, **SHAPE)
        take(second, 2)  # nor does what the other one has read before
        second.set_state(state)
        assert second.get_state() == state
        same(take(second, 5), straight[stop : stop + 5])


def test_orbax_saves_and_restores_it(prepared, tmp_path):
    from orbax.checkpoint import v1 as ocp

    iterator = batches(prepared, "train", seed=5, **SHAPE)
    take(iterator, 7)
    with ocp.training.Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save_checkpointables(7, {"data": iterator})
    expected = take(iterator, 4)
    fresh = batches(prepared, "train", seed=5, **SHAPE)
    with ocp.training.Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.load_checkpointables(7, {"data": fresh})
    same(take(fresh, 4), expected)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch(prepared, processes, epochs):
    options = dict(seed=9, epochs=epochs, **SHAPE)
    whole = list(batches(prepared, "train", **options))
    parts = [
        list(batches(prepared, "train", process_index=i, process_count=processes, **options))
        for i in range(processes)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    assert parts[0][0]["tokens"].shape == (4 // processes, 16)
    joined = [
        {name: np.concatenate([batch[name] for batch in ranks]) for name in NAMES}
        for ranks in zip(*parts, strict=True)
    ]
    same(joined, whole)


def test_another_number_of_processes_continues_with_the_same_rows(prepared):
    whole = batches(prepared, "train", seed=9, **SHAPE)
    take(whole, 3)
    part = batches(prepared, "train", seed=9, process_index=1, process_count=2, **SHAPE)
    part.set_state(whole.get_state())
    for _ in range(3):
        expected = next(whole)
        got = next(part)
        for name in NAMES:
            np.testing.assert_array_equal(got[name], expected[name][2:])


def test_validation_is_finite_whole_and_in_stored_order(prepared):
    tokens, offsets = prepared.tokens("validation"), prepared.offsets("validation")
    stored = [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    # Batches of 5 and of 64 rows: a last batch partly empty, and one nearly all empty.
    for batch in (5, 64):
        options = dict(batch=batch, length=16, shuffle=False, epochs=1)
        found = list(batches(prepared, "validation", **options))
        assert {b["tokens"].shape for b in found} == {(batch, 16)}
        assert len(found) == len(batch_source(prepared, "validation", **options))
        assert rows_of(found) == packed(stored)
        assert sum((b["segment_ids"] > 0).sum() for b in found) == len(tokens)
        same(list(batches(prepared, "validation", **options)), found)


def test_ends_once_and_can_be_set_back(prepared):
    iterator = batches(prepared, "train", epochs=1, **SHAPE)
    start = iterator.get_state()
    found = list(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    iterator.set_state(start)
    same(list(iterator), found)


def test_rows_longer_than_the_corpus(prepared):
    length = prepared.splits["validation"].tokens + 100
    (batch,) = batches(prepared, "validation", batch=2, length=length, shuffle=False, epochs=1)
    assert (batch["segment_ids"][0] > 0).sum() == length - 100 and not batch["tokens"][1].any()
    assert batch["segment_ids"][0].max() == prepared.splits["validation"].documents


def test_source_is_sent_to_workers_without_its_tokens(prepared):
    source = batch_source(prepared, "train", **SHAPE)
    expected = source[3]
    data = pickle.dumps(source)
    assert len(data) < 2000 < prepared.splits["train"].tokens
    same([pickle.loads(data)[3]], [expected])


def test_worker_processes(prepared, tmp_path):
    """In a program of its own, as workers are started anew and import the main module."""
    code = f"""
import numpy as np
from hackle.zoo.data import batches, load_prepared
def main():
    prepared = load_prepared({str(prepared.folder)!r})
    plain = batches(prepared, "train", batch=4, length=16, seed=2, threads=0)
    worked = batches(prepared, "train", batch=4, length=16, seed=2, workers=2)
    for i in range(9):
        if i == 4:
            state = worked.get_state()
        left, right = next(plain), next(worked)
        assert all(np.array_equal(left[name], right[name]) for name in left)
    again = batches(prepared, "train", batch=4, length=16, seed=2, workers=2)
    again.set_state(state)
    plain = batches(prepared, "train", batch=4, length=16, seed=2, threads=0)
    plain.set_state({{"next_index": 4}})
    for i in range(4):
        left, right = next(plain), next(again)
        assert all(np.array_equal(left[name], right[name]) for name in left)
    print("same")
if __name__ == "__main__":
    main()
"""
    script = tmp_path / "main.py"
    script.write_text(code)
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout == "same\n", ran.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch=0), "batch 0 is too small; expected at least 1"),
        (dict(length=1), "length 1 is too small; expected at least 2"),
        (dict(epochs=0), "epochs 0 is too small"),
        (dict(packing="best"), "unknown packing 'best'; expected one of documents, stream"),
        (dict(process_index=0, process_count=3), "batch 4 does not divide among 3 processes"),
        (dict(process_index=2, process_count=2), "process_index 2 is not one of 2"),
        (dict(process_index=0), "together or neither"),
    ],
)
def test_bad_options(prepared, options, message):
    with pytest.raises(UserError, match=message):
        batches(prepared, "train", **{**SHAPE, **options})


def test_unknown_split(prepared):
    with pytest.raises(UserError, match="unknown split 'test'"):
        batches(prepared, "test", **SHAPE)


def test_data_imports_neither_jax_nor_grain_by_itself():
    code = """
import sys, types
# `hackle.zoo` itself imports models, hence jax: take an empty package in its place.
import hackle
zoo = types.ModuleType("hackle.zoo")
zoo.__path__ = [hackle.__path__[0] + "/zoo"]
sys.modules["hackle.zoo"] = zoo
from hackle.zoo.data import *
assert not {"jax", "grain", "tensorflow"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokenizer_alone_needs_no_extra_but_tokenizers():
    code = """
import sys
for name in ("tensorflow_datasets", "grain", "array_record"):
    sys.modules[name] = None
from hackle.zoo.data import load_tokenizer
"""
    subprocess.run([sys.executable, "-c", code], check=True)
