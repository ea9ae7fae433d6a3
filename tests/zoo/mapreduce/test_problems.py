"""Generated problems: every line is true, splits are disjoint, twins are the same text."""

import hashlib
import itertools
import re
from fractions import Fraction

import numpy as np
import pytest

from hackle.layers.multiverse import branch_structure
from hackle.zoo.errors import UserError
from hackle.zoo.mapreduce import SETS, Arithmetic, Countdown, Table, judge, kinds_of, problem
from hackle.zoo.mapreduce.alphabet import TAG_IDS, TAGS, encode, spelled
from hackle.zoo.mapreduce.arithmetic import value_of
from hackle.zoo.mapreduce.countdown import distances
from hackle.zoo.mapreduce.draw import Draw

KINDS = {kind.name: kind for kind in SETS["mapreduce"]}
ALL = [*SETS["mapreduce"], *SETS["mapreduce-easy"], Arithmetic(depth=3, parts=3)]
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def some(kind, count=150, split="train"):
    return [kind.problem(split, index) for index in range(count)]


def test_draws_are_splitmix64():
    draw = Draw()
    # The first words of the published generator from seed 0.
    assert [draw._word() for _ in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert sorted(Draw(5).shuffle(range(9))) == list(range(9))
    seen = [Draw(3, key).between(2, 5) for key in range(4000)]
    assert set(seen) == {2, 3, 4, 5} and all(seen.count(x) > 880 for x in set(seen))


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_every_equation_of_a_trace_is_true(kind):
    for one in some(kind):
        equations = EQUATION.findall(one.trace)
        assert equations or kind.name == "table"
        for a, operator, b, c in equations:
            value = {
                "+": int(a) + int(b),
                "-": int(a) - int(b),
                "*": int(a) * int(b),
                "/": Fraction(int(a), int(b) or 1),
            }[operator]
            assert value == int(c) >= 0, one


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_the_checker_accepts_traces_and_their_twins(kind):
    for one in some(kind):
        assert judge(kind, one.prompt, one.trace, tagged=True) == (True, True, "")
        assert judge(kind, one.prompt, one.sequential, tagged=False) == (True, True, "")


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_twins_have_the_same_tokens_but_for_the_tags(kind):
    for one in some(kind, 20):
        rest = [token for token in encode(one.trace) if chr(token) not in TAGS]
        assert rest == encode(one.sequential).tolist()
        assert not set(one.sequential + one.prompt) & set(TAGS)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_traces_branch_as_deep_as_their_kind_says(kind):
    depths = set()
    for one in some(kind):
        tokens = encode(one.prompt + one.trace)
        found = branch_structure(tokens, TAG_IDS)
        depths.add(len(found.block))
        longest = found.position.max() + 1
        assert len(encode(one.prompt)) < longest < len(tokens)
    assert depths == set(range(1, getattr(kind, "depth", 1) + 1))


def test_arithmetic_against_python():
    for one in some(KINDS["arithmetic"]):
        expression = one.prompt.removeprefix("solve ").strip()
        assert one.trace.endswith(f"Answer: {eval(expression)}\0")
        # Every goal is worth what its path's last line says.
        for index, goal in re.findall(r"<Outline>([\d.]+): (.*)\n", spelled(one.trace)):
            path = re.search(rf"<Path>{re.escape(index)}: (.*?)</Path>", spelled(one.trace), re.S)
            nested = path[1].startswith("<Parallel>")
            assert nested == goal.startswith("(")
            if not nested:
                assert int(path[1].strip().rsplit("=", 1)[1]) == eval(goal)


@pytest.mark.parametrize("text", ["1+2*3-4", "(1+2)*3", "((2))", "2*(3-(4-9))*5", "7"])
def test_expressions_are_worth_what_python_says(text):
    assert value_of(text) == eval(text)


@pytest.mark.parametrize("text", ["", "1+", "(1", "1)", "1 2", "1/2", "+1", "a", "()"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError):
        value_of(text)


def test_table_against_numpy():
    for one in some(KINDS["table"]):
        *lines, asked = one.prompt.removeprefix("table ").strip().split("; ")
        named = [re.findall(r"([a-z])([a-z])(\d+)", line) for line in lines]
        names, columns = [line[0][0] for line in named], [cell[1] for cell in named[0]]
        assert all([cell[1] for cell in line] == columns for line in named)
        assert all({cell[0] for cell in line} == {n} for n, line in zip(names, named, strict=True))
        cells = np.array([[int(cell[2]) for cell in line] for line in named])
        results = []
        for question in asked.removeprefix("ask ").split(", "):
            what, name = question.split()
            row = cells[names.index(name)] if name in names else cells[:, columns.index(name)]
            results.append(int(getattr(np, what)(row)))
        assert one.trace.endswith(f"Answer: {sum(results)}\0")
        paths = re.findall(r"<Path>\d: (.*?)\n</Path>", spelled(one.trace), re.S)
        assert [path.split(": ")[0] for path in paths] == asked.removeprefix("ask ").split(", ")
        assert [int(re.findall(r"\d+", path)[-1]) for path in paths] == results
        for path in paths:
            question, _, looked_up = path.splitlines()[0].partition(": ")
            name = question.split()[1]
            expected = [cell for line in lines for cell in line.split() if name in cell[:2]]
            assert looked_up.split() == expected


def test_the_heuristic_is_the_distance_to_the_nearest_factor():
    for target in (2, 13, 24, 100):
        factors = [f for f in range(2, target + 1) if target % f == 0]
        assert distances(target, 150) == [min(abs(n - f) for f in factors) for n in range(151)]


def reachable(numbers):
    """All that can be made of all numbers, by trying everything."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        results = [a + b, a * b]
        if a >= b:
            results.append(a - b)
        if b and a % b == 0:
            results.append(a // b)
        for result in results:
            found |= reachable([*rest, result])
    return found


def test_a_search_without_bounds_finds_what_can_be_found():
    kind = Countdown(limit=10**6, beam=(99, 99), largest=9)
    solved = 0
    for seed in range(60):
        draw = Draw(seed)
        numbers = tuple(draw.between(1, 9) for _ in range(3))
        target = draw.between(5, 25)
        _, solution = kind._search(numbers, target, 99)
        assert (solution is not None) == (target in reachable(list(numbers)))
        if solution is not None:
            solved += 1
            prompt = f"countdown {target}: {' '.join(map(str, numbers))}\n"
            assert kind.solved_by(prompt, " ".join(solution))
    assert 10 < solved < 55


def test_countdown_paths_are_the_best_moves_of_the_root_and_the_conclusion_is_the_first_hit():
    kind = KINDS["countdown"]
    firsts = set()
    for one in some(kind):
        text = spelled(one.trace)
        goals = re.findall(r"<Outline>\d: (.*)\n", text)
        ends = re.findall(r"\n(none|found .*)\n</Path>", text)
        assert len(set(goals)) == len(goals) == len(ends)
        first = next(n for n, end in enumerate(ends) if end != "none")
        firsts.add(first)
        assert f"<Conclusion>{first + 1} found\n</Conclusion>" in text
        assert text.endswith("Answer: " + ends[first].removeprefix("found "))
        assert ends[first].startswith(f"found {goals[first]} ")
        assert re.findall(r"<Path>\d: (.*?): ", text) == goals
    assert len(firsts) > 2


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("21/3=7 20-7=13 19+13=32", True),
        ("20-7=13 21/3=7 19+13=32", False),  # 7 is not there yet
        ("21/3=7 20-7=13", False),  # not all numbers
        ("21/3=7 20-7=13 19+13=33", False),
        ("21/3=7 21-7=14 19+13=32", False),  # 21 twice
        ("21/3=7 20-7=13 13+19=32", True),
        ("3/21=0 20-0=20 19+20=39", False),
        ("19-20=-1 21/3=7 7+25=32", False),
        ("21/3=7 20-7=13  19+13=32", False),
        ("21/3=7 20-7=13 19+13=32 ", False),
        ("19+13=32", False),
        (f"{'9' * 5000}-20=1 21/3=7 7+25=32", False),
        ("", False),
    ],
)
def test_the_countdown_checker_is_strict(answer, right):
    assert KINDS["countdown"].solved_by("countdown 32: 20 3 19 21\n", answer) == right


@pytest.mark.parametrize("kind", SETS["mapreduce"], ids=str)
def test_splits_are_disjoint_and_problems_hang_on_their_number_alone(kind):
    train, held_out = some(kind, 300), some(kind, 300, "validation")
    identities = [{kind.identity(one.prompt) for one in split} for split in (train, held_out)]
    assert not identities[0] & identities[1]
    assert min(map(len, identities)) > 290
    assert kind.problem("train", 217) == train[217]
    other = kind.problem("train", 217, seed=1)
    assert other != train[217] != held_out[217]
    # Without the split, about one problem in 16 is held out.
    draws = (kind.attempt(Draw(99, index)) for index in range(1500))
    shares = [kind.split_of(one.prompt) == "validation" for one in draws if one is not None]
    assert 0.04 < np.mean(shares) < 0.09


def test_the_order_of_countdown_numbers_does_not_change_the_split():
    kind = KINDS["countdown"]
    for one in some(kind, 30, "validation"):
        head, numbers = one.prompt.strip().split(": ")
        turned = " ".join(reversed(numbers.split()))
        assert kind.split_of(f"{head}: {turned}\n") == "validation"


def test_problems_are_the_same_on_every_machine_and_release():
    text = "".join(
        problem(kinds, split, index).prompt + problem(kinds, split, index).trace
        for kinds in (SETS["mapreduce"], SETS["mapreduce-easy"])
        for split in ("train", "validation")
        for index in range(9)
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "be46546baf347cdb"


def test_kinds_take_turns():
    kinds = kinds_of("mapreduce")
    assert [problem(kinds, "train", i).kind for i in range(6)] == [k.name for k in kinds] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: kinds_of("mapreduce-esay"),
            "unknown set of problems .* did you mean mapreduce",
        ),
        (lambda: Arithmetic(parts=1), "arithmetic: parts=1; expected at least 2"),
        (lambda: Arithmetic(depth=0), "arithmetic: depth=0; expected at least 1"),
        (lambda: Table(columns=14), "table: columns=14; expected 2 to 13"),
        (lambda: Table(questions=13), "table: questions=13; expected 2 to 12"),
        (lambda: Countdown(numbers=2), "countdown: numbers=2; expected at least 3"),
        (lambda: Countdown(limit=50), "countdown: limit=50; expected at least largest=25 and"),
        (lambda: Countdown(beam=(3, 2)), r"countdown: beam=\(3, 2\); expected two numbers"),
        (
            lambda: Countdown(numbers=3, largest=1, targets=(90, 100)).problem("train", 0),
            "largest=1, .*: no problem of split 'train' in 10,000 attempts",
        ),
        (lambda: Table().problem("test", 0), "unknown split 'test'; expected one of train, val"),
        (lambda: Table().problem("train", -1), "index=-1; expected at least 0"),
        (lambda: Table().problem("train", 0, seed=-1), "seed=-1; expected at least 0"),
    ],
)
def test_what_makes_no_problem_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
