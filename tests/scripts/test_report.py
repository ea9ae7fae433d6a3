"""scripts/report.py: the tables of benchmarks."""

from tests.scripts.running import load


def test_columns_that_no_row_has_are_left_out():
    rows = [{"a": 1, "b": None, "error": 1.26e-3}, {"a": 2.5, "d": 1}, {"a": 3, "error": None}]
    table = load("report").columns(rows, {"error": "off", "a": "A", "b": "B", "c": "C"})
    assert table == "\n".join(
        ["| off | A |", "| --- | --- |", "| 1e-03 | 1 |", "| - | 2.5 |", "| - | 3 |"]
    )
