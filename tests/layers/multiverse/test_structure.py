"""Block, path, position: against recursion over the tree that a document was written from."""

import time

import jax
import numpy as np
import pytest

from hackle.layers import masks
from hackle.layers.multiverse import BranchState, Tags, branch_structure
from tests.layers.multiverse.documents import (
    ID,
    NEWLINE,
    TEXT,
    Block,
    addresses,
    ids,
    positions,
    random_documents,
    random_items,
    visible,
    write,
)

LAYOUTS = ["strict", "published"]
MEDIUM = dict(least=40, most=140)  # tokens of a document


@jax.jit
def _dense(block, path):
    mask = masks.Causal() & masks.Branches(block, path, block, path)
    return mask.dense(block.shape[-1], block.shape[-1])


def dense(structure):
    """The causal mask of one row [L, L]; one program serves all rows of up to 160 tokens."""
    depth, length = structure.block.shape
    pad = ((0, 4 - depth), (0, 160 - length))
    block, path = (np.pad(x, pad)[None] for x in (structure.block, structure.path))
    return np.asarray(_dense(block, path))[0, :length, :length]


def example(newlines):
    """A block whose paths have 5 and 3 tokens."""
    return [5, Block(0, [1, 1], [[3], [1]], 1, newlines), 1]


def test_published_example_without_separators():
    tokens = ids(write(example(0)))
    for layout in LAYOUTS:
        found = branch_structure(tokens, layout=layout)
        at = tokens.tolist().index(ID["</Goal>"])
        assert found.position[at] == 13
        assert found.position[at + 1 : at + 9].tolist() == [14, 15, 16, 17, 18, 14, 15, 16]
        assert found.position[at + 9] == 19 and tokens[at + 9] == ID["<Conclusion>"]


def test_separators_belong_to_their_path_in_the_strict_layout_only():
    """`<Path>` at g + 2 and the conclusion at g + max n + 3 (strict), g + 1 and g + max n + 1."""
    tokens = ids(write(example(1))).tolist()
    paths = [i for i, t in enumerate(tokens) if t == ID["<Path>"]]
    goal, end = tokens.index(ID["</Goal>"]), tokens.index(ID["<Conclusion>"])
    for layout, first, last in (("strict", 2, 5 + 3), ("published", 1, 5 + 1)):
        found = branch_structure(np.array(tokens), layout=layout)
        g = found.position[goal]
        assert found.position[paths].tolist() == [g + first] * 2
        assert found.position[end] == g + last
        assert (found.block[0, paths[1] - 1] == 0) == (layout == "published")


