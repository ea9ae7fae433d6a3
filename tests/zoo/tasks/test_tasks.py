"""Synthetic tasks: targets against plain solvers, random access, and what rows look like."""

import itertools
from collections import Counter

import grain
import numpy as np
import pytest

from hackle.zoo.errors import UserError
from hackle.zoo.tasks import SETUPS, TaskSource, setup
from hackle.zoo.tasks.memory import Hops, KeepNth, Recall, distinct
from hackle.zoo.tasks.state_tracking import A5, CycleNavigation, Parity


def solve_parity(tokens):
    return {t: tokens[: t + 1].count(1) % 2 for t in range(len(tokens))}


def solve_cycle(tokens, places=5):
    moves = {0: 0, 1: 1, 2: -1}
    return {t: sum(moves[x] for x in tokens[: t + 1]) % places for t in range(len(tokens))}


def solve_arithmetic(tokens):
    text = "".join("01234+-*"[x] for x in tokens)
    return {t: eval(text[: t + 1]) % 5 for t in range(0, len(tokens), 2)}


def solve_a5(tokens):
    even = [p for p in itertools.permutations("abcde") if parity_by_swaps(p) == 0]
    things, answers = list("abcde"), {}
    for t, x in enumerate(tokens):
        # Thing i goes to where letter i of "abcde" stands in the alphabet of the permutation.
        moved = [""] * 5
        for i, thing in enumerate(things):
            moved["abcde".index(even[x][i])] = thing
        things = moved
        answers[t] = even.index(tuple("abcde"[things.index(thing)] for thing in "abcde"))
    return answers


def parity_by_swaps(letters):
    letters, swaps = list(letters), 0
    for i, right in enumerate(sorted(letters)):
        j = letters.index(right)
        if i != j:
            letters[i], letters[j] = letters[j], letters[i]
            swaps += 1
    return swaps % 2


def solve_keep(tokens, n=5):
    return {t: tokens[n - 1] for t in range(n - 1, len(tokens))}


def solve_recall(tokens, pairs=2):
    known = {tokens[2 * i]: tokens[2 * i + 1] for i in range(pairs)}
    return {t: known[tokens[t]] for t in range(2 * pairs, len(tokens), 2) if tokens[t] in known}


def solve_hops(tokens, hops, symbols):
    def hop(i):
        for j in range(i - 1, -1, -1):
            if tokens[j] == tokens[i]:
                return j + 1
        return None

    answers = {}
    for t in range(len(tokens)):
        place = t
        for _ in range(hops):
            place = None if place is None else hop(place)
        answers[t] = symbols if place is None else tokens[place]
    return answers


