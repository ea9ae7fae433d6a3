"""Looks into, rewrites and converts model folders; everything runs on the CPU."""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli import run

EXAMPLES = """examples:
  python scripts/convert.py inspect folder/of/ParScale-1.8B-P4
  python scripts/convert.py inspect ParScale/ParScale-4.7B-P8-Pile
  python scripts/convert.py copy folder/of/ParScale-1.8B-P1 out/qwen2 --to dense --dtype bfloat16
  python scripts/convert.py retrofit folder/of/Qwen2.5-3B out/p4 --streams 4 --seed 0
  python scripts/convert.py add-tags folder/of/Qwen2.5-7B-Instruct out/multiverse-7b
  python scripts/convert.py copy folder/of/Multiverse-32B out/multiverse --to multiverse
  python scripts/convert.py export runs/demo/p4 out/p4 --step 200
  python scripts/convert.py import folder/of/ParScale-1.8B-P1 runs/released-p1

A published folder holds config.json and safetensors files, as transformers reads and writes them.
"""

# What lies beside the weights and concerns text, not the model.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    inspect = command("inspect", "print what a published folder, or a model of the registry, is")
    inspect.add_argument("model", help="published folder, or a name")

    copy = command("copy", "rewrite a published folder: other dtype, shards or family")
    copy.add_argument("source", type=Path, help="published folder")
    copy.add_argument(
        "--to",
        choices=["dense", "parscale", "multiverse"],
        help="family: one-stream ParScale or Multiverse as the dense model that it is, Qwen2 as "
        "one-stream ParScale, or a dense model that was trained with tags as Multiverse",
    )

    retrofit = command("retrofit", "give a one-stream model new, untrained streams")
    retrofit.add_argument("source", type=Path, help="published folder, Qwen2 or ParScale P=1")
    retrofit.add_argument("--streams", type=int, required=True, help="P, at least 2")
    retrofit.add_argument("--prefix-length", type=int, default=48, help="default %(default)s")
    retrofit.add_argument("--smoothing", type=float, default=0.1, help="default %(default)s")
    retrofit.add_argument("--seed", type=int, default=0, help="default %(default)s")

    add_tags = command(
        "add-tags", "make a dense model and its tokenizer a Multiverse model to be fine-tuned"
    )
    add_tags.add_argument("source", type=Path, help="published folder, with a tokenizer.json")

    export = command("export", "write a checkpoint of a training run as a published folder")
    export.add_argument("source", type=Path, help="run folder of scripts/train.py")
    export.add_argument("--step", type=int, help="of the checkpoint; default: the last")

    for sub in (copy, retrofit, add_tags, export):
        sub.add_argument("out", type=Path, help="new published folder")
        sub.add_argument(
            "--dtype",
            choices=["float32", "bfloat16", "float16"],
            default="float32",
            help="of the stored tensors; default %(default)s, as in the released files",
        )
        sub.add_argument(
            "--max-shard-gb", type=float, default=5.0, help="size of a file; default %(default)s"
        )
        sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
        sub.add_argument(
            "--tokenizer", type=Path, help="folder to take tokenizer files from; default: SOURCE"
        )

    imports = command("import", "make a published folder the start of training runs")
    imports.add_argument("source", type=Path, help="published folder")
    imports.add_argument("out", type=Path, help="new run folder, for start_from of a recipe")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    import jax

    # The weights pass through host memory; an accelerator has nothing to do here.
    jax.config.update("jax_platforms", "cpu")
    commands = {
        "inspect": inspect,
        "copy": copy,
        "retrofit": retrofit,
        "add-tags": add_tags,
        "export": export,
        "import": import_,
    }
    commands[args.command](args)
    return 0


def inspect(args: argparse.Namespace) -> None:
    from hackle.zoo import UserError, registry
    from hackle.zoo.data import load_tokenizer
    from hackle.zoo.weights.folder import open_checkpoint, published_shapes

    folder = Path(args.model)
    if not folder.is_dir():
        try:
            entry = registry.entry(args.model)
        except UserError as error:
            raise UserError(f"{args.model} is no folder, and no name: {error}") from None
        family = registry.FAMILIES[entry.family]
        tensors = len(published_shapes(family, entry.config))
        describe({"model": entry.name}, family, entry.config, {"tensors": f"{tensors}, not here"})
        return
    found = open_checkpoint(folder)
    files = {info.file for info in found.tensors.values()}
    dtypes = ", ".join(f"{count} {code}" for code, count in found.dtypes.items())
    rest = {
        "tensors": f"{len(found.tensors)} ({dtypes})",
        "bytes": f"{found.bytes:,} in {len(files)} file{'s' * (len(files) > 1)}",
    }
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, found.config.vocab_size)
        rest["tokenizer"] = f"{tokenizer.vocab_size:,} entries"
    describe({"folder": str(folder)}, found.family, found.config, rest)


def describe(first: dict[str, str], family: Any, config: Any, rest: dict[str, str]) -> None:
    from hackle.zoo import registry

    same = [
        name
        for name in registry.list_models()
        if registry.entry(name).config == registry.run_as(config, **registry.EXECUTION)
    ]
    inner, total = config.parameter_count(embedding=False), config.parameter_count()
    lines = {
        **first,
        "family": f"{family.name} (model_type {family.params.write_config(config)['model_type']})",
        "size of": ", ".join(same) or "no model of the registry",
        "parameters": f"{total:,}, {inner:,} without embedding",
        **rest,
    }
    for name, text in lines.items():
        print(f"{name:<12}{text}")
    for field in dataclasses.fields(config):
        print(f"  {field.name:<16}{getattr(config, field.name)}")


