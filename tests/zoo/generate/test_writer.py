"""The host's side of branching texts, with scripts in place of a model: rules and limits."""

import math

import jax
import numpy as np
import pytest

from hackle.layers.multiverse import Tags, branch_structure
from hackle.zoo.errors import UserError
from hackle.zoo.generate.draft import Fork
from hackle.zoo.generate.writer import Limits, Writer

TAGS = Tags()
SHORT = dict(zip("TtPpGgOoAaCc", TAGS.tokens().values(), strict=True))
COLON, NEWLINE, EOS = 1, 2, 3
SHORT |= {":": COLON, "-": NEWLINE, "$": EOS, **{str(k): 10 + k for k in range(10)}}
LETTER = {token: letter for letter, token in SHORT.items()}
KEY = jax.random.key(0)


def spell(text):
    """Tokens of a text in which a tag is one letter, `$` the end of text; `.` is any word."""
    return [SHORT.get(letter, 100 + i) for i, letter in enumerate(text)]


def read(tokens):
    return "".join(LETTER.get(token, ".") for token in tokens)


PLENTY = Limits(500)


def writer(prompt="..", *, limits=PLENTY, range_end=math.inf, index_end=(COLON,), tags=TAGS):
    return Writer(
        spell(prompt) if isinstance(prompt, str) else prompt,
        tags=tags,
        limits=limits,
        range_end=range_end,
        index_end=frozenset(index_end),
        stops=frozenset([EOS]),
        key=KEY,
    )


def play(w, choose):
    """Lets `choose(strand)` decide until the draft is finished; what the cache was given."""
    given = []
    while w.draft.finish is None:
        packed, rows, keys, count = w.ask()
        given += packed[:, :count].T.tolist()
        live = len(w.live)
        assert rows.shape[1] == keys.shape[0] >= live and packed.shape[1] >= count
        assert (packed[1, count:] == -1).all()
        for strand, at in zip(w.live, rows[0], strict=False):
            assert packed[1, at] == strand.reader.position - 1 or strand.reader.depth == 0
        chosen = [choose(strand) for strand in w.live]
        w.answer(chosen + [7] * (rows.shape[1] - live))
    return given


def scripted(root, parts):
    """Chooses what a tree of tokens says: a list of tokens, and of lists for forks' paths."""
    scripts = {root: parts}

    def choose(strand):
        if strand not in scripts:
            place = strand.parent.children.index(strand)
            forks = [part for part in scripts[strand.parent] if isinstance(part, list)]
            made = [part for part in strand.parent.parts if isinstance(part, Fork)]
            scripts[strand] = forks[len(made) - 1][place]
        return scripts[strand][len(strand.parts)]

    return choose


def random_tree(rng, depth, name=()):
    """Tokens and forks of a well-formed text; indices as in the outlines."""
    parts = []
    for _ in range(int(rng.integers(0, 3))):
        parts += [100] * int(rng.integers(0, 4))
        if depth and rng.random() < 0.8:
            count, newline = int(rng.integers(1, 5)), [NEWLINE] * int(rng.integers(0, 2))
            order = rng.permutation(count) + 1
            starts = [[*(10 + k for k in (*name, place)), COLON] for place in map(int, order)]
            parts += [SHORT["P"], *newline, SHORT["G"]]
            for start in starts:
                words = [100] * int(rng.integers(0, 3))
                parts += [*newline, SHORT["O"], *start, *words, SHORT["o"]]
            parts += [*newline, SHORT["g"], *newline]
            paths = [
                [SHORT["A"], *start, *random_tree(rng, depth - 1, (*name, int(place)))]
                for place, start in zip(order, starts, strict=True)
            ]
            parts.append([[*path, SHORT["a"], *newline] for path in paths])
            parts += [SHORT["C"], 100, SHORT["c"], SHORT["p"]]
    return parts


def flat(parts):
    for part in parts:
        if isinstance(part, list):
            for path in part:
                yield from flat(path)
        else:
            yield part


