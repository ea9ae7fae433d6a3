"""Branching texts in a terminal."""

import io
import re

from hackle.layers.multiverse import Place
from hackle.zoo.generate.columns import NARROWEST, Screen, columns
from hackle.zoo.generate.draft import Fork, Written


def text(letters):
    return [Written(ord(letter), Place((), (), 0), True) for letter in letters]


def decode(tokens):
    return "".join(map(chr, tokens))


def draw(parts, width=60):
    lines = columns(parts, decode, width)
    assert all(len(line) <= width for line in lines)
    return lines


def test_paths_stand_side_by_side():
    parts = [*text("two parts\n"), Fork([text("1: one\nmore"), text("2: other")]), *text("\nboth")]
    assert draw(parts, 40) == [
        "two parts",
        "1: one             │ 2: other",
        "more               │",
        "both",
    ]


def test_long_lines_are_wrapped_in_their_column():
    words = "word " * 12
    lines = draw([Fork([text(words), text("x")])])
    assert len(lines) == 3 and lines[0].endswith("│ x")
    assert "".join(line.split("│")[0] for line in lines).split() == ["word"] * 12
    assert draw(text("a\n\nb")) == ["a", "", "b"]
    assert draw([]) == [] == draw(text("\n"))
    assert "".join(draw(text("x" * 200))) == "x" * 200


def test_blocks_in_paths_are_columns_in_a_column():
    inner = Fork([text("1.1"), text("1.2")])
    lines = draw([Fork([[*text("1\n"), inner, *text("end")], text("2")])], 80)
    assert [re.split(r"\s*│\s*", line) for line in lines] == [
        ["1", "2"],
        ["1.1", "1.2", ""],
        ["end", ""],
    ]


def test_too_many_paths_stand_below_each_other():
    lines = draw([Fork([text(f"{i}") for i in range(5)])], 3 * NARROWEST + 6)
    assert [re.split(r"\s*│\s*", line) for line in lines] == [["0", "1", "2"], [""], ["3", "4"]]
    assert draw([Fork([text("abc"), text("d")])], 2) == ["ab", "c", "", "d"]


class Terminal(io.StringIO):
    """Understands what `Screen` writes: cursor up, and erase below."""

    def isatty(self):
        return True

    def lines(self):
        found = []
        for piece in re.findall(r"\x1b\[\d+F|\x1b\[J|[^\x1b\n]*\n", self.getvalue()):
            if piece.endswith("F"):
                found = found[: -int(piece[2:-1])]
            elif piece != "\x1b[J":
                found.append(piece[:-1])
        return found


def test_a_terminal_shows_the_last_state():
    screen = Screen(out := Terminal(), 10)
    for lines in (["a"], ["a", "b"], ["a", "bc", "d"], ["x"]):
        screen.update(lines)
        assert out.lines() == lines


def test_what_has_left_the_screen_stays():
    screen = Screen(out := Terminal(), 4)
    grown = [f"{i}" for i in range(8)]
    for end in range(1, 9):
        screen.update(grown[:end])
        assert out.lines() == grown[:end]
    screen.update(["changed", *grown[1:7], "new"])
    assert out.lines() == [*grown[:7], "new"]


def test_elsewhere_lines_are_written_once():
    screen = Screen(out := io.StringIO(), 10)
    screen.update(["a"])
    screen.update(["a", "b"], last=True)
    assert out.getvalue() == "a\nb\n"
