"""Evaluation: outcomes are judged, kept, continued, and summed up."""

import math
import time

import numpy as np
import pytest

from hackle.zoo.errors import UserError
from hackle.zoo.mapreduce import evaluation, kinds_of, problem
from hackle.zoo.mapreduce.alphabet import encode
from hackle.zoo.mapreduce.evaluation import (
    Outcome,
    Written,
    difference,
    evaluate,
    read_outcomes,
    summary,
)

KINDS = kinds_of("mapreduce-easy")
TRACES = {one.prompt: one for one in (problem(KINDS, "validation", index) for index in range(40))}


class Teacher:
    """Writes the trace of every problem, but for those whose number in the order of asking is in
    `wrong`; a critical path of half of it."""

    def __init__(self, tagged=True, wrong=(), batch=4):
        self.tagged, self.wrong, self.batch, self.asked = tagged, wrong, batch, 0

    def __call__(self, prompts):
        found = []
        for prompt in prompts:
            one = TRACES["".join(map(chr, prompt))]
            text = one.trace if self.tagged else one.sequential
            if self.asked in self.wrong:
                text = text.replace("Answer: ", "Answer: 9")
            self.asked += 1
            found.append(Written(encode(text).tolist(), len(text) // 2))
        return found


def solve(path, teacher, problems=10, **options):
    how = {"problems": problems, "tagged": teacher.tagged} | options
    return evaluate(lambda: teacher, KINDS, path, **how)


@pytest.mark.parametrize("tagged", [True, False])
def test_a_teacher_is_always_right(tmp_path, tagged):
    found = solve(tmp_path / "o.jsonl", Teacher(tagged))
    assert [one.index for one in found] == list(range(10))
    assert all(one.well_formed and one.correct and not one.fault for one in found)
    assert {one.kind for one in found} == {"arithmetic", "table", "countdown"}
    total = summary(found)
    assert total["accuracy %"] == total["well formed %"] == 100
    assert total["tokens / critical path"] == pytest.approx(2, rel=0.02)
    assert (found[0].text.startswith("<Think>")) == tagged


def test_answers_that_are_wrong_are_counted(tmp_path):
    found = solve(tmp_path / "o.jsonl", Teacher(wrong={2, 3, 9}))
    assert [one.index for one in found if not one.correct] == [2, 3, 9]
    assert summary(found)["accuracy %"] == 70 and summary(found)["well formed %"] == 100
    assert summary([])["accuracy %"] is None


def test_what_is_done_is_kept_and_continued(tmp_path):
    path, seen = tmp_path / "deep" / "o.jsonl", []
    teacher = Teacher()
    solve(path, teacher, 6, tell=lambda found: seen.append(len(found)))
    assert seen == [4, 6] and teacher.asked == 6
    with open(path, "a") as file:
        file.write('{"index": 6, "ki')  # a line that was cut off
    found = solve(path, teacher, 10)
    assert teacher.asked == 10
    assert [one.index for one in found] == list(range(10)) and found == read_outcomes(path)
    assert solve(path, teacher, 3) == found[:3] and teacher.asked == 10
    # Nothing is begun once the time is over.
    assert len(solve(tmp_path / "p.jsonl", teacher, 10, until=time.monotonic() - 1)) == 0
    with pytest.raises(UserError, match="holds outcomes of other problems"):
        evaluate(lambda: teacher, KINDS[::-1], path, problems=12, tagged=True)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="holds no outcomes"):
        read_outcomes(path)


def test_the_difference_is_paired():
    def outcomes(right):
        return [Outcome(i, "table", True, bool(r), "", 1, 1, "") for i, r in enumerate(right)]

    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 2, (2, 400))
    count, mean, error = difference([(outcomes(one), outcomes(other))])
    gaps = one - other
    assert count == 400 and mean == pytest.approx(100 * gaps.mean())
    assert error == pytest.approx(100 * gaps.std() / 20)
    assert difference([(outcomes(one), outcomes(one))])[1:] == (0, 0)
    assert difference([(outcomes(one[:50]), outcomes(other))])[0] == 50
    assert difference([([], outcomes(one))])[0] == 0 and math.isnan(difference([])[1])
    # Several pairs are given the same problems, which are no more for that.
    assert difference([(outcomes(one), outcomes(other))] * 2) == (count, mean, error)
    there_and_back = [(outcomes(one), outcomes(other)), (outcomes(other), outcomes(one))]
    assert difference(there_and_back) == (count, 0, 0)


def test_a_branch_decoder_tells_the_index_of_a_path_and_counts_its_critical_path(monkeypatch):
    calls = []

    class Draft:
        tokens = (5, 6, 7, 0)
        critical_path = 3

    def generate_branches(model, prompt, **options):
        calls.append((model, prompt, options))
        return Draft()

    monkeypatch.setattr(evaluation, "generate_branches", generate_branches)
    decoder = evaluation.BranchDecoder("a model", max_new_tokens=7)
    assert decoder([[1], [2, 3]]) == [Written((5, 6, 7, 0), 3)] * 2
    options = {"max_new_tokens": 7, "index_end": (ord(":"),), "eos": 0}
    assert calls == [("a model", [1], options), ("a model", [2, 3], options)]


def test_a_sequential_decoder_writes_up_to_the_end(monkeypatch):
    calls = []

    def generate(model, prompts, **options):
        calls.append((model, prompts, options))
        return [[5, 6, 0] for _ in prompts]

    monkeypatch.setattr(evaluation, "generate", generate)
    decoder = evaluation.SequentialDecoder("a model", max_new_tokens=7)
    assert decoder([[1], [2, 3]]) == [Written([5, 6, 0], 3)] * 2
    assert calls == [("a model", [[1], [2, 3]], {"max_new_tokens": 7, "eos": 0})]
