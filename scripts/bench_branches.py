"""Time of a block of equal paths, decoded side by side, beside one stream of as many tokens.

The model has random weights. What the paths say is checked first, against one pass over the whole
text: a row whose check fails has no speed, and the exit code is 1.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from typing import Any

import numpy as np

import report
from cli import run
from hackle.zoo.errors import UserError

EXAMPLES = """examples:
  python scripts/bench_branches.py --model dense-tiny --prompt 32 --tokens 16
  python scripts/bench_branches.py --model qwen2.5-1.5b --paths 2 4 8 --report
"""

ROUNDS = 3
# By how much of the spread of the logits a chosen token may fall short of the best one of the
# pass over the whole text, whose products are rounded in another order.
SHORT = {"float32": 1e-3, "bfloat16": 0.3}
_COLON = 0  # token id: ends the index of a path


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a row: paths of a block, tokens of a path, tokens before the block."""

    paths: int
    tokens: int
    prompt: int

    @property
    def written(self) -> int:
        """Tokens of a path with its tag, its name and the end of that, which the decoder writes."""
        return self.tokens + 3

    @property
    def total(self) -> int:
        """New tokens."""
        return self.paths * self.written


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--model", default="qwen2.5-1.5b", help="a dense one, default %(default)s")
    add("--dtype", choices=SHORT, default="bfloat16", help="default %(default)s")
    add("--paths", type=int, nargs="+", default=[4], help="of a block, default 4")
    add("--tokens", type=int, default=256, help="of a path, default %(default)s")
    add("--prompt", type=int, default=512, help="tokens before the block, default %(default)s")
    add("--report", action="store_true", help="write reports/branches_<hardware>_<date>.md")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name, least in (("tokens", 1), ("prompt", 1), ("paths", 2)):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < least:
            raise UserError(f"--{name} {values}; expected at least {least}")
    import jax

    model, tags = made(args.model, args.dtype)
    sizes = [Size(paths, args.tokens, args.prompt) for paths in args.paths]
    for size in sizes:
        needed, most = len(block(tags, size)) + size.total, model.config.max_length
        if needed > most:
            raise UserError(
                f"--paths {size.paths}, --tokens {size.tokens} and --prompt {size.prompt} are "
                f"{needed} tokens; {args.model} has {most}"
            )
    rows = []
    for size in sizes:
        rows.append(dataclasses.asdict(size) | measured(model, tags, size, SHORT[args.dtype]))
        print(json.dumps(rows[-1]), flush=True)
    text = (
        f"`{args.model}` with random weights in {args.dtype}, one request. After a prompt of "
        f"{args.prompt} tokens and the goal of a block, every path has {args.tokens} tokens. Side "
        "by side: one step of the model writes a token of every path. The twin writes as many "
        "tokens after the same prompt, one after the other, as `generate` does. Milliseconds, "
        f"medians of {ROUNDS} rounds, prompt and host included, compilation not. `short`: by how "
        "much of the spread of the logits the worst choice falls short of the best one of a pass "
        "over the whole text."
    )
    page = [text, report.table([{k: v for k, v in row.items() if k != "failed"} for row in rows])]
    page += [f"{row['paths']} paths: FAILED, {row['failed']}" for row in rows if row["failed"]]
    print("\n\n".join(page))
    if args.report:
        path = report.write(
            "branches",
            jax.devices()[0].device_kind,
            title="Paths side by side",
            sections=page,
            record={"model": args.model, "dtype": args.dtype, "rows": rows},
        )
        print(f"report: {path}")
    return int(any(row["failed"] for row in rows))


