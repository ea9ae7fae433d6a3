"""Decoding with forks and joins, against full forward passes with the strict mask."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle.layers.multiverse import BranchStructure, Tag, Tags, branch_structure
from hackle.zoo.dense import DenseConfig, DenseLM
from hackle.zoo.errors import UserError
from hackle.zoo.generate import Limits, branches, generate, generate_branches, stream_branches
from hackle.zoo.generate.decode import per_graph
from hackle.zoo.generate.draft import Fork, walk
from tests.zoo.generate.branching import (
    COLONS,
    DIGITS,
    EOS,
    ID,
    NEWLINE,
    TAGS,
    TEXT,
    WORDS,
    branching,
)

DEPTH = 3
ROW = 512


def decode(model, prompt, **changes):
    how = dict(max_new_tokens=300, index_end=COLONS, tags=TAGS, eos=EOS, max_depth=DEPTH)
    return generate_branches(model, prompt, **{**how, **changes})


@nnx.jit
def _full(model, tokens, structure):
    return model(tokens, branches=structure)


def check_against_full_pass(model, prompt, draft):
    """Every token that the model chose is the best one of a pass over the whole text.

    A pass over the text cut behind any token gives the same: structure and attention are causal.
    """
    tokens, size = prompt + draft.tokens, len(prompt)
    first = branch_structure(np.array(prompt), TAGS, depth=DEPTH, cut=True)
    whole = [np.concatenate(both, -1) for both in zip(first, draft.structure(DEPTH), strict=True)]
    pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, ROW - len(tokens))])[None]
    logits = _full(model, pad(np.array(tokens, np.int32)), BranchStructure(*map(pad, whole)))
    best = np.asarray(logits)[0].argmax(-1)
    chosen = [at for at, one in enumerate(draft.written(), size) if one.chosen]
    assert [tokens[at] for at in chosen] == [int(best[at - 1]) for at in chosen]
    return len(chosen)


def check_structure(prompt, draft):
    """Tokens were decoded where the parser says that they are, blocks named alike."""
    whole = branch_structure(np.array(prompt + draft.tokens), TAGS, depth=DEPTH, cut=True)
    mine = draft.structure(DEPTH)
    assert mine.position.tolist() == whole.position[len(prompt) :].tolist()
    np.testing.assert_array_equal(mine.path, whole.path[:, len(prompt) :])
    pairs = {*zip(mine.block.ravel(), whole.block[:, len(prompt) :].ravel(), strict=True)}
    assert len({a for a, _ in pairs}) == len(pairs) == len({b for _, b in pairs})


def forks(parts):
    for part in parts:
        if isinstance(part, Fork):
            yield part
            for path in part.paths:
                yield from forks(path)


PROMPTS = [[0, 1], [4]]


@pytest.fixture(scope="module")
def drafts():
    """Greedy texts of several models that fork: (model, prompt, draft)."""
    found = []
    for seed in range(10):
        for prompt in PROMPTS:
            draft = decode(branching(seed), prompt)
            assert draft.finish in ("stop", "length")
            if draft.forks:
                found.append((branching(seed), prompt, draft))
    return found


@pytest.fixture(scope="module")
def finished(drafts):
    """Those that ended by themselves; in the others paths may be open."""
    return [one for one in drafts if one[2].finish == "stop"]


def test_greedy_texts_are_those_of_a_full_pass(drafts):
    """Unequal and nested paths, with and without separators, token by token."""
    chosen = sum(check_against_full_pass(*one) for one in drafts)
    assert chosen > 800
    every = [fork for _, _, draft in drafts for fork in forks(draft.parts)]
    lengths = [[len([*walk(path)]) for path in fork.paths] for fork in every]
    assert sum(len(set(sizes)) > 1 for sizes in lengths) > 10, "paths are of unequal length"
    assert max(map(len, lengths)) >= 4
    deepest = [max(len(one.place.block) for one in draft.written()) for _, _, draft in drafts]
    assert deepest.count(2) > 5, "blocks nest"
    newlines = [NEWLINE in draft.tokens for _, _, draft in drafts]
    assert any(newlines) and not all(newlines)


def test_places_are_those_of_the_parser(finished):
    assert len(finished) > 8
    for _, prompt, draft in finished:
        check_structure(prompt, draft)


def test_counts(finished):
    """As the parser counts; and no more steps than tokens that wait for one another."""
    parallel = 0
    for _, prompt, draft in finished:
        tokens = draft.tokens
        found = branch_structure(np.array(prompt + tokens), TAGS)
        assert draft.total == len(tokens)
        assert draft.critical_path == found.position.max() + 1 - len(prompt)
        assert draft.forks == tokens.count(ID["<Parallel>"])
        single = all(len(fork.paths) == 1 for fork in forks(draft.parts))
        assert (draft.critical_path == draft.total) == single
        assert draft.steps <= draft.critical_path
        parallel += not single
    assert parallel > 3


def test_what_the_decoder_writes(finished):
    """Tags, indices as in the outlines, and the separator that the goal ends with."""
    digits = [*itertools.chain(*DIGITS)]
    for _, _, draft in finished:
        own = [one.token for one in draft.written() if not one.chosen]
        assert {ID["<Path>"], ID["<Conclusion>"]} <= {*own}
        assert {*own} <= {ID["<Path>"], ID["<Conclusion>"], NEWLINE, *COLONS, *digits}
        for fork in forks(draft.parts):
            for path in fork.paths:
                start = [one.token for one in path[:3]]
                assert start[0] == ID["<Path>"] and start[1] in digits
                assert start[2] in COLONS and not any(one.chosen for one in path[:3])


def test_few_programs_are_compiled(drafts):
    assert len(drafts) > 10
    model, prompt, draft = drafts[0]
    graph = nnx.split(model)[0]
    programs = lambda: [of(graph)._cache_size() for of in (branches._step_of, branches._go_on_of)]
    before = programs()
    assert 0 < before[0] <= 16 and 0 < before[1] <= 6  # by entries and strands; by strands
    assert decode(model, prompt).tokens == draft.tokens
    assert programs() == before


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.8, "seed": 3}, {"max_critical_path": 40}, {"max_new_tokens": 37}]
)
def test_turns_on_the_device_are_those_of_the_host(drafts, how, monkeypatch):
    """The model by itself, and asked token by token."""
    model, prompt, _ = drafts[0]
    alone = decode(model, prompt, **how)
    monkeypatch.setattr(branches, "ALONE", 0)
    monkeypatch.setattr(branches, "_go_on_of", per_graph(branches._go_on, donate=2))
    asked = decode(model, prompt, **how)
    assert alone.steps >= 5 and dataclasses.asdict(alone) == dataclasses.asdict(asked)


def goal(*indices, newline=True):
    """A prompt that asks for paths of these indices."""
    outlines = [
        [ID["<Outline>"], digit, COLONS[0], WORDS[2], ID["</Outline>"]] for digit in indices
    ]
    end = [NEWLINE] * newline + [ID["</Goal>"]]
    return [0, 6, ID["<Parallel>"], ID["<Goal>"], *itertools.chain(*outlines), *end]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_prompt_that_ends_with_a_goal_forks_at_once(seed):
    prompt = goal(12, 13, 14)
    draft = decode(branching(seed), prompt)
    assert draft.tokens[0] == NEWLINE and isinstance(draft.parts[1], Fork)
    assert len(draft.parts[1].paths) == 3
    assert check_against_full_pass(branching(seed), prompt, draft) > 10


def test_a_text_without_blocks_is_what_generate_writes():
    """Greedy and sampled: the same keys, the same tokens."""
    config = DenseConfig.tiny(
        vocab_size=40, width=16, mlp_width=16, depth=1, heads=2, kv_heads=1, head_width=8
    )
    model = nnx.jit(lambda: DenseLM(config, rngs=nnx.Rngs(0)))()
    prompt = [3, 1, 4, 1, 5]
    tags = Tags((), (), (), (), (Tag.at("path", 36),), (Tag.at("end", 38),))
    for how in ({}, dict(temperature=1.0, top_p=0.9, seed=40)):  # no tag comes
        (expected,) = generate(model, [prompt], max_new_tokens=20, **how)
        draft = generate_branches(model, prompt, max_new_tokens=20, index_end=[], tags=tags, **how)
        assert not {*tags.tokens().values()} & {*expected}
        assert draft.tokens == expected and draft.finish == "length"
        assert draft.steps == draft.total == draft.critical_path == 20


@pytest.fixture(scope="module")
def blind():
    """A model that sees nothing but the last token: what it writes is bias and chance."""
    model = nnx.clone(branching(0))
    for part in (model.head.weight, model.noise):
        part[...] = jnp.zeros_like(part[...])
    return model


def paths_by_index(draft):
    fork = next(part for part in draft.parts if isinstance(part, Fork))
    return {path[1].token: [one.token for one in walk(path)][:12] for path in fork.paths}


def test_samples_of_a_path_hang_on_its_index_not_on_its_place(blind):
    how = dict(temperature=1.0, seed=3)
    first = paths_by_index(decode(blind, goal(12, 13, 14), **how))
    other = paths_by_index(decode(blind, goal(14, 12, 13), **how))
    assert first == other and [*first] != [*other]
    assert len({tuple(path[3:]) for path in first.values()}) == 3, "each has its own chance"
    assert paths_by_index(decode(blind, goal(12, 13, 14), temperature=1.0, seed=4)) != first


def test_the_stream_grows_one_draft():
    model, prompt = branching(5), PROMPTS[0]
    how = dict(limits=Limits(300, depth=DEPTH), index_end=COLONS, tags=TAGS, eos=EOS)
    seen, sizes = set(), []
    for draft in stream_branches(model, prompt, **how):
        seen.add(id(draft))
        sizes.append(draft.total)
    assert len(seen) == 1 and draft.finish == "stop"
    assert sizes[0] == 0 and sizes == sorted(set(sizes)) and len(sizes) == draft.steps + 1
    assert draft.tokens == decode(model, prompt).tokens


@pytest.mark.parametrize(
    "prompt, changes, message",
    [
        ([], {}, "prompt 0 is empty"),
        ([99], {}, "token 99 at index 0"),
        ([0] * 600, {}, "rotary range of 600 tokens"),
        ([0, ID["</Path>"]], {}, "prompt: token 1: </Path> ends a path, but none is open"),
        ([0], dict(max_new_tokens=0), "limit of tokens must be >= 1, got 0"),
        ([0], dict(max_new_tokens=10**12), r"limit of tokens must be <= \d+ .* got 10{12}:"),
        ([0], dict(max_critical_path=0), "limit of critical_path must be >= 1, got 0"),
        ([0], dict(max_branches=0), "limit of branches must be >= 1, got 0"),
        ([0], dict(max_branches=None), "limit of branches must be >= 1, got None"),
        ([0], dict(tags=Tags.numbered(1000)), "tag <Think> has token id 1000; the vocabulary is 0"),
        ([0], dict(max_depth=7), "limit of depth must be <= 6, got 7"),
        ([0], dict(tags=None), "DenseConfig has no tags"),
        ([0], dict(top_k=3), "top_k has no effect at temperature 0"),
    ],
)
def test_bad_requests_are_refused_before_compute(prompt, changes, message):
    with pytest.raises(UserError, match=message):
        decode(branching(0), prompt, **changes)


def test_the_memory_beside_the_model_bounds_the_tokens(monkeypatch):
    model = branching(0)
    held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    monkeypatch.setattr(branches, "_memory", lambda devices: held + 400_000)
    with pytest.raises(UserError, match=r"limit of tokens must be <= \d+ in") as caught:
        decode(model, [0], max_new_tokens=10_000)
    most = int(str(caught.value).split("<= ")[1].split()[0])
    assert 1000 < most < 400_000 / 256, "a token takes 256 bytes, and where it is"
    assert decode(model, [0], max_new_tokens=most).finish is not None
    with pytest.raises(UserError, match=f"must be <= {most} in .*, got {most + 1}:"):
        decode(model, [0], max_new_tokens=most + 1)


def test_a_model_without_slots_is_refused():
    from hackle import zoo

    model = jax.eval_shape(lambda: zoo.create("pararnn-tiny-gru", rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="has no cache for branches"):
        decode(model, [1])


def test_words_and_tags_do_not_overlap():
    every = [*TEXT, *WORDS, *itertools.chain(*DIGITS), *COLONS, NEWLINE, EOS, *ID.values()]
    assert len(every) == len({*every})
