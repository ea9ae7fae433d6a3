"""Decoding of texts that branch (Multiverse, arXiv 2506.09991): fork, side by side, join.

All paths of a request share one row of one cache. A step appends a token of every path to it, in
whatever order, and each sees its own path and what is around it. So nothing is copied at a fork,
and at a join nothing is computed again: the conclusion sees all paths because it is in none.
"""

import functools
import math
import os
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hackle.layers.causal_decoder import CausalDecoder
from hackle.layers.multiverse import MAX_DEPTH, BranchStructure, Tags
from hackle.zoo.errors import UserError
from hackle.zoo.generate.decode import (
    ALONE,
    NOTHING,
    check_request,
    per_graph,
    stop_ids,
    token_lists,
)
from hackle.zoo.generate.draft import Draft
from hackle.zoo.generate.sampling import Sampling, row_keys, sample
from hackle.zoo.generate.writer import PADDING, Limits, Writer

# The cache is rounded up to this, so that few lengths are compiled.
_ROUND = 256


def generate_branches(
    model: CausalDecoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    index_end: Collection[int],
    tags: Tags | None = None,
    max_critical_path: int | None = None,
    max_depth: int = MAX_DEPTH,
    max_branches: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    eos: int | Collection[int] | None = None,
) -> Draft:
    """Continues one prompt, in paths side by side where the model asks for them.

    Where a goal ends that has outlines, the decoder writes what separates the parts of a block (as
    the model did between the last outline and the end of the goal), and forks. Every path begins
    with its tag, and then as its outline does, up to the end of the index. When a path has written
    its closing tag, the decoder adds the separator, and after the last one the tag of the
    conclusion; the text then goes on as one. What the decoder writes is counted like all else.

    Greedy results are those of a full forward pass with the branch structure of the text. Samples
    of a path hang on the seed, its index and the place in it, not on the order of the outlines.

    What becomes of texts that go wrong, besides the errors of the grammar (`layers.multiverse`),
    which end the request as "malformed", without the tag that shows them:

    - A path that writes a stop token, not within an inner block, is closed instead.
    - Any other stop token within a block, more outlines than `max_branches`, or an outline
      without index: "malformed".
    - A goal without outlines announces no paths: the model writes them itself, one by one.
    - A limit that the next tokens would exceed: "length", and which limit. Several paths may be
      open then.

    Args:
      model: with a key-value cache, e.g. a `MultiverseLM`.
      prompt: token ids. May end within a block, which is then written on by one stream; where it
        ends with the end of a goal, it forks at once.
      max_new_tokens, max_critical_path, max_depth, max_branches: see `Limits`.
      index_end: tokens that end the index of an outline, such as the colon in "1.2: ...". None
        given: paths begin with their tag alone.
      tags: None takes those of the model's config.
      temperature, top_k, top_p, min_p: see `Sampling`.
      seed: decides every sample.
      eos: token id, or several, after which the text stops.

    Returns:
      The draft when it is finished: its parts, tokens, counts, and why it ended.

    Raises:
      UserError: a prompt that is empty, too long, has a token outside of the vocabulary or breaks
        the grammar; a model without a cache for branches, or without tags, or with a tag outside
        of the vocabulary; a limit or a sampling value out of range, or more tokens than there is
        memory for.
    """
    steps = stream_branches(
        model,
        prompt,
        limits=Limits(max_new_tokens, max_critical_path, max_depth, max_branches),
        index_end=index_end,
        tags=tags,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        eos=eos,
    )
    return [*steps][-1]


def stream_branches(
    model: CausalDecoder,
    prompt: Sequence[int],
    *,
    limits: Limits,
    index_end: Collection[int],
    tags: Tags | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    eos: int | Collection[int] | None = None,
) -> Iterator[Draft]:
    """Yields the draft as it begins and after every step: one object, finished when it comes last.

    Steps come a few at a time.

    Arguments and errors as in `generate_branches`; they are checked at the call.
    """
    if not isinstance(model, CausalDecoder):
        raise UserError(f"{type(model).__name__} has no cache for branches; use generate")
    (prompt,) = token_lists([prompt])
    check_request(model, [prompt], 1)
    tags = getattr(model.config, "tags", None) if tags is None else tags
    if tags is None:
        raise UserError(f"{type(model.config).__name__} has no tags; say which tokens they are")
    if (reason := tags.beyond(model.config.vocab_size)) is not None:
        raise UserError(f"{reason}; the vocabulary is 0..{model.config.vocab_size - 1}")
    writer = Writer(
        prompt,
        tags=tags,
        limits=limits,
        range_end=getattr(model.config, "max_length", math.inf),
        index_end=frozenset(index_end),
        stops=stop_ids(eos, model.config.vocab_size),
        key=row_keys(seed, 1)[0],
    )
    capacity = _capacity(model, len(prompt) + PADDING, limits)
    return _steps(model, writer, capacity, limits.depth, sampling)


