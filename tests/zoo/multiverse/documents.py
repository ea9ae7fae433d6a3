"""Small documents with paths, as lists of token ids, and what each token may see."""

import numpy as np

from hackle.layers.multiverse import Tags

# Twelve tags behind 48 tokens that are text.
TEXT, TAGS = 48, Tags.numbered(48)
(THINK, END_THINK, PARALLEL, END_PARALLEL, GOAL, END_GOAL, OUTLINE, END_OUTLINE, PATH, END_PATH,
 CONCLUSION, END_CONCLUSION) = TAGS.tokens().values()  # fmt: skip
VOCAB = 60


def block(goals, paths, conclusion):
    """A block of texts: one goal and one path each, then a conclusion."""
    tokens = [PARALLEL, GOAL]
    for goal in goals:
        tokens += [OUTLINE, *goal, END_OUTLINE]
    tokens += [END_GOAL]
    for path in paths:
        tokens += [PATH, *path, END_PATH]
    return [*tokens, CONCLUSION, *conclusion, END_CONCLUSION, END_PARALLEL]


def text(seed, length):
    return np.random.default_rng(seed).integers(0, TEXT, length).tolist()


INNER = block([text(1, 1), text(2, 2)], [text(3, 2), text(4, 4)], text(5, 2))
# Blocks in a path of a block in a path of a block.
NESTED = [
    *text(6, 3),
    *block(
        [text(7, 1), text(8, 1), text(9, 2)],
        [[*text(10, 2), *INNER, *text(11, 1)], text(12, 5), [*text(13, 1), *INNER]],
        text(14, 3),
    ),
    *text(15, 4),
]
DOCUMENT = [THINK, *block([text(16, 1), text(17, 1)], [NESTED, text(18, 3)], text(19, 2)),
            END_THINK, *text(20, 3)]  # fmt: skip


def paths_of(tokens):
    """For each token, the paths that it is in: (block, path) from the outermost, by a stack.

    Between siblings there is nothing in these documents, so a path is from its tag to its end tag.
    """
    found, stack, blocks = [], [], 0
    open_blocks = []
    for token in tokens:
        if token == PARALLEL:
            blocks += 1
            open_blocks.append([blocks, 0])
        elif token == PATH:
            open_blocks[-1][1] += 1
            stack.append(tuple(open_blocks[-1]))
        found.append(tuple(stack))
        if token == END_PATH:
            stack.pop()
        elif token == END_PARALLEL:
            open_blocks.pop()
    return found


def sees(tokens):
    """Bool `[L, L]`: causal, and no token of a sibling path."""
    paths = paths_of(tokens)

    def siblings(a, b):
        return any(x[0] == y[0] and x != y for x in a for y in b)

    size = len(tokens)
    return np.array([
        [s <= t and not siblings(paths[t], paths[s]) for s in range(size)] for t in range(size)
    ])  # fmt: skip


def positions_of(tokens):
    """Siblings start at one position; what follows a block stands behind its longest path."""
    found, at, starts, ends = [], 0, [], []
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        if token == PATH and before != END_PATH:
            starts.append(at)
            ends.append(at)
        elif token == PATH:
            at = starts[-1]
        found.append(at)
        at += 1
        if token == END_PATH:
            ends[-1] = max(ends[-1], at)
            if after != PATH:
                at = ends.pop()
                starts.pop()
    return np.array(found, np.int32)
