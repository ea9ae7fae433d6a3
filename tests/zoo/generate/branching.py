"""A small transformer that branches: which tags it writes is biased, all else it decides itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hackle.layers.multiverse import Tags
from hackle.zoo.dense import DenseConfig, DenseLM

TEXT = [*range(8)]  # 6 opens a block, 7 ends the path or the text
WORDS = [*range(8, 12)]  # of outlines and conclusions
DIGITS = [[12, 13, 14], [15, 16, 17]]  # of the indices of outer and of inner blocks
COLONS = [18, 19]
NEWLINE, EOS = 20, 21
TAGS = Tags.numbered(22)
VOCAB = 34
ID = TAGS.tokens()


def _bias() -> np.ndarray:
    """[depth, V, V]: what may follow a token in a path of that depth is raised far above all else.

    Several tokens that may follow are left to the transformer to choose from.
    """
    table = np.zeros((3, VOCAB, VOCAB), np.float32)

    def then(depth, before, after):
        for token in [before] if isinstance(before, int) else before:
            table[depth, token] = -40
            table[depth, token, after] = 0

    for depth in range(3):
        then(depth, TEXT, TEXT)
        then(depth, 7, ID["</Path>"] if depth else EOS)
        if depth < 2:
            then(depth, 6, ID["<Parallel>"])
            then(depth, ID["<Outline>"], DIGITS[depth])
            then(depth, DIGITS[depth], COLONS[depth])
            then(depth, COLONS[depth], WORDS)
        if depth:
            then(depth, COLONS[depth - 1], TEXT)
        then(depth, ID["<Parallel>"], ID["<Goal>"])
        then(depth, ID["<Goal>"], ID["<Outline>"])
        then(depth, WORDS, [*WORDS, ID["</Outline>"], ID["</Conclusion>"]])
        then(depth, ID["</Outline>"], [ID["<Outline>"], ID["</Goal>"], NEWLINE])
        then(depth, NEWLINE, ID["</Goal>"])
        then(depth, ID["<Conclusion>"], WORDS[:2])
        then(depth, ID["</Conclusion>"], ID["</Parallel>"])
        then(depth, ID["</Parallel>"], TEXT)
    table[:, ID["</Outline>"], ID["<Outline>"]] += 2  # rather two outlines than one
    # A word ends what it stands in: the first two do so in conclusions, the others in outlines.
    table[:, WORDS[:2], ID["</Outline>"]] = -40
    table[:, WORDS[:2], WORDS[2] : WORDS[3] + 1] = -40
    table[:, WORDS[2:], ID["</Conclusion>"]] = -40
    table[:, WORDS[2:], WORDS[0] : WORDS[1] + 1] = -40
    for depth in range(2):
        table[depth, COLONS[depth], WORDS[0] : WORDS[1] + 1] = -40
    return table


class Branching(DenseLM):
    """A `DenseLM` whose features carry the bias of their token, which `logits` adds.

    Noise that hangs on position and path keeps greedy texts from going in circles, and siblings
    from doing the same.
    """

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.bias = nnx.Variable(jnp.asarray(_bias()))
        self.noise = nnx.Variable(2 * jax.random.normal(rngs.params(), (97, VOCAB)))

    def _with_bias(self, features, tokens, branches):
        depth = jnp.sum(branches.block != 0, axis=1)
        noise = self.noise[...][(branches.position + 31 * jnp.sum(branches.path, axis=1)) % 97]
        return jnp.concatenate([features, self.bias[...][depth, tokens] + noise], axis=-1)

    def features(self, tokens, *, branches, **others):
        found = super().features(tokens, branches=branches, **others)
        return self._with_bias(found, tokens, branches)

    def extend(self, tokens, cache, *, branches, **others):
        found, cache = super().extend(tokens, cache, branches=branches, **others)
        return self._with_bias(found, tokens, branches), cache

    def logits(self, features):
        width = self.config.width
        return super().logits(features[..., :width]) + features[..., width:]


def config(**changes) -> DenseConfig:
    sizes = dict(vocab_size=VOCAB, width=32, mlp_width=48, depth=2, heads=4, kv_heads=2)
    rest = dict(head_width=8, max_length=600, embedding_std=1.0, tie_embeddings=False)
    return DenseConfig(**{**sizes, **rest, **changes})


@functools.cache
def branching(seed: int) -> Branching:
    """Weights so large that attention is far from uniform and decides much, so choices vary."""
    model = nnx.jit(lambda: Branching(config(), rngs=nnx.Rngs(seed)))()
    attention = model.blocks.block.attention
    for layer, factor in ((attention.query, 6), (attention.output, 6), (model.head, 6)):
        layer.weight[...] = factor * layer.weight[...]
    return model