def made(name: str, dtype: str) -> tuple[Any, Any]:
    """A model that never writes a tag, and tags at the end of its vocabulary.

    Raises:
      UserError: no such model, or one that cannot branch.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hackle import zoo
    from hackle.layers.causal_decoder import CausalDecoder
    from hackle.layers.multiverse import Tags

    def make():
        # With larger embeddings, a tied head of an untrained model repeats what it is given.
        model = zoo.create(name, rngs=nnx.Rngs(0), embedding_std=1e-3)
        if not isinstance(model, CausalDecoder):
            raise UserError(f"--model {name} has no cache for branches")
        # Their logits are 0, which is far from the largest of so many.
        size = model.config.vocab_size
        tagged = jnp.arange(size) >= size - count
        model.embedding.weight[...] = jnp.where(tagged[:, None], 0, model.embedding.weight[...])
        if model.head is not None:
            model.head.weight[...] = jnp.where(tagged, 0, model.head.weight[...])
        # Wild enough that what is seen decides what is said.
        gain = 1 / (0.02 * model.config.width**0.5)
        blocks = nnx.state(model.blocks)
        nnx.update(model.blocks, jax.tree.map(lambda x: gain * x if x.ndim > 2 else x, blocks))
        graph, state = nnx.split(model)
        return graph, jax.tree.map(lambda x: x.astype(dtype), state)

    count = len(Tags().tokens())
    model = nnx.merge(*nnx.jit(make)())
    return model, Tags.numbered(model.config.vocab_size - count)


def block(tags, size: Size) -> list[int]:
    """A prompt that ends where the paths begin, of random words; every path is called by one."""
    words = np.random.default_rng(0).integers(_COLON + 1, min(tags.tokens().values()), 10_000)
    outlines = [
        [tags.outline[0].open, int(word), _COLON, tags.outline[0].close]
        for word in words[: size.paths]
    ]
    start, end = [tags.parallel[0].open, tags.goal[0].open], tags.goal[0].close
    goal = [*start, *itertools.chain(*outlines), end]
    return [*map(int, np.resize(words[size.paths :], size.prompt)), *goal]


def measured(model, tags, size: Size, allowed: float) -> dict[str, Any]:
    """The numbers of one row."""
    from hackle.zoo.generate import generate, generate_branches
    from hackle.zoo.generate.draft import Fork

    prompt = block(tags, size)
    branching = functools.partial(
        generate_branches, model, prompt, max_new_tokens=size.total, max_branches=size.paths,
        index_end=[_COLON], tags=tags,
    )  # fmt: skip
    one_by_one = functools.partial(generate, model, [prompt], max_new_tokens=size.total)
    draft = branching()
    row: dict[str, Any] = {"steps": draft.steps, "new tokens": draft.total, "failed": ""}
    lengths = [len(x) for part in draft.parts if isinstance(part, Fork) for x in part.paths]
    if draft.finish != "length" or lengths != [size.written] * size.paths:
        return row | {"failed": f"{draft.finish} {draft.error or ''}, paths of {lengths} tokens"}
    row["short"] = short = shortfall(model, prompt, draft)
    if not short <= allowed:
        return row | {"failed": f"a choice falls short by {short:.2g}, allowed is {allowed:g}"}
    (twin,) = one_by_one()
    if len(twin) != size.total:
        return row | {"failed": f"the twin has {len(twin)} tokens, expected {size.total}"}
    row["side by side ms"] = milliseconds(branching)
    row["one by one ms"] = milliseconds(one_by_one)
    row["side by side / one by one"] = row["side by side ms"] / row["one by one ms"]
    return row


def milliseconds(call) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def shortfall(model, prompt: list[int], draft) -> float:
    """By how much the worst choice of a draft falls short of the best token of one pass over all,
    in standard deviations of the logits."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hackle.layers.multiverse import BranchStructure
    from hackle.zoo.generate.draft import walk

    before = np.arange(len(prompt))
    depth = 1
    found = draft.structure(depth)
    none = np.zeros((depth, len(prompt)), np.int32)
    structure = BranchStructure(
        np.concatenate([none, found.block], axis=1)[None],
        np.concatenate([none, found.path], axis=1)[None],
        np.concatenate([before, found.position])[None],
    )
    tokens = np.concatenate([prompt, draft.tokens])[None]
    # A choice follows the token before it in its path.
    at, last = [], len(prompt) - 1
    chosen = [one.chosen for one in walk(draft.parts)]
    for index, one in enumerate(chosen):
        if one:
            at.append(last)
        last = len(prompt) + index
    choices = np.asarray(draft.tokens)[chosen]

    @nnx.jit
    def worst(model, tokens, structure, at, choices):
        features = model.features(tokens, branches=structure)[0, at]

        def one(pair):
            logits = model.logits(pair[0])
            return (jnp.max(logits) - logits[pair[1]]) / jnp.std(logits)

        return jnp.max(jax.lax.map(one, (features, choices), batch_size=64))

    return float(worst(model, tokens, structure, np.asarray(at), choices))


if __name__ == "__main__":
    run(main)
