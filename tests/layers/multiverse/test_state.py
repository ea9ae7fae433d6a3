"""Token by token: the same places and the same errors as for whole rows; forks and joins."""

import itertools

import numpy as np
import pytest

from hackle.layers.multiverse import BranchError, BranchState, Tags, branch_structure
from tests.layers.multiverse.documents import ID, NEWLINE, TEXT, ids, random_documents

LAYOUTS = ["strict", "published"]
SHORT = dict(
    T="<Think>", t="</Think>", P="<Parallel>", p="</Parallel>", G="<Goal>", g="</Goal>",
    O="<Outline>", o="</Outline>", A="<Path>", a="</Path>", C="<Conclusion>", c="</Conclusion>",
)  # fmt: skip


def spell(text):
    """Tokens of a text in which each tag is one letter, `-` a newline and `.` a text token."""
    letters = {letter: ID[word] for letter, word in SHORT.items()} | {"-": NEWLINE, ".": TEXT}
    return np.array([letters[letter] for letter in text])


def step_by_step(tokens, layout="strict", depth=4, cut=False):
    """What `branch_structure` gives, from one token after the other."""
    reader = BranchState(layout=layout, max_depth=depth)
    places = [reader.feed(token) for token in tokens]
    if not cut:
        reader.finish()
    block, path = np.zeros((2, depth, len(tokens)), int)
    for t, place in enumerate(places):
        block[: len(place.block), t] = place.block
        path[: len(place.path), t] = place.path
    return block, path, np.array([place.position for place in places], int)


def outcome(call, *args, **kwargs):
    """The arrays, or where and why they are refused."""
    try:
        return [np.asarray(array).tolist() for array in call(*args, **kwargs)]
    except BranchError as error:
        return error.index, error.reason


def damage(rng, tokens):
    """The tokens after one to three random edits, most of them to tags."""
    tokens = list(tokens)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, len(tokens) + 1))
        tag = int(rng.choice(list(ID.values())))
        kind = rng.integers(0, 5)
        if kind == 0:
            tokens.insert(at, tag)
        elif kind == 1 and tokens:
            tags = [i for i, t in enumerate(tokens) if t >= min(ID.values())] or [0]
            del tokens[int(rng.choice(tags))]
        elif kind == 2 and at < len(tokens):
            tokens[at] = tag
        elif kind == 3:
            tokens = tokens[:at]
        elif tokens:
            i, j = rng.integers(0, len(tokens), 2)
            tokens[i], tokens[j] = tokens[j], tokens[i]
    return np.array(tokens, int)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_sound_and_damaged_are_read_alike(layout):
    rng = np.random.default_rng(0)
    refused = taken = 0
    for think in (False, True):
        for tokens in random_documents(500, seed=int(think), newlines=1, think=think, most=150):
            for one in (ids(tokens), *(damage(rng, ids(tokens)) for _ in range(2))):
                depth, cut = int(rng.integers(1, 5)), bool(rng.integers(0, 2))
                how = dict(layout=layout, depth=depth, cut=cut)
                whole = outcome(branch_structure, one, **how)
                assert outcome(step_by_step, one, **how) == whole
                refused += isinstance(whole, tuple)
                taken += isinstance(whole, list)
    assert refused > 500 and taken > 500


def test_the_first_error_of_a_batch_is_named():
    good, bad, worse = (
        spell("..PGO.og-A.a-Ccp"),
        spell("..PGO.og-A.a-Cpc"),
        spell("a..PGO.og-A.a-Cc"),
    )
    with pytest.raises(BranchError, match=r"row 1, token 14: </Parallel> cannot follow") as caught:
        branch_structure(np.stack([good, bad, worse]))
    assert (caught.value.row, caught.value.index) == (1, 14)
    segments = np.array([[1] * 16 + [2] * 16])
    with pytest.raises(BranchError, match="row 0, token 30: "):
        branch_structure(np.concatenate([good, bad])[None], segment_ids=segments)
    assert branch_structure(np.concatenate([good, good])[None], segment_ids=segments)


BLOCK = "PGO.oO.og-A.a-A.a-Ccp"


