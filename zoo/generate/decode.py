"""Prefill, then token by token: `generate` for lists, `stream` for a terminal."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hackle.layers.language_model import LanguageModel
from hackle.zoo.errors import UserError
from hackle.zoo.generate.sampling import Sampling, row_keys, sample

# Prompts and caches are rounded up to this, so that few lengths are compiled.
_ROUND = 32
# Turns that the model may take before the host looks at what it chose.
ALONE = 8
NOTHING = -1  # for a token


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    eos: int | Collection[int] | None = None,
) -> list[list[int]]:
    """Continues every prompt by up to `max_new_tokens` tokens; greedy unless told otherwise.

    Args:
      model: any `LanguageModel`, e.g. from `zoo.create` or `zoo.from_pretrained`.
      prompts: token ids, one list a prompt, of any lengths; or an int array `[B, L]`.
      max_new_tokens: at most this many new tokens a prompt.
      temperature, top_k, top_p, min_p: see `Sampling`.
      seed: with the row's number and the step, decides every sample.
      eos: token id, or several, after which a row stops. None: no early stop.

    Returns:
      The new tokens of each prompt; a row that stopped ends with its `eos` token.

    Raises:
      UserError: an empty prompt, a token or an `eos` outside the vocabulary, more tokens than the
        model's rotary range (a recurrence has none), or a sampling value out of range.
    """
    steps = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        eos=eos,
    )
    rows: list[list[int]] = [[] for _ in prompts]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    eos: int | Collection[int] | None = None,
) -> Iterator[list[int | None]]:
    """Yields, step by step, the new token of every row, or None for rows that have stopped.

    The first step comes alone, the others a few at a time. Arguments and errors as in `generate`;
    they are checked at the call, before anything is computed.
    """
    prompts = token_lists(prompts)
    check_request(model, prompts, max_new_tokens)
    return _steps(
        model, prompts, max_new_tokens, sampling, seed, stop_ids(eos, model.config.vocab_size)
    )


def _steps(model, prompts, max_new_tokens, sampling, seed, stops):
    graph, state = nnx.split(model)
    tokens, positions = _left_pad(prompts)
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    capacity = _round_up(tokens.shape[1] + max_new_tokens)
    keys = row_keys(seed, len(prompts))
    token, cache = _prefill(graph, capacity, sampling, state, tokens, positions, keys)
    go_on, ends = _go_on_of(graph), jnp.asarray(sorted(stops), jnp.int32)
    on = jnp.ones(len(prompts), bool)
    turns, chosen = token[None], 1
    running = [True] * len(prompts)
    while True:
        for turn in np.asarray(turns).tolist():
            if turn[0] == NOTHING:
                break
            out = [t if runs else None for t, runs in zip(turn, running, strict=True)]
            yield out
            running = [runs and t not in stops for runs, t in zip(running, out, strict=True)]
        most = min(ALONE, max_new_tokens - chosen)
        if not most or not any(running):
            return
        rest = lengths, keys, ends, np.int32(chosen), np.int32(most)
        turns, token, on, cache = go_on(sampling, state, cache, token, on, *rest)
        chosen += most


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(graph, capacity, sampling, state, tokens, positions, keys):
    model = nnx.merge(graph, state)
    cache = model.init_cache(tokens.shape[0], capacity)
    features, cache = model.extend(tokens, cache, positions=positions)
    return _next(model, features, keys, jnp.zeros((), jnp.int32), sampling), cache


def per_graph(step: Callable[..., Any], *, donate: int) -> Callable[[Any], Callable[..., Any]]:
    """Of `step(graph, sampling, state, ...)`, a function of the graph that gives the rest, jitted.

    Cached for the last eight graphs, since hashing one at every step takes the host as long as
    some steps take the device.

    Args:
      donate: which argument behind the graph may be overwritten.
    """

    @functools.lru_cache(maxsize=8)
    def of(graph):
        rest = functools.partial(step, graph)
        return jax.jit(rest, static_argnums=(0,), donate_argnums=(donate,))

    return of


def _go_on(graph, sampling, state, cache, token, on, lengths, keys, ends, number, most):
    """Up to `most` more tokens a row, until all rows have stopped.

    Args:
      token: int32 `[B]`, the last of each row; `number` of them, int32, were chosen so far.
      on: bool `[B]`, which rows had not stopped before it.
      lengths: int32 `[B]`, of the prompts.
      ends: int32 `[S]`, tokens that stop a row.
      most: int32, up to `ALONE`.

    Returns:
      Tokens int32 `[ALONE, B]`, `NOTHING` behind them; the last ones, `on`, and the cache.
    """
    model = nnx.merge(graph, state)
    still = lambda on, token: on & ~jnp.isin(token, ends)

    def unfinished(carry):
        turn, _, token, on, _ = carry
        return (turn < most) & jnp.any(still(on, token))

    def go(carry):
        turn, turns, token, on, cache = carry
        position, on = lengths + number + turn - 1, still(on, token)
        features, cache = model.extend(token[:, None], cache, positions=position[:, None])
        token = _next(model, features, keys, number + turn, sampling)
        return turn + 1, turns.at[turn].set(token), token, on, cache

    turns = jnp.full((ALONE, token.shape[0]), NOTHING, jnp.int32)
    start = (jnp.zeros((), jnp.int32), turns, token, on, cache)
    _, *found = jax.lax.while_loop(unfinished, go, start)
    return tuple(found)


_go_on_of = per_graph(_go_on, donate=2)


def _next(model, features, keys, step, sampling):
    """Samples after the last token, which left padding puts at the end of every row."""
    return sample(model.logits(features[:, -1]), keys, step, sampling)


def _round_up(length: int) -> int:
    return -(-length // _ROUND) * _ROUND


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions int32 `[B, L]`; padding stands left, at position -1."""
    length = _round_up(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    positions = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        positions[row, length - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def stop_ids(eos: int | Collection[int] | None, vocab_size: int) -> frozenset[int]:
    """The tokens that end a text.

    Raises:
      UserError: one is outside the vocabulary, so that it would never come.
    """
    stops = frozenset([int(eos)] if isinstance(eos, int | np.integer) else eos or ())
    if wrong := sorted(token for token in stops if not 0 <= token < vocab_size):
        raise UserError(f"eos={wrong[0]}; the vocabulary is 0..{vocab_size - 1}")
    return stops


def token_lists(prompts: Any) -> list[list[int]]:
    """Prompts as lists of numbers; they may be given as arrays, too.

    Raises:
      UserError: they are not several rows of whole numbers.
    """
    rows = []
    for row, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        array = None if isinstance(prompt, str) else np.asarray(prompt)
        whole = array is not None and (not array.size or np.issubdtype(array.dtype, np.integer))
        if array is None or array.ndim != 1 or not whole:
            raise UserError(
                f"prompt {row} is {prompt!r}; expected a list of token ids for each prompt, "
                "as a tokenizer's encode gives"
            )
        rows.append(array.tolist())
    return rows


def check_request(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raises UserError where `generate` would; see there."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    if not prompts:
        raise UserError("there is no prompt; expected at least one")
    config = model.config
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {row} is empty; expected at least one token")
        for index, token in enumerate(prompt):
            if not 0 <= token < config.vocab_size:
                raise UserError(
                    f"prompt {row} has token {token} at index {index}; "
                    f"the vocabulary is 0..{config.vocab_size - 1}"
                )
        if len(prompt) + max_new_tokens > getattr(config, "max_length", math.inf):
            raise UserError(
                f"prompt {row} of {len(prompt)} tokens and {max_new_tokens} new ones exceed "
                f"the model's rotary range of {config.max_length} tokens"
            )
