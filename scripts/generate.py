"""Continues text with a trained model, token by token, in the terminal."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import run

if TYPE_CHECKING:
    from hackle.zoo.data.tokenizer import Tokenizer
    from hackle.zoo.generate import Sampling

EXAMPLES = """examples:
  python scripts/generate.py runs/demo/p4 --prompt "def read_lines(path):"
  python scripts/generate.py folder/of/ParScale-1.8B-P4 --prompt "import os" --dtype bfloat16
  python scripts/generate.py runs/demo/p4 --prompt "class A:" --prompt "def f(" \\
      --temperature 0.8 --top-p 0.95 --seed 1 --max-new-tokens 200
  python scripts/generate.py folder/of/Multiverse-32B --branches --prompt-file question.txt \\
      --dtype bfloat16 --max-new-tokens 8000
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("model", type=Path, help="published folder, or a finished run folder of scripts/train.py")
    add("--prompt", action="append", help="text to continue; may be given repeatedly")
    add("--prompt-file", type=Path, help="a file with one prompt")
    add("--max-new-tokens", type=int, default=100, help="default %(default)s")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-k", type=int, help="keep the k likeliest tokens")
    add("--top-p", type=float, help="keep the likeliest tokens of this total probability")
    add("--min-p", type=float, help="keep tokens at least this likely, relative to the likeliest")
    add("--seed", type=int, default=0, help="default %(default)s")
    add(
        "--stop",
        action="append",
        help="token that ends a text, as text; may be given repeatedly; default: the model's own",
    )
    add(
        "--branches",
        action="store_true",
        help="let a model with Multiverse's tags write paths side by side; draws them as columns",
    )
    add("--tokenizer", type=Path, help="tokenizer.json, where the model's folder has none")
    add("--preset", help="mesh preset to spread the model over; default: one device")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of weights and cache; default: the preset's, or as stored",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from hackle import zoo
    from hackle.zoo.data import load_tokenizer
    from hackle.zoo.generate import Sampling, stream
    from hackle.zoo.generate.text import TextStream, stop_tokens
    from hackle.zoo.weights.folder import published, read_config

    prompts = read_prompts(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    folder = published(args.model)
    read_config(folder)  # what is no model is told before a tokenizer that is not there
    tokenizer = load_tokenizer(args.tokenizer or folder)
    preset = None
    if args.preset is not None:
        from hackle import pjit_configs

        preset = pjit_configs.preset(args.preset)
    dtype = args.dtype or (None if preset is None else preset.precision.compute)
    stops = stop_tokens(tokenizer, folder, args.stop)
    model = zoo.from_pretrained(folder, mesh=preset, dtype=dtype)
    if args.branches:
        for prompt in prompts:
            draw(args, model, tokenizer, prompt, sampling, stops)
        return 0
    if getattr(model.config, "tags", None) is not None:
        print("note: this model writes paths; --branches lets it, side by side", file=sys.stderr)
    steps = stream(
        model,
        [tokenizer.encode(prompt, special=True) for prompt in prompts],
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
        eos=stops,
    )
    texts = [TextStream(tokenizer) for _ in prompts]
    if len(prompts) == 1:  # as it comes
        print(prompts[0], end="", flush=True)
        for (token,) in steps:
            print(texts[0].push(token), end="", flush=True)
        print(texts[0].finish())
        return 0
    for step in steps:
        for text, token in zip(texts, step, strict=True):
            if token is not None:
                text.push(token)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        text.finish()
        print(f"--- {row}\n{prompt}{text.shown}")
    return 0


def draw(
    args: argparse.Namespace,
    model: Any,
    tokenizer: "Tokenizer",
    prompt: str,
    sampling: "Sampling",
    stops: frozenset[int],
) -> None:
    """Continues one prompt, with the paths of its blocks side by side."""
    from hackle.layers.multiverse import Tags
    from hackle.zoo.errors import UserError
    from hackle.zoo.generate import Limits, stream_branches
    from hackle.zoo.generate.columns import Screen, columns

    colon = tokenizer.encode(":")
    if len(colon) != 1:
        raise UserError(f"':' is {len(colon)} tokens; expected one, which ends an index")
    try:
        tags = getattr(model.config, "tags", None)
        tags = tags or Tags().located(tokenizer.backend.token_to_id)
    except ValueError as error:
        raise UserError(f"--branches: {error}") from error
    drafts = stream_branches(
        model,
        tokenizer.encode(prompt, special=True),
        limits=Limits(args.max_new_tokens),
        index_end=colon,
        tags=tags,
        sampling=sampling,
        seed=args.seed,
        eos=stops,
    )
    size = shutil.get_terminal_size()
    screen = Screen(sys.stdout, size.lines)

    def text(tokens: list[int]) -> str:
        # A model can have more rows than there are tokens; they have no text.
        known = [token for token in tokens if token < tokenizer.vocab_size]
        return tokenizer.decode(known, skip_special=True)

    print(prompt)
    for draft in drafts:
        lines = columns(draft.parts, text, size.columns)
        screen.update(lines, last=draft.finish is not None)
    why = draft.error or (draft.limit and f"limit of {draft.limit}")
    print(
        f"--- {draft.total} tokens, {draft.critical_path} of them one after the other, "
        f"{draft.forks} blocks; ended: {draft.finish}" + f" ({why})" * bool(why)
    )


def read_prompts(args: argparse.Namespace) -> list[str]:
    from hackle.zoo.errors import UserError

    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        try:
            prompts.append(args.prompt_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt file {args.prompt_file}: {error}") from None
    if not prompts:
        raise UserError("there is no prompt; give --prompt or --prompt-file")
    return prompts


if __name__ == "__main__":
    run(main)