def test_any_text_is_written_as_its_tree_says():
    rng, forked = np.random.default_rng(0), 0
    for _ in range(150):
        parts = [*random_tree(rng, 3), EOS]
        tokens = [*flat(parts)]
        if len(tokens) > 500:
            continue
        w = writer()
        given = play(w, scripted(w.live[0], parts))
        assert (w.draft.finish, w.draft.error) == ("stop", None)
        assert w.draft.tokens == tokens
        whole = branch_structure(np.array(spell("..") + tokens), TAGS, depth=6)
        assert w.draft.structure(6).position.tolist() == whole.position[2:].tolist()
        np.testing.assert_array_equal(w.draft.structure(6).path, whole.path[:, 2:])
        # Every token but the last goes to the cache, once, where the draft says that it is.
        places = [
            [one.token, one.place.position, *one.place.block, *[0] * (6 - len(one.place.block))]
            for one in w.draft.written()
        ]
        assert sorted(row[:8] for row in given[2:]) == sorted(places[:-1])
        forked += w.draft.forks
    assert forked > 100


GOAL = "PGO1:.oO2:.o"


def choose_by_index(**texts):
    """Chooses for a path what its index says, for the text what `text` says."""

    def choose(strand):
        if strand.parent is None:
            written = [part for part in strand.parts if not isinstance(part, Fork)]
            return spell(texts["text"])[len(written)]
        index = read([strand.parts[1].token])
        return spell(texts[f"p{index}"])[len(strand.parts) - 3]

    return choose


def outcome(text, *, p1=".a", p2="..a", prompt="..", **how):
    """What was written, why or at which limit it ended, and what was wrong. `text` has the tokens
    that the decoder writes, too: it is read at the place of the draft."""
    w = writer(prompt, **how)
    play(w, choose_by_index(text=text, p1=p1, p2=p2))
    assert (w.draft.finish == "length") == (w.draft.limit is not None)
    return read(w.draft.tokens), w.draft.limit or w.draft.finish, w.draft.error


def test_a_fork_and_a_join():
    assert outcome(f".{GOAL}gC.cp.$") == (f".{GOAL}gA1:.aA2:..aC.cp.$", "stop", None)
    # The separator of the goal is that of the paths.
    assert outcome(f".{GOAL}-g-C.cp.$") == (f".{GOAL}-g-A1:.a-A2:..a-C.cp.$", "stop", None)


def test_a_stop_token_closes_its_path():
    expected = f"{GOAL}gA1:.aA2:..aCcp$"
    assert outcome(f"{GOAL}gCcp$", p2="..$") == (expected, "stop", None)
    # Not within a block of that path, which it would leave open.
    text, finish, error = outcome(f"{GOAL}gCcp$", p2="PG$")
    assert (finish, error) == ("malformed", "the text stops within a block")
    assert text.endswith("A2:PG")


def test_a_stop_token_within_a_block_of_the_text():
    text, finish, error = outcome("PG$")
    assert (text, finish) == ("PG$", "malformed")
    assert error == "the end of the document cannot follow <Goal>; expected </Goal> or <Outline>"


@pytest.mark.parametrize(
    "text, kept, error",
    [
        (".a", ".", "</Path> ends a path, but none is open"),
        ("PA", "P", "<Path> cannot follow <Parallel>; expected <Goal>"),
        ("Pg", "P", "</Goal> cannot follow <Parallel>; expected <Goal>"),
        ("PGgC", "PGg", "<Conclusion> cannot follow </Goal>; expected <Path>"),
        ("PGO.og", "PGO.og", "outline 1 has no index"),
    ],
)
def test_malformed_text_ends_the_request(text, kept, error):
    assert outcome(text) == (kept, "malformed", error)


def test_a_malformed_path_ends_the_request():
    text, finish, error = outcome(f"{GOAL}gC", p2=".g")
    assert (finish, error) == (
        "malformed",
        "</Goal> cannot follow <Path>; expected <Parallel> or </Path>",
    )
    assert text == f"{GOAL}gA1:.aA2:."


def test_a_goal_without_outlines_is_written_path_by_path():
    text = "PGgA.aA..aC.cp$"
    assert outcome(text) == (text, "stop", None)
    w = writer()
    play(w, choose_by_index(text=text))
    assert w.draft.forks == 0 and w.draft.critical_path == w.draft.total - 3