def test_a_text_without_blocks_is_causal_and_counts():
    tokens = np.arange(TEXT, TEXT + 20)
    for layout in LAYOUTS:
        found = branch_structure(tokens, layout=layout)
        assert found.position.tolist() == list(range(20))
        assert found.block.shape == found.path.shape == (1, 20) and found.block.dtype == np.int32
        np.testing.assert_array_equal(dense(found), np.tril(np.ones((20, 20), bool)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("newlines", [0, 1, 2])
def test_structure_is_that_of_the_tree(layout, newlines):
    nested = 0
    for seed, think in ((0, False), (1, True)):
        how = dict(seed=seed, think=think, layout=layout, newlines=newlines)
        for tokens in random_documents(250, **how):
            found = branch_structure(ids(tokens), layout=layout, depth=4)
            assert found.position.tolist() == positions(tokens)
            block, path = addresses(tokens, 4)
            np.testing.assert_array_equal(found.block, block)
            np.testing.assert_array_equal(found.path, path)
            nested += block[2].any()
    assert nested > 30, "the documents nest"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("newlines", [0, 1])
def test_the_mask_hides_siblings_and_nothing_else(layout, newlines):
    for tokens in random_documents(60, seed=2, layout=layout, newlines=newlines, **MEDIUM):
        found = branch_structure(ids(tokens), layout=layout)
        np.testing.assert_array_equal(dense(found), visible(tokens))


def test_no_key_in_sight_has_a_larger_position():
    """In the published layout the text between siblings has: it follows the longest so far."""

    def future(layout, newlines):
        count = 0
        for tokens in random_documents(120, seed=5, layout=layout, newlines=newlines, **MEDIUM):
            found = branch_structure(ids(tokens), layout=layout)
            at = found.position
            count += bool((dense(found) & (at[None, :] > at[:, None])).any())
        return count

    assert future("strict", 0) == future("strict", 1) == future("published", 0) == 0
    assert future("published", 1) > 60


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_row_holds_the_structures_of_its_documents(layout):
    rng = np.random.default_rng(6)
    for trial in range(30):
        documents = random_documents(rng.integers(1, 6), seed=trial, layout=layout, newlines=1)
        padding = int(rng.integers(0, 5))
        tokens = np.concatenate([*map(ids, documents), np.full(padding, ID["</Path>"])])
        lengths = [*map(len, documents), padding]
        segments = np.repeat([*range(1, len(documents) + 1), 0], lengths)
        found = branch_structure(tokens, layout=layout, depth=4, segment_ids=segments)
        at, used = 0, 0
        for document in documents:
            here = slice(at, at + len(document))
            alone = branch_structure(ids(document), layout=layout, depth=4)
            assert found.position[here].tolist() == alone.position.tolist()
            moved = np.where(alone.block > 0, alone.block + used, 0)
            np.testing.assert_array_equal(found.block[:, here], moved)
            np.testing.assert_array_equal(found.path[:, here], alone.path)
            at, used = at + len(document), used + alone.block.max()
        assert not found.position[at:].any() and not found.block[:, at:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_its_rows(layout):
    documents = random_documents(40, seed=7, layout=layout, newlines=1)
    length = max(map(len, documents))
    rows = np.full((40, length), NEWLINE)
    segments = np.zeros_like(rows)
    for row, document in enumerate(documents):
        rows[row, : len(document)] = ids(document)
        segments[row, : len(document)] = 1
    found = branch_structure(rows, layout=layout, segment_ids=segments)
    deepest = found.block.shape[1]
    assert found.block.shape == (40, deepest, length) and found.block[:, -1].any()
    for row in range(40):
        alone = branch_structure(rows[row], layout=layout, depth=deepest, segment_ids=segments[row])
        for batched, single in zip(found, alone, strict=True):
            np.testing.assert_array_equal(batched[row], single)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_document_has_the_structure_of_the_whole_cut_there(layout):
    """The truncation rule, at every token, mid-block and between siblings too."""
    for tokens in random_documents(25, seed=8, layout=layout, newlines=1, think=True, **MEDIUM):
        whole = branch_structure(ids(tokens), layout=layout, depth=4)
        for end in range(len(tokens)):
            part = branch_structure(ids(tokens[:end]), layout=layout, depth=4, cut=True)
            for cut, full in zip(part, whole, strict=True):
                np.testing.assert_array_equal(cut, full[..., :end])


@pytest.mark.parametrize("newlines", [0, 1])
def test_critical_path_and_total(newlines):
    """They are equal where no block has two paths, and only there."""

    def parallel(items):
        blocks = [item for item in items if isinstance(item, Block)]
        return any(len(b.paths) > 1 or any(map(parallel, b.paths)) for b in blocks)

    seen = set()
    for paths in (1, 3):
        rng = np.random.default_rng(9)
        for _ in range(100):
            items = random_items(rng, 3, paths=paths, newlines=newlines)
            tokens = ids(write([1, *items]))
            critical = int(branch_structure(tokens).position.max()) + 1
            assert critical <= len(tokens)
            assert (critical < len(tokens)) == parallel(items)
            seen.add((paths, parallel(items)))
    assert seen == {(1, False), (3, False), (3, True)}


def test_six_levels_and_no_more():
    def nest(levels):
        return [1] if not levels else [Block(0, [1, 1], [nest(levels - 1), [2]], 1, 1)]

    found = branch_structure(ids(write(nest(6))))
    assert found.block.shape[0] == 6 and (found.block.max(1) > 0).all()
    assert branch_structure(ids(write(nest(2))), depth=5).block.shape[0] == 5
    with pytest.raises(ValueError, match=r"<Path> is nested deeper than 6"):
        branch_structure(ids(write(nest(7))))
    with pytest.raises(ValueError, match=r"<Path> is nested deeper than 2"):
        branch_structure(ids(write(nest(3))), depth=2)


def test_parathinker_rows():
    """Prompt, two paths, summary: mask and positions of arXiv 2509.04475."""
    tags = Tags.parathinker()
    path = lambda k, n: [tags.path[k].open, *[TEXT] * n, tags.path[k].close]
    summary = [tags.conclusion[0].open, TEXT, tags.conclusion[0].close]
    tokens = np.array([*[TEXT] * 4, *path(0, 3), *path(6, 5), *summary])
    code = np.repeat([1, 2, 3, 10], [4, 5, 7, 3])
    found = branch_structure(tokens, tags)
    expected = [*range(4), *range(4, 9), *range(4, 11), *range(11, 14)]
    assert found.position.tolist() == expected
    same = code[:, None] == code[None, :]
    allowed = np.tril(same | (code == 1)[None, :] | (code == 10)[:, None])
    np.testing.assert_array_equal(dense(found), allowed)


def test_parathinker_rows_are_those_of_its_collator():
    """Random rows with padding. The collator forgets to move the summary on where a path ends one
    position behind the longest before it; there alone ours is one further, behind all paths."""
    rng, tags = np.random.default_rng(0), Tags.parathinker()
    forgot = 0
    for _ in range(200):
        prompt, sizes = rng.integers(1, 6), rng.integers(0, 7, rng.integers(1, 9))
        tokens, codes = [TEXT] * prompt, [1] * prompt
        positions, start = [*range(prompt)], prompt
        for k, size in enumerate(sizes):
            tokens += [tags.path[k].open, *[TEXT] * size, tags.path[k].close]
            codes += [2 + k] * (size + 2)
            positions += range(prompt, prompt + size + 2)
            last = positions[-1]
            start = last + 1 if last > start else start
        behind = max(positions[prompt:]) + 1
        forgot += start != behind
        assert behind - start in (0, 1)
        tokens += [tags.conclusion[0].open, TEXT, tags.conclusion[0].close, 0, 0]
        codes = np.array([*codes, 10, 10, 10, 0, 0])
        positions += [behind, behind + 1, behind + 2, 0, 0]
        segments = np.where(codes == 0, 0, 1)
        found = branch_structure(np.array(tokens), tags, segment_ids=segments)
        assert found.position.tolist() == positions
        real = codes > 0
        same = codes[:, None] == codes[None, :]
        allowed = np.tril(same | (codes == 1)[None, :] | (codes == 10)[:, None])
        np.testing.assert_array_equal(dense(found)[np.ix_(real, real)], allowed[np.ix_(real, real)])
        paths = np.where((codes > 1) & (codes < 10), codes - 1, 0)
        assert found.path[0].tolist() == paths.tolist()
    assert 0 < forgot < 200


def test_other_tag_sets():
    npr = Tags.npr(200)
    one = lambda tag, *inside: [tag[0].open, *inside, tag[0].close]
    plan = one(npr.goal, *one(npr.outline, TEXT), *one(npr.outline, TEXT))
    steps = [*one(npr.path, TEXT, TEXT), *one(npr.path, TEXT)]
    tokens = [*plan, *steps, *one(npr.conclusion, TEXT), TEXT, *plan, *steps]
    tokens += one(npr.conclusion)
    found = branch_structure(np.array(tokens), npr)
    assert found.position[:18].tolist() == [*range(8), 8, 9, 10, 11, 8, 9, 10, 12, 13, 14]
    assert found.block.max() == 2

    weaver = Tags.threadweaver(200)
    outlines = one(weaver.goal, *one(weaver.outline, TEXT), *one(weaver.outline, TEXT))
    threads = [*one(weaver.path, TEXT, TEXT), *one(weaver.path, TEXT)]
    found = branch_structure(np.array(one(weaver.parallel, *outlines, *threads)), weaver)
    assert found.position[9:].tolist() == [9, 10, 11, 12, 9, 10, 11, 13]


def test_rows_of_32k_tokens_take_two_milliseconds():
    """On one core, tags of a realistic and of a high density; here with a good margin."""

    def row(text, levels):
        nest = lambda d: [text] if not d else [text, Block(2, [3] * 3, [nest(d - 1)] * 3, text, 1)]
        document = ids(write([200, *nest(levels)]))
        return np.resize(document, 32768 // len(document) * len(document)), len(document)

    for text, levels, limit in ((150, 1, 2.0), (40, 2, 2.0)):
        tokens, length = row(text, levels)
        segments = np.arange(tokens.size) // length + 1
        tokens = np.tile(np.pad(tokens, (0, 32768 - tokens.size)), (8, 1))
        segments = np.tile(np.pad(segments, (0, 32768 - segments.size)), (8, 1))
        times = []
        for _ in range(5):
            begin = time.process_time()
            found = branch_structure(tokens, depth=2, segment_ids=segments)
            times.append((time.process_time() - begin) / len(tokens) * 1e3)
        assert found.block.any() and min(times) < limit, times


def test_arguments_are_checked():
    row = np.array([TEXT, TEXT])
    for call, message in (
        (lambda: branch_structure(row, layout="loose"), "unknown layout 'loose'"),
        (lambda: BranchState(layout="loose"), "unknown layout 'loose'"),
        (lambda: branch_structure(row, depth=7), r"depth must be in 1\.\.6, got 7"),
        (lambda: branch_structure(row * 1.0), r"tokens must be integers \[L\] or \[B, L\]"),
        (lambda: branch_structure(row[None, None]), r"got int64 \(1, 1, 2\)"),
        (lambda: BranchState(max_depth=7), r"max_depth must be in 1\.\.6, got 7"),
        (lambda: BranchState().join([]), "there is no path to join"),
        (lambda: branch_structure(row, segment_ids=row * 1.0), "must be integers, got float64"),
        (lambda: branch_structure(row, segment_ids=row[:1]), r"segment_ids have shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_empty_rows():
    assert branch_structure(np.zeros((0,), int)).block.shape == (1, 0)
    assert branch_structure(np.zeros((3, 0), int)).position.shape == (3, 0)
