"""Training speed: tokens/s and MFU of whole steps, each model's loss checked first.

Batches are random tokens in full rows (one document a row), already on the device: this measures
the step. What the input costs is measured in training runs and by scripts/bench_input.py.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from typing import Any

import report
from cli import run

EXAMPLES = """examples:
  python scripts/bench_train.py --preset cpu1 --case parscale-tiny-p4,batch=4,length=128
  python scripts/bench_train.py --preset cpu1 --case pararnn-tiny-gru,batch=4,length=128
  python scripts/bench_train.py --preset h100x1 --attention cudnn --report \\
      --case parscale-0.9b-p1,batch=8,length=2048,remat=dots \\
      --case parscale-0.9b-p4,batch=4,length=2048,remat=full
"""

# What the check computes by, in float32: whichever of these a family has.
REFERENCE = {"attention": "xla", "recurrence": "scan"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    batch: int = 8
    length: int = 2048
    remat: str = "dots"
    accumulate: int = 1


def case(text: str) -> Case:
    """`model,field=value,...`"""
    from hackle.zoo.errors import UserError

    model, *fields = text.split(",")
    types = {field.name: field.type for field in dataclasses.fields(Case)}
    values: dict[str, Any] = {}
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals or name not in types or name == "model":
            raise UserError(f"--case field {field!r}; expected {', '.join(list(types)[1:])}=VALUE")
        try:
            values[name] = types[name](value)
        except ValueError:
            raise UserError(f"--case {name}={value!r} is not a number") from None
    return Case(model, **values)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--case", action="append", required=True, help="model,batch=,length=,remat=,accumulate="
    )
    p.add_argument("--preset", default="any_data", help="default %(default)s")
    p.add_argument(
        "--attention", help="implementation; default: the fastest that fits; not for recurrences"
    )
    p.add_argument("--steps", type=int, default=10, help="timed steps, default %(default)s")
    p.add_argument("--report", action="store_true", help="write reports/train_<hardware>_<date>.md")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    import jax

    from hackle import pjit_configs
    from hackle.zoo.errors import UserError

    if args.steps < 1:
        raise UserError(f"--steps must be >= 1, got {args.steps}")
    cases = [case(text) for text in args.case]
    preset = pjit_configs.preset(args.preset)
    mesh = preset.mesh()
    device = jax.devices()[0].device_kind
    for c in cases:  # what is wrong with any of them is said before the first one runs
        try:
            step = program(c, preset, mesh, attention=args.attention)[1]
            if args.attention is not None:
                step.trace_step()
        except NotImplementedError as error:
            raise UserError(f"--attention {args.attention}: {c.model}: {error}") from error
    rows = []
    for c in cases:
        error = gate(c, preset, mesh, args.attention)
        print(f"{c.model}: loss differs from the reference by {error:.1e}", flush=True)
        rows.append(
            measure(c, preset, mesh, args.attention, args.steps) | {"check": f"{error:.0e}"}
        )
        print(json.dumps(rows[-1]), flush=True)
    print(report.table(rows))
    if args.report:
        text = (
            f"Preset `{preset.name}`, attention `{args.attention or 'chosen'}`, parameters "
            f"{preset.precision.params}, compute {preset.precision.compute}, AdamW. Medians of "
            f"{args.steps} steps after two. MFU: model FLOPs (causal attention counted as half, "
            "nothing recomputed and no step of a recurrence counted; ParScale: P times the trunk) "
            "over the chip's dense bf16 peak. `check`: relative difference of the loss of a "
            "two-layer model of the same widths from the same parameters computed in float32, by "
            "the plain XLA attention or a recurrence step after step."
        )
        path = report.write(
            "train",
            device,
            title="Training speed",
            sections=[text, report.table(rows)],
            record={"preset": preset.name, "attention": args.attention, "rows": rows},
        )
        print(f"report: {path}")
    return 0


def program(c: Case, preset, mesh, *, shallow: bool = False, **how: str | None):
    """The step of `c` and its model's config.

    Args:
      shallow: two layers and a small vocabulary, for the check.
      how: the model runs, as in `registry.run_as`.

    Raises:
      UserError: the case does not fit the model or the mesh, or `how` is not for its family.
    """
    from flax import nnx

    from hackle.zoo import registry
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.optimizer import AdamW, schedule
    from hackle.zoo.train.step import Program

    entry = registry.entry(c.model)
    try:
        config = registry.run_as(entry.config, remat=c.remat, **how)
    except UserError as error:
        raise UserError(f"{c.model}: {error}") from None
    if shallow:
        config = dataclasses.replace(config, depth=2, vocab_size=1024)
    limit = getattr(config, "max_length", math.inf)  # a recurrence has none
    if c.length > limit:
        raise UserError(f"{c.model}: length {c.length} exceeds the rotary range {limit}")

    def make(rngs: nnx.Rngs) -> nnx.Module:
        try:
            return entry.model_class(config, rngs=rngs)
        except ValueError as error:
            raise UserError(f"{c.model}: {error}") from error

    return config, Program(
        make,
        preset=preset,
        mesh=mesh,
        optimizer=AdamW(),
        learning_rate=schedule("constant", 1e-4, steps=1),
        batch=c.batch,
        length=c.length,
        vocab_size=config.vocab_size,
        accumulate=c.accumulate,
        max_logits=2**29 if mesh.devices.flat[0].platform == "gpu" else 2**27,
    )


def random_batch(c: Case, vocab_size: int, sharding) -> dict[str, Any]:
    import jax
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, vocab_size, (c.batch, c.length), np.int32)
    return {"tokens": jax.device_put(tokens, sharding)}


def gate(c: Case, preset, mesh, attention: str | None) -> float:
    """Relative difference of the loss from that in float32; raises when it is not small."""
    import jax
    import numpy as np

    from hackle.zoo import registry

    small = dataclasses.replace(c, accumulate=1)
    own = registry.entry(c.model).config
    reference = {name: value for name, value in REFERENCE.items() if hasattr(own, name)}
    # Of the same parameters, so these stay in their dtype.
    exact = preset.replace(precision=dataclasses.replace(preset.precision, compute="float32"))

    def loss(preset, **how: str | None) -> float:
        config, step = program(small, preset, mesh, shallow=True, **how)
        batch = random_batch(small, config.vocab_size, step.batch_sharding)
        sums = step.evaluate(step.init(0), batch)
        return float(sums.nll) / float(sums.targets)

    losses = [loss(preset, attention=attention)]
    # Else chips round the factors of a float32 product to fewer bits.
    with jax.default_matmul_precision("highest"):
        losses.append(loss(exact, **reference))
    error = abs(losses[0] - losses[1]) / losses[1]
    if not np.isfinite(error) or error > 2e-3:
        raise SystemExit(
            f"{c.model}: loss {losses[0]} but the reference says {losses[1]}: no timing"
        )
    return error


def measure(c: Case, preset, mesh, attention: str | None, steps: int) -> dict[str, Any]:
    import jax

    from hackle.zoo.train.metrics import mfu, peak_flops, train_flops_per_token

    config, step = program(c, preset, mesh, attention=attention)
    row: dict[str, Any] = dataclasses.asdict(c)
    try:
        state = step.init(0)
        batch = random_batch(c, config.vocab_size, step.batch_sharding)
        start = time.perf_counter()
        for _ in range(2):
            state, metrics = step.step(state, batch)
            jax.block_until_ready(metrics)
        warm = time.perf_counter() - start
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = step.step(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        empty = dict.fromkeys(
            ("first steps s", "ms/step", "tokens/s", "TFLOP/s", "MFU %", "peak GiB so far")
        )
        return row | empty | {"ms/step": "out of memory"}
    seconds = statistics.median(times)
    speed = c.batch * c.length / seconds
    flops = train_flops_per_token(config, c.length)
    share = mfu(speed, flops, peak_flops(list(mesh.devices.flat)))
    stats = mesh.devices.flat[0].memory_stats() or {}
    used = stats.get("peak_bytes_in_use")
    return row | {
        "first steps s": round(warm, 1),
        "ms/step": round(1000 * seconds, 1),
        "tokens/s": round(speed),
        "TFLOP/s": round(speed * flops / 1e12, 1),
        "MFU %": None if share is None else round(100 * share, 1),
        "peak GiB so far": None if used is None else round(used / 2**30, 1),
    }


if __name__ == "__main__":
    run(main)