SOLVERS = {
    "parity": solve_parity,
    "keep-nth": solve_keep,
    "recall": solve_recall,
    "1-hop": lambda tokens: solve_hops(tokens, 1, 10),
    "2-hop": lambda tokens: solve_hops(tokens, 2, 5),
    "cycle-navigation": solve_cycle,
    "modular-arithmetic": solve_arithmetic,
    "a5": solve_a5,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_targets_are_those_of_a_plain_solver(name):
    rows = SETUPS[name].task.rows("test", 0, 40)
    for tokens, targets, mask in zip(*(rows[k].tolist() for k in rows), strict=True):
        expected = SOLVERS[name](tokens)
        assert {t for t, asked in enumerate(mask) if asked} == set(expected)
        assert [targets[t] for t in expected] == list(expected.values())
        assert all(targets[t] == 0 for t, asked in enumerate(mask) if not asked)


def test_recall_asks_for_every_key_once():
    task = Recall(pairs=3, symbols=32)
    rows = task.rows("test", 0, 300)
    for tokens, targets, mask in zip(*(rows[k].tolist() for k in rows), strict=True):
        asked = {t: targets[t] for t, here in enumerate(mask) if here}
        assert asked == solve_recall(tokens, 3)
        assert all(tokens[t] == 0 for t in range(6, 100) if t not in asked)
        keys, values = tokens[0:6:2], tokens[1:6:2]
        assert sorted(tokens[t] for t in asked) == sorted(set(keys))
        assert all(1 <= key < 16 for key in keys) and len(set(values)) == 3
        assert all(16 <= value < 32 for value in values)


def test_recall_draws_places_by_their_weight():
    rows = Recall(pairs=1).rows("train", 0, 20_000)
    seen = Counter((rows["mask"].argmax(axis=1) - 2) // 2)
    weights = np.arange(1, 50) ** -0.99
    expected = 20_000 * weights / weights.sum()
    found = np.array([seen[place] for place in range(49)])
    # 48 degrees of freedom: a chance of 1e-5 of more than 99.
    assert np.sum((found - expected) ** 2 / expected) < 99


def test_draws_without_replacement_are_uniform():
    words = np.random.default_rng(0).integers(2**64, size=(24_000, 3), dtype=np.uint64)
    seen = Counter(map(tuple, distinct(words, 4)))
    assert set(seen) == set(itertools.permutations(range(4), 3))
    assert all(abs(count - 1000) < 160 for count in seen.values())  # five deviations


def test_a5_is_the_alternating_group():
    elements = [tuple(p) for p in A5().permutations().tolist()]
    table = A5().transitions()
    assert elements == [p for p in itertools.permutations(range(5)) if parity_by_swaps(p) == 0]
    for a, b in itertools.product(range(60), repeat=2):
        assert elements[table[a, b]] == tuple(elements[b][elements[a][i]] for i in range(5))
    orders = Counter()
    for a in range(60):
        power, order = a, 1
        while power:
            power, order = table[power, a], order + 1
        orders[order] += 1
    assert orders == {1: 1, 2: 15, 3: 20, 5: 24}


@pytest.mark.parametrize("name", SETUPS)
def test_rows_have_the_range_and_balance_they_say(name):
    task = SETUPS[name].task
    rows = task.rows("train", 0, 2000)
    for array in rows.values():
        assert array.dtype == np.int32 and array.shape == (2000, 100)
    assert set(np.unique(rows["tokens"])) == set(range(task.vocab_size))
    asked = rows["targets"][rows["mask"] == 1]
    assert 0 <= asked.min() and asked.max() < task.classes
    assert set(np.unique(rows["mask"])) <= {0, 1}
    if name in ("parity", "cycle-navigation", "a5"):
        # The walk is uniform over the states in the end.
        late = np.bincount(rows["targets"][:, 50:].ravel(), minlength=task.classes)
        assert abs(late / late.mean() - 1).max() < 0.1


@pytest.mark.parametrize("name", SETUPS)
def test_any_row_can_be_made_alone(name):
    task = SETUPS[name].task
    every = task.rows("train", 0, 12, seed=3)
    some = task.rows("train", 5, 9, seed=3)
    source = TaskSource(task, "train", 12, seed=3)
    for key in every:
        np.testing.assert_array_equal(some[key], every[key][5:9])
        np.testing.assert_array_equal(source[7][key], every[key][7])
    for other in (task.rows("train", 0, 12, seed=4), task.rows("test", 0, 12, seed=3)):
        assert (other["tokens"] != every["tokens"]).any(axis=1).all()


def test_rows_are_the_same_on_every_machine_and_release():
    tokens = Recall(length=12).rows("validation", 10**9, 10**9 + 2, seed=1)["tokens"]
    assert tokens.tolist() == GOLDEN


def test_grain_reads_a_source():
    source = TaskSource(Hops(length=8), "train", 6)
    dataset = grain.MapDataset.source(source).shuffle(seed=1).batch(3)
    batches = [batch["tokens"] for batch in dataset]
    assert [batch.shape for batch in batches] == [(3, 8), (3, 8)]
    got = {tuple(row) for batch in batches for row in batch.tolist()}
    assert got == {tuple(row) for row in Hops(length=8).rows("train", 0, 6)["tokens"].tolist()}
    with pytest.raises(IndexError):
        source[6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parity(length=0), "parity: length=0; expected at least 1"),
        (lambda: CycleNavigation(places=1), "cycle-navigation: places=1; expected at least 2"),
        (lambda: KeepNth(n=9, length=8), "keep-nth: n=9; expected 1 to length=8"),
        (lambda: Recall(pairs=3, length=11), "recall: pairs=3; expected 1 to 2"),
        (lambda: Hops(hops=0), "hops: hops=0; expected at least 1"),
        (lambda: Hops(symbols=1), "hops: symbols=1; expected at least 2"),
        (lambda: Parity().rows("dev", 0, 1), "unknown split 'dev'; expected one of train"),
        (lambda: Parity().rows("test", 2, 1), r"rows \[2, 1\); expected 0 <= start <= stop"),
        (lambda: Parity().rows("test", 0, 1, seed=-1), "seed=-1; expected at least 0"),
        (lambda: TaskSource(Parity(), "test", 0), "size=0; expected at least 1"),
        (lambda: setup("pairity"), "unknown task 'pairity'; did you mean parity"),
        (lambda: setup("keep-nth", length=4), "keep-nth: n=5; expected 1 to length=4"),
    ],
)
def test_bad_sizes_are_one_line_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_setup_of_another_length():
    assert setup("2-hop", length=7).task == Hops(hops=2, symbols=5, length=7)
    assert setup("a5") is SETUPS["a5"]


GOLDEN = [
    [7, 120, 23, 65, 7, 0, 23, 0, 0, 0, 0, 0],
    [20, 89, 41, 83, 41, 0, 20, 0, 0, 0, 0, 0],
]
