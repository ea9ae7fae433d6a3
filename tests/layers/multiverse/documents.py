"""Random branching documents as trees, and what their tokens should be, by plain recursion.

The oracle never parses: it walks the tree that a document was written from, and asks about pairs
of tokens.
"""

import dataclasses

import numpy as np

from hackle.layers.multiverse import Tags

TEXT = 100  # ids from here on are text; far from the tags
NEWLINE = 99
TAGS = Tags()
ID = TAGS.tokens()


@dataclasses.dataclass
class Block:
    goal: int  # tokens of text in the goal, before the outlines
    outlines: list[int]  # tokens of each
    paths: list[list]  # items of each
    conclusion: int
    newlines: int  # between siblings


@dataclasses.dataclass
class Token:
    """One token of a document: `address` holds (block, path) pairs, outermost first."""

    id: int
    address: tuple
    position: int


def random_items(rng, depth, *, paths=4, newlines=1, outlines=True):
    """Texts (their lengths) and blocks that nest up to `depth`."""
    items = []
    for _ in range(rng.integers(0, 3)):
        items.append(int(rng.integers(0, 5)))
        if depth and rng.random() < 0.7:
            count = int(rng.integers(1, paths + 1))
            inside = [
                random_items(rng, depth - 1, paths=paths, newlines=newlines, outlines=outlines)
                for _ in range(count)
            ]
            stated = [int(rng.integers(0, 3)) for _ in range(count)] if outlines else []
            sizes = rng.integers(0, 3, 2)
            between = int(rng.integers(0, newlines + 1)) if newlines > 1 else newlines
            items.append(Block(int(sizes[0]), stated, inside, int(sizes[1]), between))
    return items


def write(items, *, layout="strict", think=False, start=0):
    """The tokens of a document, each with its address and position."""
    out: list[Token] = []
    blocks = iter(range(1, 10**6))

    def put(ids, address, position):
        for token in ids:
            out.append(Token(token, address, position))
            position += 1
        return position

    def text(count):
        return [TEXT + len(out) + i for i in range(count)]

    def item(one, address, position):
        if isinstance(one, int):
            return put(text(one), address, position)
        newline = [NEWLINE] * one.newlines
        position = put([ID["<Parallel>"], *newline, ID["<Goal>"]], address, position)
        position = put(text(one.goal), address, position)
        for length in one.outlines:
            position = put([ID["<Outline>"]], address, position)
            position = put([*text(length), ID["</Outline>"], *newline], address, position)
        goal = put([ID["</Goal>"]], address, position)
        position = put(newline, address, goal)
        first = position if layout == "strict" else goal
        number, ends = next(blocks), []
        for path, inside in enumerate(one.paths, 1):
            here = (*address, (number, path))
            position = put([ID["<Path>"]], here, first)
            position = walk(inside, here, position)
            position = put([ID["</Path>"]], here, position)
            if layout == "published":
                ends.append(position)
                put(newline, address, position)
            else:
                ends.append(put(newline, here, position))
        position = put([ID["<Conclusion>"]], address, max(ends))
        position = put(text(one.conclusion), address, position)
        end = [ID["</Conclusion>"], *newline, ID["</Parallel>"]]
        return put(end, address, position)

    def walk(items, address, position):
        for one in items:
            position = item(one, address, position)
        return position

    if think:
        start = put([*text(2), ID["<Think>"]], (), start)
    start = walk(items, (), start)
    if think:
        put([ID["</Think>"], *text(1)], (), start)
    return out


def visible(tokens):
    """Bool [L, L] by the definition: no block that two tokens share has them in two paths."""
    size = len(tokens)
    table = np.zeros((size, size), bool)
    for t in range(size):
        for s in range(t + 1):
            pairs = zip(tokens[t].address, tokens[s].address, strict=False)
            table[t, s] = all(a[0] != b[0] or a[1] == b[1] for a, b in pairs)
    return table


def ids(tokens):
    return np.array([token.id for token in tokens], np.int32)


def positions(tokens):
    return [token.position for token in tokens]


def addresses(tokens, depth):
    """Block and path ids int [depth, L], blocks numbered in the order of their first paths."""
    block, path = np.zeros((2, depth, len(tokens)), int)
    for t, token in enumerate(tokens):
        for d, (number, ordinal) in enumerate(token.address):
            block[d, t], path[d, t] = number, ordinal
    return block, path


def random_documents(count, *, seed=0, depth=4, least=1, most=500, **how):
    """`count` random documents; `layout` and `think` as in `write`, the rest of `random_items`."""
    rng = np.random.default_rng(seed)
    written = {key: how.pop(key) for key in ("layout", "think") if key in how}
    found = []
    while len(found) < count:
        tokens = write(random_items(rng, int(rng.integers(0, depth + 1)), **how), **written)
        if least <= len(tokens) <= most:
            found.append(tokens)
    return found