def test_too_many_branches():
    text, finish, error = outcome(f"{GOAL}g", limits=Limits(100, branches=1))
    assert (text, finish) == (f"{GOAL}g", "malformed")
    assert error == "2 outlines exceed the limit of 1 branches"


def test_too_deep():
    text, finish, error = outcome(f"{GOAL}g", p2="PGO3:og", limits=Limits(100, depth=1))
    assert (finish, error) == ("malformed", "<Path> is nested deeper than 1")
    assert text.endswith("A2:PGO3:og")


def test_indices_may_be_left_out():
    w = writer(index_end=())
    forks = [[SHORT["A"], 100, SHORT["a"]], [SHORT["A"], SHORT["a"]]]
    play(w, scripted(w.live[0], [*spell("PGO.oO.og"), forks, *spell("C.cp$")]))
    assert read(w.draft.tokens) == "PGO.oO.ogA.aAaC.cp$" and w.draft.finish == "stop"


def test_the_limit_of_tokens_holds_at_every_place():
    whole = f".{GOAL}-g-A1:.a-A2:..a-C.cp.$"
    for most in range(1, len(whole) + 3):
        text, finish, error = outcome(f".{GOAL}-g-C.cp.$", limits=Limits(most))
        assert error is None
        assert finish == ("stop" if most >= len(whole) else "tokens")
        assert len(text) == min(most, len(whole))


def test_the_limit_of_the_critical_path_and_the_rotary_range():
    full = outcome(f"{GOAL}gC.cp.$")[0]
    w = writer()
    play(w, choose_by_index(text=f"{GOAL}gC.cp.$", p1=".a", p2="..a"))
    critical = w.draft.critical_path
    assert critical < len(full)
    for limit, how in (
        ("critical_path", lambda n: dict(limits=Limits(500, n))),
        ("positions", lambda n: dict(range_end=n + 2)),
        ("positions", lambda n: dict(limits=Limits(500, n + 1), range_end=n + 2)),
    ):
        for most in range(1, critical):
            w = writer(**how(most))
            play(w, choose_by_index(text=f"{GOAL}gC.cp.$", p1=".a", p2="..a"))
            assert (w.draft.finish, w.draft.limit) == ("length", limit)
            assert w.draft.critical_path <= most
        assert outcome(f"{GOAL}gC.cp.$", **how(critical))[:2] == (full, "stop")


def test_a_prompt_within_a_block():
    """In a goal that it ended, it forks; in a path, one stream goes on."""
    w = writer(f".{GOAL}g")
    assert len(w.live) == 2 and read(w.draft.tokens) == "A1:A2:"
    packed, _, _, count = w.ask()
    assert read(packed[0, :count]) == f".{GOAL}gA1:A2:" and w.draft.start == count - 6
    text = "..aA2:.aC.cp$"
    assert outcome(text, prompt=f".{GOAL}gA1:.") == (text, "stop", None)
    with pytest.raises(UserError, match="prompt: token 1: </Path> ends a path"):
        writer(".a")


def test_a_prompt_that_cannot_fork_is_finished_at_once():
    w = writer(f".{GOAL}g", limits=Limits(100, branches=1))
    assert w.draft.finish == "malformed" and w.draft.tokens == []


def test_other_tags():
    """ThreadWeaver's blocks have no conclusion: they end with their own tag."""
    tags = Tags.threadweaver(200)
    one = lambda tag, *inside: [tag[0].open, *inside, tag[0].close]
    plan = one(tags.goal, *one(tags.outline, 11, COLON), *one(tags.outline, 12, COLON))
    threads = [one(tags.path, 11, COLON, 7), one(tags.path, 12, COLON, 8, 9)]
    w = writer(tags=tags)
    text = [tags.parallel[0].open, *plan, threads, tags.parallel[0].close, 7, EOS]
    play(w, scripted(w.live[0], text))
    assert w.draft.tokens == [*flat(text)] and w.draft.finish == "stop"


def test_keys_hang_on_the_index():
    def keys(prompt):
        w = writer(prompt)
        return {s.parts[1].token: jax.random.key_data(s.key).tolist() for s in w.live}

    first, other = keys(f".{GOAL}g"), keys(".PGO2:.oO1:.og")
    assert first == other and len({*map(tuple, first.values())}) == 2
