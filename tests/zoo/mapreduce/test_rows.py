"""Rows of problems: whole, random access, only answers trained, the same for both twins."""

import itertools
import math

import jax
import numpy as np
import pytest

from hackle.zoo.data.pipeline import Batches, iterate
from hackle.zoo.data.whole import Document, lay, next_fit
from hackle.zoo.errors import UserError
from hackle.zoo.generate.writer import Limits, Writer
from hackle.zoo.mapreduce import Arithmetic, ProblemRows, judge, kinds_of
from hackle.zoo.mapreduce.alphabet import END, END_ID, END_PATH, INDEX_END, PATH, TAG_IDS, decode
from hackle.zoo.mapreduce.rows import document_of
from tests.zoo.generate.test_writer import play, scripted

KINDS = kinds_of("mapreduce-easy")


def rows(tagged=True, length=300, kinds=KINDS, **changes):
    return ProblemRows(kinds, "train", length=length, tagged=tagged, **changes)


def documents(batch):
    """(prompt, what follows) of every document of a batch."""
    found = []
    for tokens, segments, trained in zip(
        *(batch[name] for name in ("tokens", "segment_ids", "loss_mask")), strict=True
    ):
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            prompt = int(np.argmax(trained[here]))
            found.append((decode(tokens[here[:prompt]]), decode(tokens[here[prompt:]])))
    return found


@pytest.mark.parametrize("tagged", [True, False])
def test_rows_hold_whole_problems_and_only_answers_are_trained(tagged):
    batch = rows(tagged).take(np.arange(12))
    assert {x.shape for x in batch.values()} == {(12, 300)}
    assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}
    kinds = {kind.name: kind for kind in KINDS}
    names = {"solve": "arithmetic", "table": "table", "countdown": "countdown"}
    found = documents(batch)
    assert len(found) > 12
    for prompt, output in found:
        kind = kinds[names[prompt.split()[0]]]
        assert prompt.endswith("\n") and output.endswith(END)
        assert judge(kind, prompt, output, tagged=tagged) == (True, True, "")
    padding = batch["segment_ids"] == 0
    assert 0 < padding.mean() < 0.4
    assert all(not array[padding].any() for array in batch.values())
    starts = np.diff(batch["segment_ids"], axis=1, prepend=0) > 0
    assert not batch["positions"][starts].any()
    inside = ~padding & ~starts
    assert (np.diff(batch["positions"], axis=1)[inside[:, 1:]] == 1).all()


def test_any_row_alone_is_the_row_among_others():
    source = rows()
    whole = source.take(np.arange(6))
    part = rows().take(np.array([4, -1, 1]))
    for name, array in whole.items():
        np.testing.assert_array_equal(part[name][[0, 2]], array[[4, 1]])
        assert not part[name][1].any()
    other = rows(seed=1).take(np.arange(6))
    assert (other["tokens"] != whole["tokens"]).any(axis=1).all()


def test_twins_are_trained_on_the_same_problems():
    tagged, plain = (documents(rows(t).take(np.arange(8))) for t in (True, False))
    assert [prompt for prompt, _ in tagged] == [prompt for prompt, _ in plain]


def forks(tokens):
    """A trace as `scripted` takes it: tokens, and a list of paths for each fork."""
    root = []
    inside = [root]
    for token in tokens:
        if chr(token) == PATH:
            if not (inside[-1] and isinstance(inside[-1][-1], list)):
                inside[-1].append([])
            inside[-1][-1].append([])
            inside.append(inside[-1][-1][-1])
        inside[-1].append(token)
        if chr(token) == END_PATH:
            inside.pop()
    return root


def asked_for(document):
    """What a decoder writes of a document, and which tokens it asks the model for."""
    prompt, trace = np.split(document.tokens, [document.prompt])
    writer = Writer(
        prompt.tolist(),
        tags=TAG_IDS,
        limits=Limits(5000),
        range_end=math.inf,
        index_end=frozenset(INDEX_END),
        stops=frozenset([END_ID]),
        key=jax.random.key(0),
    )
    choose, asked = scripted(writer.live[0], forks(trace.tolist())), []

    def answer(strand):
        asked.append(choose(strand))
        return asked[-1]

    play(writer, answer)
    return writer.draft.tokens, asked


@pytest.mark.parametrize("kind", [*kinds_of("mapreduce"), Arithmetic(depth=3, parts=3)], ids=str)
def test_trained_is_what_the_model_is_asked_for_in_decoding(kind):
    for index in range(12):
        problem = kind.problem("train", index)
        document = document_of(problem, True)
        written, asked = asked_for(document)
        assert written == document.tokens[document.prompt :].tolist()
        trained = lay([[document]], len(document.tokens))["loss_mask"][0] == 1
        assert sorted(asked) == sorted(document.tokens[trained].tolist())
        plain = document_of(problem, False)
        assert lay([[plain]], 5000)["loss_mask"].sum() == len(plain.tokens) - plain.prompt


def test_rows_are_well_filled():
    source = ProblemRows(kinds_of("mapreduce"), "train", length=1024, tagged=True)
    assert (source.take(np.arange(40))["segment_ids"] > 0).mean() > 0.85


def test_rows_too_short_for_a_problem_are_refused():
    with pytest.raises(UserError, match="length 40 is too small for the problems: one of them has"):
        rows(length=40)


def test_processes_share_a_batch_and_an_iterator_goes_on_where_it_was():
    whole = next(iterate(Batches(rows(), batch=4), threads=0))
    halves = [Batches(rows(), batch=4, process_index=i, process_count=2)[0] for i in (0, 1)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), array)
    first = iterate(Batches(rows(), batch=2))
    next(first)
    state = first.get_state()
    expected = next(first)
    again = iterate(Batches(rows(), batch=2))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], expected["tokens"])


@pytest.mark.slow
def test_worker_processes_make_the_same_batches():
    expected, found = (iterate(Batches(rows(), batch=2), workers=w) for w in (0, 2))
    for _ in range(5):
        np.testing.assert_array_equal(next(found)["tokens"], next(expected)["tokens"])


def test_documents_go_into_rows_in_order():
    assert next_fit([3, 4, 2, 9, 1, 5], 7) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert next_fit([9], 7) == [(0, 1)] and next_fit([], 7) == []
    sizes = np.random.default_rng(0).integers(1, 12, 200).tolist()
    found = next_fit(sizes, 10)
    assert [found[0][0], found[-1][1]] == [0, 200]
    for (start, stop), (after, _) in itertools.pairwise(found):
        assert stop == after and start < stop
        assert sum(sizes[start:stop]) <= 10 or stop == start + 1
        assert sum(sizes[start : stop + 1]) > 10


def test_a_document_longer_than_its_row_is_cut():
    batch = lay([[Document(np.arange(1, 10), 4)], []], 6)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 4, 5, 6], [0] * 6])
    np.testing.assert_array_equal(batch["loss_mask"], [[0, 0, 0, 0, 1, 1], [0] * 6])
    np.testing.assert_array_equal(batch["segment_ids"], [[1] * 6, [0] * 6])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 4, 5], [0] * 6])
    given = np.arange(9) % 5 == 4  # the fifth and, cut off, none other
    batch = lay([[Document(np.arange(1, 10), 3, given)]], 6)
    np.testing.assert_array_equal(batch["loss_mask"], [[0, 0, 0, 1, 0, 1]])