@pytest.mark.parametrize(
    "text, index, reason",
    [
        # Open at the end.
        ("PGO.oO.og-A.a-A.a-Cc", 19, "the end of the document cannot follow </Conclusion>"),
        ("PGO.oO.og-A.a-A.", 15, "the end of the document cannot follow <Path>"),
        ("PGO.oO.og-A.a-A.a", 16, "the end of the document cannot follow </Path>"),
        ("P", 0, "the end of the document cannot follow <Parallel>; expected <Goal>"),
        (f"PGO.og-A.{BLOCK}", 29, "the end of the document cannot follow </Parallel>"),
        ("T.", 1, "the end of the document cannot follow <Think>"),
        # Closing without opening.
        (".a", 1, "</Path> ends a path, but none is open"),
        (f"{BLOCK}a", 21, "</Path> ends a path, but none is open"),
        (".p", 1, "</Parallel> cannot follow the start"),
        (".g", 1, "</Goal> cannot follow the start"),
        ("t", 0, "</Think> cannot follow the start"),
        (f"{BLOCK}t", 21, "</Think> ends what did not begin"),
        ("PGO.oA", 5, "<Path> cannot follow </Outline>; expected </Goal> or <Outline>"),
        # Paths and tags where they do not belong.
        (".A.a", 1, "<Path> cannot follow the start; expected <Think> or <Parallel>"),
        ("PGgA.A.a", 5, "<Path> cannot follow <Path>; expected <Parallel> or </Path>"),
        ("PGgA.T", 5, "<Think> cannot follow <Path>"),
        (f"TPGgA{BLOCK}t", 26, "</Think> within a path"),
        ("PGgA.aCP", 7, "<Parallel> cannot follow <Conclusion>"),
        ("T.t.P", 4, "<Parallel> cannot follow </Think>"),
        # A block without goal, paths or conclusion.
        ("PA.a", 1, "<Path> cannot follow <Parallel>; expected <Goal>"),
        ("Pg", 1, "</Goal> cannot follow <Parallel>"),
        ("PGO.ogC", 6, "<Conclusion> cannot follow </Goal>; expected <Path>"),
        ("PGO.ogp", 6, "</Parallel> cannot follow </Goal>"),
        ("PGgA.ap", 6, "</Parallel> cannot follow </Path>; expected <Path> or <Conclusion>"),
        # Outlines and paths.
        ("PGO.oO.og-A.a-Ccp", 14, "the block has 2 outlines, but 1 paths"),
        ("PGO.og-A.a-A.a-Ccp", 15, "the block has 1 outlines, but 2 paths"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_malformed_text_is_refused_in_training_and_token_by_token(layout, text, index, reason):
    tokens = spell(text)
    for read in (branch_structure, step_by_step):
        with pytest.raises(BranchError) as caught:
            read(tokens, layout=layout, depth=4)
        assert caught.value.index == index
        assert caught.value.reason.startswith(reason)
        assert str(caught.value) == f"token {index}: {caught.value.reason}"


@pytest.mark.parametrize(
    "text, positions, paths",
    [
        # A goal without outlines announces no number of paths.
        ("PGgA.aA.aCcp", [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8], "000111222000"),
        # One path hides nothing, many are many.
        ("PGO.ogA.aCcp", range(12), "000000111000"),
        # Text between siblings is of the one before it, text elsewhere of what is around.
        (
            "P.G.g.A.a..A.a.C.c.p",
            [*range(11), *range(6, 10), *range(11, 16)],
            "00000011111222200000",
        ),
    ],
)  # fmt: skip
def test_repairs(text, positions, paths):
    for read in (branch_structure, step_by_step):
        _, path, position = read(spell(text), depth=4)
        assert list(position) == list(positions)
        assert "".join(map(str, path[0])) == paths


def test_many_paths():
    tokens = spell("PG" + "O.o" * 25 + "g" + "A.a" * 25 + "Ccp")
    assert branch_structure(tokens).path.max() == 25


def test_a_refused_token_leaves_the_reader_as_it_was():
    reader = BranchState()
    for token in spell("PGO.og-A.a-"):
        reader.feed(token)
    for wrong in "Ppgto":
        with pytest.raises(BranchError):
            reader.feed(spell(wrong)[0])
    places = [reader.feed(token) for token in spell("Ccp")]
    assert [place.position for place in places] == [11, 12, 13]


def fork_and_join(reader, tokens):
    """Reads a whole document, each path of a block by a reader of its own; the places in order."""
    places, at = [], 0
    level = 0
    while at < len(tokens):
        token = tokens[at]
        if token == ID["<Path>"]:
            spans, start = [], at
            while tokens[at] != ID["<Conclusion>"] or level:
                level += {ID["<Parallel>"]: 1, ID["</Parallel>"]: -1}.get(int(tokens[at]), 0)
                at += 1
                if not level and tokens[at] in (ID["<Path>"], ID["<Conclusion>"]):
                    spans.append(tokens[start:at])
                    start = at
            readers = reader.fork(len(spans))
            done = [fork_into(one, span) for one, span in zip(readers, spans, strict=True)]
            reader.join(readers)
            places += itertools.chain(*done)
            continue
        places.append(reader.feed(token))
        at += 1
    return places


def fork_into(reader, span):
    return [reader.feed(span[0]), *fork_and_join(reader, span[1:])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("newlines", [0, 1])
def test_forks_and_joins_are_at_the_places_of_the_whole_text(layout, newlines):
    forked = 0
    for tokens in random_documents(150, seed=3, newlines=newlines, layout=layout, most=200):
        reader = BranchState(layout=layout)
        places = fork_and_join(reader, ids(tokens))
        reader.finish()
        whole = branch_structure(ids(tokens), layout=layout)
        assert [place.position for place in places] == whole.position.tolist()
        assert reader.index == len(tokens)
        names = {}  # blocks are numbered in the order in which they are forked
        for t, place in enumerate(places):
            assert place.path == tuple(p for p in whole.path[:, t] if p)
            for number, mine in zip(whole.block[:, t], place.block, strict=False):
                assert names.setdefault(mine, number) == number
        assert len(names) == whole.block.max()
        forked += len(names)
    assert forked > 100


def test_forks_are_refused_elsewhere_and_joins_of_open_paths():
    reader = BranchState()
    with pytest.raises(BranchError, match="<Path> cannot follow the start"):
        reader.fork(2)
    for token in spell("PGO.oO.og-"):
        reader.feed(token)
    with pytest.raises(BranchError, match="cannot fork into 0 paths"):
        reader.fork(0)
    first, second = reader.fork(2)
    for token in spell("A..a"):
        first.feed(token)
    second.feed(ID["<Path>"])
    with pytest.raises(BranchError, match="path 2 has not ended"):
        reader.join([first, second])
    second.feed(ID["</Path>"])
    reader.join([first, second])
    assert reader.feed(ID["<Conclusion>"]).position == 14
    with pytest.raises(BranchError, match="nested deeper than 1"):
        lone = BranchState(max_depth=1)
        for token in spell("PGO.ogA.PGO.og"):
            lone.feed(token)
        lone.fork(2)


def test_a_join_counts_its_paths():
    reader = BranchState()
    for token in spell("PGO.oO.og"):
        reader.feed(token)
    (only,) = reader.fork(1)
    for token in spell("A.a"):
        only.feed(token)
    reader.join([only])
    with pytest.raises(BranchError, match="2 outlines, but 1 paths"):
        reader.feed(ID["<Conclusion>"])


def test_other_tags_drive_the_reader_too():
    tags = Tags.numbered(10)
    reader = BranchState(tags)
    reader.feed(tags.parallel[0].open)
    assert reader.outlines == [] and reader.depth == 0
    with pytest.raises(BranchError, match="<Path> cannot follow <Parallel>"):
        reader.feed(tags.path[0].open)


def test_the_reader_keeps_the_outlines_of_a_goal():
    reader = BranchState()
    for token in [*spell("PG."), *spell("O"), 7, 8, *spell("o-O"), 9, *spell("o-g")]:
        reader.feed(token)
    assert reader.outlines == [[7, 8], [9]] and reader.between == [NEWLINE]
    reader.feed(NEWLINE)
    assert reader.text == [NEWLINE] and reader.outlines == [[7, 8], [9]]
    first, second = reader.fork(2)
    first.feed(ID["<Path>"])
    assert first.outlines == [] and second.outlines == [[7, 8], [9]]
