"""The checker of outputs: each way to be malformed is seen, and said."""

import pytest

from hackle.zoo.mapreduce import Arithmetic, judge
from hackle.zoo.mapreduce.alphabet import END, decode, encode, read, spelled, write_tokenizer
from hackle.zoo.mapreduce.form import answer_of

PROMPT = "solve (1+2)-(2*1)\n"
INNER = (
    "<Parallel><Goal><Outline>{i}1: 1+2\n</Outline><Outline>{i}2: 2*1\n</Outline></Goal>"
    "<Path>{i}1: 1+2=3\n</Path><Path>{i}2: 2*1=2\n</Path>"
    "<Conclusion>3-2=1\n</Conclusion></Parallel>"
)
GOOD = "<Think>" + INNER.format(i="") + "</Think>Answer: 1"
NESTED = GOOD.replace("1: 1+2=3\n", "1: " + INNER.format(i="1.") + "so 3\n")


def verdict(text, tagged=True):
    return judge(Arithmetic(), PROMPT, read(text) + END, tagged=tagged)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        NESTED,
        "<Think></Think>Answer: 1",
        "<Think>short\n</Think>Answer: 1",
        GOOD.replace("<Think>", "<Think>first\n").replace("</Think>", "then\n</Think>"),
        GOOD.replace("<Goal>", "<Goal>a plan\n"),
        GOOD.replace("</Think>", INNER.format(i="") + "</Think>"),
        GOOD.replace("<Conclusion>3-2=1\n", "<Conclusion>"),
    ],
)
def test_what_the_grammar_allows_is_well_formed(text):
    assert verdict(text) == (True, True, "")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("<Think>", "", "'<Parallel>' where <Think> should be"),
        ("</Think>", "", "where </Think> should be"),
        ("</Parallel>", "", "'</Think>' where </Parallel> should be"),
        ("<Goal>", "", "'<Outline>' where <Goal> should be"),
        ("</Goal>", "", "'<Path>' where </Goal> should be"),
        ("<Outline>2: 2*1\n</Outline>", "", "'<Path>' where <Conclusion> should be"),
        ("<Path>2: 2*1=2\n</Path>", "", "'<Conclusion>' where <Path> should be"),
        ("<Path>2: 2*1=2\n</Path>", "<Path>2: 2*1=2\n</Path>" * 2, "where <Conclusion> should be"),
        ("<Path>2:", "<Path>3:", "'3: 2*1=2\\n' where index 2 should be"),
        ("<Path>2:", "<Path>2.1:", "where index 2 should be"),
        ("<Outline>1: ", "<Outline>", "where index 1 should be"),
        ("1+2=3\n</Path>", "1+2=3\n", "'<Path>' where </Path> should be"),
        ("<Path>1", "between<Path>1", "'between' where <Path> should be"),
        ("</Conclusion>", "</Conclusion>behind", "'behind' where </Parallel> should be"),
        ("<Conclusion>3-2=1\n</Conclusion>", "", "'</Parallel>' where <Conclusion> should be"),
        ("3-2=1\n", "<Parallel>", "'<Parallel>' where </Conclusion> should be"),
        ("Answer: 1", "", "no answer at the end"),
        ("Answer: 1", "Answer: ", "no answer at the end"),
        ("Answer: 1", "1", "no answer at the end"),
        ("Answer: 1", "Answer: 1\n", "no answer at the end"),
        ("Answer: 1", "Answer: 1</Think>", "no answer at the end"),
        ("<Outline>1: 1+2\n</Outline><Outline>2: 2*1\n</Outline>", "", "where <Outline> should be"),
    ],
)
def test_each_fault_of_the_form_is_named(old, new, fault):
    assert old in GOOD
    found = verdict(GOOD.replace(old, new, 1))
    assert not found.well_formed and fault in found.fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (NESTED.replace("1.2: 2*1=2", "2: 2*1=2"), "where index 1.2 should be"),
        (NESTED.replace("1.1: 1+2\n", "1: 1+2\n"), "where index 1.1 should be"),
    ],
)
def test_indices_of_nested_blocks_begin_with_their_path(text, fault):
    assert fault in verdict(text).fault


def test_a_cut_output_is_neither_well_formed_nor_answered():
    text = read(GOOD) + END
    for stop in range(len(text)):
        found = judge(Arithmetic(), PROMPT, text[:stop], tagged=True)
        assert not found.well_formed and not found.correct
    assert not judge(Arithmetic(), PROMPT, text + "1", tagged=True).well_formed


def test_form_and_answer_are_judged_apart():
    assert verdict(GOOD.replace("Answer: 1", "Answer: 2"))[:2] == (True, False)
    assert verdict(GOOD.replace("<Goal>", ""))[:2] == (False, True)


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("1: 1+2\n2: 2*1\nAnswer: 1", True),
        ("Answer: 1", True),
        ("1+2 Answer: 1", False),
        ("<Think>\nAnswer: 1", False),
        ("1: 1+2\nAnswer: 1\n", False),
        ("1: 1+2\n", False),
    ],
)
def test_the_form_of_a_sequential_output(text, well_formed):
    assert verdict(text, tagged=False).well_formed == well_formed


def test_the_answer_is_the_last_one():
    assert answer_of("Answer: 3\nAnswer: 4" + END + "x") == "4"
    assert answer_of("Answer: 4") is None and answer_of(END) is None


def test_letters_and_tokenizer_agree(tmp_path):
    from hackle.zoo.data import load_tokenizer

    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (140, 0)
    everything = "".join(map(chr, range(1, 140)))
    for text in (PROMPT + NESTED, spelled(everything)):
        ids = tokenizer.encode(text, special=True)
        assert ids == encode(read(text)).tolist()
        assert tokenizer.decode(ids) == text
        assert spelled(decode(ids)) == text
    # As plain text, a tag is its letters.
    assert tokenizer.encode("<Path>") == list(b"<Path>")


def test_foreign_letters_are_named():
    for text, letter in (("aé", "'é'"), ("a→", "'→'"), ("\x8c", r"'\\x8c'")):
        with pytest.raises(ValueError, match=f"alphabet has no {letter}"):
            encode(text)
