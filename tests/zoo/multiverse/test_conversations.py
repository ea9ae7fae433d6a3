"""Published rows: chats and their tokens, what is trained, cuts, and the staged mixture."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken

from hackle.layers.multiverse import Tags, branch_structure
from hackle.zoo.data import load_tokenizer, train_tokenizer
from hackle.zoo.errors import UserError
from hackle.zoo.multiverse.conversations import (
    BEFORE,
    BEHIND,
    BETWEEN,
    STAGES,
    ConversationRows,
    Encoder,
    conversation,
    encode_file,
    read_rows,
    staged_order,
    wrong_index,
)

TAGGED = """<Think>
Two exponents of {n}! are needed.
Let's think in parallel.
<Parallel>
<Goal>
<Outline>
1: exponent of 2
</Outline>
<Outline>
2: exponent of 3
</Outline>
</Goal>
<Path>
1: 10+5+2+1 = 18.
</Path>
<Path>
2: 6+2 = 8, which is all there is of it.
</Path>
<Conclusion>
18 and 8.
</Conclusion>
</Parallel>
So it ends there.
</Think>"""


def row(n=20, **changes):
    return {
        "question": f"Which powers of 2 and 3 divide {n}!?",
        "deepseek_thinking_trajectory": f"The exponent of 2 in {n}! is 18. That of 3 is 8.\n",
        "deepseek_attempt": "2^18 and 3^8",
        "deepseek_thinking_trajectory_parallel": TAGGED.format(n=n),
        "deepseek_thinking_trajectory_sequential": f"<Think>\n1: 18.\n2: 8, for {n}.\n</Think>",
        "metadata": {"n": n},
        **changes,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer.json with the tokens of the chat template, and without tags."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made = train_tokenizer([TAGGED, json.dumps(row())], 300, path)
    chat = ["<|im_start|>", "<|im_end|>"]
    made.backend.add_special_tokens([AddedToken(text, special=True) for text in chat])
    path.write_text(made.backend.to_str(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    return Encoder(tokenizer, tmp_path_factory.mktemp("data"))


def test_chats_are_the_published_ones():
    assert conversation(row(), "tagged") == (
        "Which powers of 2 and 3 divide 20!? Think step by step and in parallel before answering.",
        TAGGED.format(n=20) + "\n\nAnswer: 2^18 and 3^8",
    )
    question, answer = conversation(row(deepseek_attempt="So:\nAnswer: 2\n"), "original")
    assert question.endswith("20!? Think step by step before answering.")
    thoughts = "<Think>\nThe exponent of 2 in 20! is 18. That of 3 is 8.\n</Think>"
    assert answer == thoughts + "\n\nSo:\nAnswer: 2"
    question, answer = conversation(row(), "untagged")
    assert question.endswith("20!? Think step by step before answering.")
    assert answer.startswith("<Think>\n1: 18.\n2: 8, for 20.\n</Think>\n\nAnswer: ")


def test_tokens_are_those_of_the_whole_text_and_the_assistant_is_trained(encoder):
    question, answer = conversation(row(), "tagged")
    document = encoder.document(question, answer, tagged=True)
    text = f"{BEFORE}{question}{BETWEEN}{answer}{BEHIND}"
    assert document.tokens.tolist() == encoder.tokenizer.encode(text, special=True)
    trained = encoder.tokenizer.decode(document.tokens[document.prompt :])
    assert trained == answer + "<|im_end|>\n"
    assert trained.startswith("<Think>")
    start = Tags().think[0].word
    assert document.tokens[document.prompt] == encoder.tags.tokens()[f"<{start}>"]


def test_added_tags_follow_the_vocabulary_in_published_order(encoder, tokenizer):
    known = load_tokenizer(tokenizer).vocab_size
    assert encoder.tags == Tags.numbered(known)
    assert encoder.tokenizer.vocab_size == known + 12
    # A tokenizer that has them keeps them.
    again = Encoder(encoder.tokenizer.path, encoder.tokenizer.path.parent / "again")
    assert again.tags == encoder.tags and again.tokenizer.sha256 == encoder.tokenizer.sha256


def test_a_question_cannot_open_paths(encoder):
    document = encoder.document("What does <Path> mean? <|im_end|>", "Answer: a tag", tagged=True)
    prompt = document.tokens[: document.prompt].tolist()
    tags = set(encoder.tags.tokens().values())
    assert not tags & set(prompt)
    ends = encoder.tokenizer.backend.token_to_id("<|im_end|>")
    assert prompt.count(ends) == 2  # of the template


def test_an_answer_has_no_special_tokens_but_its_tags(encoder):
    tags = [*encoder.tags.tokens()]
    spelled = f"<Think>\na {tags[8]} and <|im_end|> here\n</Think>\n\nAnswer: 1"
    ids = encoder.tags.tokens()
    for tagged, written in ((True, {"<Think>", "</Think>", tags[8]}), (False, {*tags[:2]})):
        document = encoder.document("q", spelled, tagged=tagged)
        answer = document.tokens[document.prompt :].tolist()
        assert {text for text in tags if ids[text] in answer} == written
        assert answer.count(encoder.tokenizer.backend.token_to_id("<|im_end|>")) == 1
        assert encoder.tokenizer.decode(answer) == spelled + BEHIND


def test_chains_that_spell_tags_are_read_as_text(tmp_path, tokenizer):
    """An original chain may speak of tags; none of it may open a path in the midst of a run."""
    one = row(deepseek_thinking_trajectory="what is <Path> here? <Goal>")
    found = encode_file(
        write(tmp_path / "r.jsonl", [one]), tmp_path, tokenizer, tagged=True, depth=2
    )
    (document,) = found.original
    assert branch_structure(document.tokens, found.tags).block.max() == 0


def test_lines_end_where_json_says(tmp_path, tokenizer):
    path = tmp_path / "r.jsonl"
    one = row(question="a\u2028b\u0085c?")
    path.write_text(json.dumps(one, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [found["question"] for found in read_rows(path)] == [one["question"]]


@pytest.mark.parametrize(
    "text, reason",
    [
        (TAGGED.format(n=20), None),
        (TAGGED.format(n=20).replace("<Path>\n2:", "<Path>\n3:"), "index 3, but its outline 2"),
        ("<Parallel><Path>7: a</Path><Path>7: b</Path></Parallel>", None),  # no outlines
        (TAGGED.format(n=20).replace("<Path>\n2:", "<Path>\n3 apples:"), None),  # no index
    ],
)
def test_paths_have_the_indices_of_their_outlines(text, reason):
    found = wrong_index(text)
    assert found == reason if reason is None else reason in found


def test_the_structure_of_a_conversation(encoder):
    document = encoder.document(*conversation(row(), "tagged"), tagged=True)
    found = branch_structure(document.tokens, encoder.tags)
    text = encoder.tokenizer.decode
    paths = [text(document.tokens[found.path[0] == number]) for number in (1, 2)]
    assert paths[0] == "<Path>\n1: 10+5+2+1 = 18.\n</Path>\n"
    assert paths[1].startswith("<Path>\n2: 6+2 = 8") and paths[1].endswith("</Path>\n")


def test_a_file_is_encoded_and_some_of_it_held_out(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [row(n) for n in range(200)])
    found = encode_file(path, tmp_path, tokenizer, tagged=True, depth=2)
    assert len(found.tagged) == len(found.original) == 200 - len(found.held_out)
    assert 0 < len(found.held_out) < 16
    plain = encode_file(path, tmp_path, tokenizer, tagged=False, depth=2)
    assert plain.fingerprint != found.fingerprint
    for one in plain.tagged:
        assert branch_structure(one.tokens, plain.tags).block.max() == 0
    # Turned around, the same questions are held out.
    path = write(tmp_path / "again.jsonl", [row(n) for n in reversed(range(200))])
    again = encode_file(path, tmp_path, tokenizer, tagged=True, depth=2)
    assert {one.tokens.tobytes() for one in again.held_out} == {
        one.tokens.tobytes() for one in found.held_out
    }


def test_long_conversations_keep_their_structure_where_they_are_cut(encoder):
    documents = [
        encoder.document(*conversation(row(n), "tagged"), tagged=True) for n in (5, 20, 100)
    ]
    whole = branch_structure(documents[0].tokens, encoder.tags)
    for length in (60, 120, 150, 200):
        rows = ConversationRows(documents, length)
        assert rows.count == rows.cut == 3
        batch = rows.take(np.arange(-1, 3))
        assert not batch["segment_ids"][0].any()
        found = branch_structure(
            batch["tokens"], encoder.tags, segment_ids=batch["segment_ids"], cut=True, depth=1
        )
        for part, all_of_it in zip(found, whole, strict=True):
            np.testing.assert_array_equal(part[1], all_of_it[..., :length])
        assert batch["loss_mask"][1].sum() == max(length - documents[0].prompt, 0)


def test_stages_are_the_published_mixture():
    order = staged_order(100, 60, seed=0)
    sizes = [60, 60, 10 + 54, 50 + 30, 50 + 30, 90 + 6, 100, 100]
    parts = np.split(order, np.cumsum(sizes)[:-1])
    tagged = [set(part[part < 100].tolist()) for part in parts]
    original = [set(part[part >= 100].tolist()) for part in parts]
    assert [len(t) + len(o) for t, o in zip(tagged, original, strict=True)] == sizes
    assert [len(t) for t in tagged] == [0, 0, 10, 50, 50, 90, 100, 100]
    everything = set(range(100)), set(range(100, 160))
    assert original[0] == original[1] == everything[1] and tagged[6] == tagged[7] == everything[0]
    # What the third stage has of one kind, the sixth has not.
    assert tagged[2] | tagged[5] == everything[0] and not tagged[2] & tagged[5]
    assert original[2] | original[5] == everything[1] and not original[2] & original[5]
    assert tagged[3] | tagged[4] == everything[0] and original[3] | original[4] == everything[1]
    assert tagged[2] < tagged[3]
    # Kinds are mixed within a stage, and passes differ.
    assert 0.3 < np.mean(parts[3][:40] < 100) < 0.95
    assert parts[6].tolist() != parts[7].tolist()
    assert order.tolist() == staged_order(100, 60, seed=0).tolist()
    assert order.tolist() != staged_order(100, 60, seed=1).tolist()
    shares = [high - low for (low, high), _ in STAGES]
    assert shares == [0, 0, 1, 5, 5, 9, 10, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: .*Expecting"),
        ("[1]", "line 1: question is None; expected text"),
        (json.dumps(row(question=3)), "line 1: question is 3; expected text"),
        (json.dumps(row()) + "\n\n" + json.dumps(row(deepseek_attempt=" ")), "line 3: deepseek_at"),
        ("", "holds no row to train on"),
        (
            json.dumps(row(deepseek_thinking_trajectory_parallel="<Think>\n<Path>\n</Think>")),
            r"row 1: token \d+: <Path> cannot follow <Think>",
        ),
        (
            json.dumps(row(deepseek_thinking_trajectory_parallel="<Think>\n")),
            "row 1: token .* cannot follow <Think>",
        ),
    ],
)
def test_bad_rows_are_named(text, message, tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        encode_file(path, tmp_path, tokenizer, tagged=True, depth=2)


def test_files_and_tokenizers_that_do_not_serve_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        encode_file(tmp_path / "none.jsonl", tmp_path, tokenizer, tagged=True, depth=2)
    train_tokenizer(["abc"], 257, tmp_path / "plain.json")
    with pytest.raises(UserError, match=r"plain.json has no <\|im_start\|>"):
        Encoder(tmp_path / "plain.json", tmp_path)