def copy(args: argparse.Namespace) -> None:
    from flax import nnx

    from hackle import zoo
    from hackle.layers.causal_decoder import CausalDecoder
    from hackle.zoo import multiverse, parscale
    from hackle.zoo.multiverse.params import as_dense as without_tags
    from hackle.zoo.parscale.params import as_dense as one_stream

    check_out(args)
    model = zoo.from_pretrained(args.source)
    if args.to is not None and not isinstance(model, CausalDecoder):
        raise zoo.UserError(f"--to {args.to}: {type(model).__name__} is no transformer")
    with user_errors():
        if args.to == "dense" and isinstance(model, parscale.ParScaleLM):
            model = one_stream(model)
        elif args.to == "dense" and isinstance(model, multiverse.MultiverseLM):
            model = without_tags(model)
        elif args.to == "parscale" and not isinstance(model, parscale.ParScaleLM):
            model = parscale.retrofit(model, 1, rngs=nnx.Rngs(0))
        elif args.to == "multiverse" and not isinstance(model, multiverse.MultiverseLM):
            model = multiverse.as_multiverse(model, tags_of(args.tokenizer or args.source))
    save(model, args, args.source)


def tags_of(folder: Path) -> Any:
    """The published tags: at the ids of the folder's tokenizer, or of the published one."""
    from hackle.layers.multiverse import Tags
    from hackle.zoo.data import load_tokenizer

    if not (folder / "tokenizer.json").exists():
        return Tags()
    return Tags().located(load_tokenizer(folder).backend.token_to_id)


def retrofit(args: argparse.Namespace) -> None:
    from flax import nnx

    from hackle import zoo
    from hackle.zoo import parscale

    if args.streams < 2:
        raise zoo.UserError(f"--streams {args.streams}; expected at least 2")
    if args.prefix_length < 1:
        raise zoo.UserError(f"--prefix-length {args.prefix_length}; expected at least 1")
    if args.seed < 0:
        raise zoo.UserError(f"--seed {args.seed}; expected at least 0")
    check_out(args)
    trunk = zoo.from_pretrained(args.source)
    with user_errors():
        model = parscale.retrofit(
            trunk,
            args.streams,
            prefix_length=args.prefix_length,
            smoothing=args.smoothing,
            rngs=nnx.Rngs(args.seed),
        )
    save(model, args, args.source)


def add_tags(args: argparse.Namespace) -> None:
    from hackle import zoo
    from hackle.layers.multiverse import Tags
    from hackle.zoo.data import extend_tokenizer, load_tokenizer
    from hackle.zoo.multiverse import add_tags

    check_out(args)
    plain = load_tokenizer(args.tokenizer or args.source)
    trunk = zoo.from_pretrained(args.source)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = extend_tokenizer(plain, Tags().tokens(), Path(folder) / "tokenizer.json")
        with user_errors():
            tags = Tags().located(tokenizer.backend.token_to_id)
            model = add_tags(trunk, tokenizer, tags)
        save(model, args, args.source, tokenizer.path)
    print(*(f"{token} {text}" for text, token in tags.tokens().items()), sep=", ")


def export(args: argparse.Namespace) -> None:
    from hackle.zoo.train.checkpoint import load_model

    check_out(args)
    model = load_model(args.source, step=args.step)
    published = args.source / "model"  # what a finished run wrote, its tokenizer beside it
    save(model, args, published if published.is_dir() else args.source)


def import_(args: argparse.Namespace) -> None:
    from hackle import zoo
    from hackle.zoo.train.imported import write_run

    model = zoo.from_pretrained(args.source)
    write_run(args.out, model, source=args.source)
    print(f"wrote {args.out}; give it to a recipe as start_from, with continue_data=false")


def save(
    model: Any, args: argparse.Namespace, text_from: Path, tokenizer: Path | None = None
) -> None:
    """Writes the model, then the files that concern text; `tokenizer` is one to use instead."""
    from hackle import zoo
    from hackle.zoo.data import load_tokenizer
    from hackle.zoo.weights.folder import read_json

    text_from = args.tokenizer or text_from
    tokenizer = tokenizer or text_from / "tokenizer.json"
    if tokenizer.exists():
        check_vocabulary(load_tokenizer(tokenizer), model.config.vocab_size)
    copied = [name for name in TEXT_FILES if (text_from / name).is_file()]
    extra = {}
    if (text_from / "config.json").is_file():
        fields = read_json(text_from / "config.json")
        extra = {key: fields[key] for key in TOKEN_FIELDS if key in fields}
    zoo.save_pretrained(
        model,
        args.out,
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        overwrite=args.overwrite,
        extra=extra,
        files=[tokenizer if name == tokenizer.name else text_from / name for name in copied],
    )
    print(f"wrote {args.out}: {model.config.parameter_count():,} parameters, {args.dtype}")
    if copied:
        print(f"copied {', '.join(copied)} from {text_from}")


def check_out(args: argparse.Namespace) -> None:
    """Refuses before any work what `save` would refuse after it."""
    from hackle.zoo.errors import UserError
    from hackle.zoo.weights.save import check_target

    if args.max_shard_gb * 1e9 < 1:
        raise UserError(f"--max-shard-gb {args.max_shard_gb}; expected a positive size")
    if args.tokenizer is not None and not (args.tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {args.tokenizer} holds no tokenizer.json")
    check_target(args.out, args.overwrite)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    from hackle.zoo.errors import UserError

    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} entries, the model's table "
            f"{vocab_size}"
        )


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A ValueError inside becomes a UserError: here the person chose the values."""
    from hackle.zoo.errors import UserError

    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    run(main)
