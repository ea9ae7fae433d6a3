"""scripts/rows.py: a row that breaks is reported, what does not compile is left out."""

import pytest

from tests.scripts.running import load


@pytest.fixture(scope="module")
def rows():
    return load("rows")


class Rival:
    freed = 0

    def free(self):
        self.freed += 1


def test_a_row_keeps_what_it_had_and_says_why_it_came_no_further(rows):
    rival = Rival()

    def fill(row, error=None):
        row["ms"], row["n"] = 1.23456789, 1234567
        if error is not None:
            raise error

    row = rows.measured(fill, rival)
    assert row == {"failed": "", "skipped": "", "ms": 1.2346, "n": 1234567}
    skip = rows.measured(lambda row: fill(row, rows.Skipped("too\n large")), rival)
    assert skip == row | {"skipped": "too large"}
    wrong = rows.measured(lambda row: fill(row, rows.WrongResult("off " + "x" * 999)), rival)
    assert wrong["failed"].startswith("WrongResult: off x") and len(wrong["failed"]) == 300
    # Only what says so is skipped.
    assert rows.measured(lambda row: fill(row, NotImplementedError("no")), None)["failed"]
    assert rival.freed == 3


def test_what_does_not_lower_or_compile_is_left_out(rows):
    class Lowered:
        def __init__(self, what):
            self.what = what

        def compile(self):
            return {"forward": "program"}[self.what]

    def lowered(case, what):
        return {1: Lowered}[case](what)

    jobs = [(1, "forward"), (1, "both"), (2, "forward")]
    assert rows.compile_each(jobs, lowered) == {(1, "forward"): "program"}