def _capacity(model: CausalDecoder, others: int, limits: Limits) -> int:
    """Of a cache for all new tokens and `others`.

    Positions do not bound it: paths share them.

    Raises:
      UserError: it does not fit into memory, beside the model.
    """
    capacity = -(-(others + limits.tokens) // _ROUND) * _ROUND
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    cache = jax.eval_shape(lambda: model.init_cache(1, capacity, branch_depth=limits.depth))
    asked, slots = _bytes(jax.tree.leaves(cache)), cache.positions.shape[1]
    room = _memory(set().union(*(x.devices() for x in parameters))) - _bytes(parameters)
    if asked > room:
        fitting = (room * slots // asked - cache.prefix_length) // _ROUND * _ROUND
        raise UserError(
            f"limit of tokens must be <= {max(fitting - others, 0)} in this memory, got "
            f"{limits.tokens}: their cache takes {asked / 2**30:.1f} GiB, beside the model there "
            f"are {room / 2**30:.1f} GiB"
        )
    return capacity


def _bytes(arrays: Collection[jax.Array | jax.ShapeDtypeStruct]) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def _memory(devices: Collection[jax.Device]) -> int:
    """Bytes that JAX may use on devices; where they do not say, as CPUs, those of the host."""
    stats = [device.memory_stats() or {} for device in devices]
    limits = [said["bytes_limit"] for said in stats if "bytes_limit" in said]
    return sum(limits) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _steps(model, writer, capacity, depth, sampling):
    graph, state = nnx.split(model)
    special = jnp.asarray(writer.special)
    cache = _empty_cache(graph, capacity, depth, state)
    step, go_on = _step_of(graph), _go_on_of(graph)
    yield writer.draft
    while writer.draft.finish is None:
        entries, rows, keys, count = writer.ask()
        tokens, cache = step(sampling, state, cache, entries, rows, keys, count)
        places, most = writer.alone()
        turns, cache = go_on(sampling, state, cache, tokens, places, rows[1], keys, special, most)
        for turn in np.asarray(turns).tolist():
            if turn[0] == NOTHING or writer.draft.finish is not None:
                break
            writer.answer(turn)
            yield writer.draft


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_cache(graph, capacity, depth, state):
    return nnx.merge(graph, state).init_cache(1, capacity, branch_depth=depth)


def _step(graph, sampling, state, cache, entries, rows, keys, count):
    """Appends tokens to the cache and chooses the next one of every strand.

    Args:
      entries: int32 `[2 + 2 depth, W]`: token, position, blocks, paths; padding at the end.
      rows: int32 `[2, R]`: the entry behind which a strand goes on, and how far it has come.
      keys: `[R]`.
      count: int32, how many entries are no padding.
    """
    model = nnx.merge(graph, state)
    block, path = jnp.split(entries[2:], 2)
    branches = BranchStructure(block[None], path[None], entries[1][None])  # type: ignore[arg-type]
    features, cache = model.extend(entries[0][None], cache, branches=branches)
    cache = cache.forget(entries.shape[1] - count)
    return sample(model.logits(features[0, rows[0]]), keys, rows[1], sampling), cache


def _go_on(graph, sampling, state, cache, tokens, places, far, keys, special, most):
    """Gives the model what it chose, until that is a token for the host to look at.

    Args:
      tokens: int32 `[R]`, chosen by `_step`.
      places: int32 `[1 + 2 depth, R]`: their position, blocks, paths; position -1 is padding.
      far: int32 `[R]`: how far the strands had come.
      special: int32 `[S]`, tokens behind which the host decides.
      most: int32, how often the model may be given tokens, at most `ALONE` times.

    Returns:
      int32 `[ALONE + 1, R]`: `tokens`, what was chosen after them, then `NOTHING`.
    """
    model = nnx.merge(graph, state)
    there = places[0] >= 0
    padding = jnp.sum(~there, dtype=jnp.int32)
    block, path = (ids[None] for ids in jnp.split(places[1:], 2))
    most = jnp.minimum(most, ALONE)

    def foreseen(carry):
        turn, tokens, *_ = carry
        return (turn < most) & ~jnp.any(jnp.isin(tokens, special) & there)

    def go(carry):
        turn, tokens, turns, cache = carry
        position = jnp.where(there, places[0] + turn, -1)[None]
        branches = BranchStructure(block, path, position)  # type: ignore[arg-type]
        features, cache = model.extend(tokens[None], cache, branches=branches)
        cache, turn = cache.forget(padding), turn + 1
        tokens = sample(model.logits(features[0]), keys, far + turn, sampling)
        return turn, tokens, turns.at[turn].set(tokens), cache

    turns = jnp.full((ALONE + 1, tokens.shape[0]), NOTHING, jnp.int32).at[0].set(tokens)
    start = (jnp.zeros((), jnp.int32), tokens, turns, cache)
    *_, turns, cache = jax.lax.while_loop(foreseen, go, start)
    return turns, cache


_step_of = per_graph(_step, donate=2)
_go_on_of = per_graph(_go_on, donate=2)
