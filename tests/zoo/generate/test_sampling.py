"""Choosing the next token: against transformers' filters, and independence of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle.zoo.errors import UserError
from hackle.zoo.generate import Sampling, generate
from hackle.zoo.generate.sampling import keep_likely, row_keys, sample
from hackle.zoo.parscale import ParScaleConfig, ParScaleLM

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 40)) * 3, jnp.float32)


def transformers_filter(how):
    import torch
    from transformers.generation import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    parts = LogitsProcessorList()
    if how.top_k is not None:
        parts.append(TopKLogitsWarper(how.top_k))
    if how.top_p is not None:
        parts.append(TopPLogitsWarper(how.top_p))
    if how.min_p is not None:
        parts.append(MinPLogitsWarper(how.min_p))
    return parts(None, torch.tensor(np.asarray(LOGITS))).numpy()


@pytest.mark.parametrize(
    "how",
    [
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_k=7),
        Sampling(1.0, top_k=400),
        Sampling(1.0, top_p=0.1),
        Sampling(1.0, top_p=0.9),
        Sampling(1.0, top_p=1.0),
        Sampling(1.0, min_p=0.05),
        Sampling(1.0, min_p=1.0),
        Sampling(1.0, top_k=20, top_p=0.8, min_p=0.02),
    ],
    ids=repr,
)
def test_filters_are_those_of_transformers(how):
    np.testing.assert_array_equal(np.asarray(keep_likely(LOGITS, how)), transformers_filter(how))


def test_greedy_takes_the_largest():
    out = sample(LOGITS, row_keys(0, 6), jnp.asarray(0), Sampling())
    np.testing.assert_array_equal(out, np.argmax(LOGITS, axis=-1))


def test_samples_follow_the_tempered_distribution():
    logits = jnp.asarray([[0.0, 1.0, 2.0]])
    draw = jax.vmap(lambda i: sample(logits, row_keys(0, 1), i, Sampling(2.0))[0])
    share = np.bincount(draw(jnp.arange(20000)), minlength=3) / 20000
    expected = np.exp([0, 0.5, 1.0]) / np.exp([0, 0.5, 1.0]).sum()
    np.testing.assert_allclose(share, expected, atol=4 * 0.5 / np.sqrt(20000))


@pytest.fixture(scope="module")
def model():
    from flax import nnx

    config = ParScaleConfig.tiny(2, vocab_size=40, width=16, mlp_width=16, depth=1, head_width=4)
    return ParScaleLM(config, rngs=nnx.Rngs(0))


def test_a_row_does_not_depend_on_its_neighbours(model):
    prompts = [[1, 2, 3], [4, 5], [6]]
    kwargs = dict(max_new_tokens=8, temperature=1.0, top_p=0.95, seed=3)
    together = generate(model, prompts, **kwargs)
    assert together[:2] == generate(model, prompts[:2], **kwargs)
    assert together == generate(model, prompts, **kwargs), "same seed, same text"
    assert together != generate(model, prompts, **{**kwargs, "seed": 4})


def test_equal_prompts_in_different_rows_differ(model):
    first, second = generate(model, [[1, 2]] * 2, max_new_tokens=12, temperature=1.0)
    assert first != second


def test_eos_stops_a_row_and_only_that_row(model):
    plain = generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=10, temperature=1.0)
    stop = plain[0][3]
    stopped = generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=10, temperature=1.0, eos=stop)
    for before, after in zip(plain, stopped, strict=True):
        cut = before.index(stop) + 1 if stop in before else len(before)
        assert after == before[:cut]
    several = generate(
        model, [[1, 2, 3]], max_new_tokens=10, temperature=1.0, eos={stop, plain[0][1]}
    )
    assert several[0] == plain[0][: 1 + min(plain[0].index(stop), plain[0].index(plain[0][1]))]


def test_prompts_may_be_arrays(model):
    want = generate(model, [[1, 2], [3, 4]], max_new_tokens=3)
    for rows in (jnp.array([[1, 2], [3, 4]]), [np.array([1, 2]), jnp.array([3, 4])]):
        assert generate(model, rows, max_new_tokens=3) == want


def test_eos_that_would_never_come_is_refused(model):
    size = model.config.vocab_size
    for eos in (size, {1, -1}):
        with pytest.raises(UserError, match=rf"eos=(-1|{size}); the vocabulary is 0..{size - 1}"):
            generate(model, [[1]], max_new_tokens=1, eos=eos)


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "no prompt"),
        ([1, 2], {}, "prompt 0 is 1; expected a list of token ids for each prompt"),
        ("hello", {}, "prompt 0 is 'hello'; expected a list of token ids"),
        (["hello"], {}, "prompt 0 is 'hello'; expected a list of token ids"),
        ([[0.5]], {}, r"prompt 0 is \[0.5\]; expected a list of token ids"),
        ([[1, 40]], {}, r"token 40 at index 1; the vocabulary is 0\.\.39"),
        ([[-1]], {}, "token -1"),
        ([[1] * 500], {}, "rotary range of 512 tokens"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
        ([[1]], {"temperature": -1.0}, "temperature must be >= 0"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k must be >= 1"),
        ([[1]], {"top_k": 5}, "top_k has no effect at temperature 0"),
    ],
)
def test_bad_requests_are_refused_before_compute(model, prompts, changes, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts, **{"max_new_tokens": 20, **changes})


def test_steps_do_not_recompile(model):
    from hackle.zoo.generate import decode

    step = decode._go_on_of(nnx.split(model)[0])
    programs = lambda: (step._cache_size(), decode._prefill._cache_size())
    generate(model, [[1, 2, 3]], max_new_tokens=5)
    before = programs()
    generate(model, [[7, 8, 9, 10, 11]], max_new_tokens=9)
    assert programs() == before and before[0]
