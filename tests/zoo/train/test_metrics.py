"""FLOPs against independent counts, MFU, metrics files and the plot."""

import importlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo import registry
from hackle.zoo.train.events import EventWriter
from hackle.zoo.train.metrics import (
    forward_flops_per_token,
    mfu,
    peak_flops,
    train_flops_per_token,
)
from hackle.zoo.train.report import MetricsLog, Progress, plot_losses, read_metrics
from tests.zoo.train.small import SIZES


def test_matrix_products_are_two_flops_a_weight():
    for name in ("parscale-1.8b-p1", "qwen2.5-7b"):
        config = registry.entry(name).config
        model = nnx.eval_shape(lambda: zoo.create(name, rngs=nnx.Rngs(0)))  # noqa: B023
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        matrices = sum(
            value.size for path, value in state if path[-1] == "weight" and path[0] != "embedding"
        )
        parts = forward_flops_per_token(config, 2048)
        tied = config.vocab_size * config.width if config.tie_embeddings else 0
        assert parts["trunk"] + parts["head"] == 2 * (matrices + tied)


def test_streams_multiply_the_trunk_and_not_the_head():
    one, four = (
        forward_flops_per_token(registry.entry(f"parscale-0.9b-p{p}").config, 1024) for p in (1, 4)
    )
    assert four["trunk"] == 4 * one["trunk"]
    assert four["head"] == one["head"]
    # Each query sees 512.5 tokens on average, and with streams 48 prefix rows.
    assert four["attention"] / one["attention"] == pytest.approx(4 * (512.5 + 48) / 512.5)
    assert one["aggregator"] == 0
    assert four["aggregator"] == 2 * (4 * 1024**2 + 2 * 4 * 1024)


def test_the_count_is_what_xla_counts_for_a_forward_pass():
    length, prefix = 32, 8
    # XLA counts the body of a loop once, so there is one layer here.
    sizes = {**SIZES, "depth": 1, "prefix_length": prefix}
    graph, state = nnx.split(zoo.create("parscale-tiny-p2", rngs=nnx.Rngs(0), **sizes))
    tokens = jnp.zeros((1, length), jnp.int32)
    compiled = jax.jit(lambda s, t: nnx.merge(graph, s)(t)).lower(state, tokens).compile()
    parts = forward_flops_per_token(nnx.merge(graph, state).config, length)
    # XLA multiplies every query with every key, also those that the mask hides.
    parts["attention"] *= (length + prefix) / ((length + 1) / 2 + prefix)
    expected = length * sum(parts.values())
    # It also counts norms, rotary, softmax and masks: a few percent.
    assert expected < compiled.cost_analysis()["flops"] < 1.25 * expected


def test_training_is_three_forward_passes_and_less_with_a_frozen_trunk():
    config = registry.entry("parscale-1.8b-p4").config
    forward = sum(forward_flops_per_token(config, 2048).values())
    assert train_flops_per_token(config, 2048) == 3 * forward
    frozen = train_flops_per_token(config, 2048, frozen_trunk=True)
    assert 2 * forward < frozen < 3 * forward


def test_no_peak_no_mfu():
    assert peak_flops(jax.devices("cpu")) is None
    assert mfu(1000.0, 1e9, None) is None
    assert mfu(1000.0, 1e9, 4e12) == 0.25


def test_tensorboard_reads_the_events(tmp_path):
    writer = EventWriter(tmp_path)
    for step in range(300):
        writer.scalars(step, {"loss": step / 7, "lr": 1e-30})
    writer.close()
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(writer.path))
    events.Reload()
    found = events.Scalars("loss")
    assert [event.step for event in found] == list(range(300))
    np.testing.assert_allclose([event.value for event in found], np.arange(300) / 7, rtol=1e-6)
    assert events.Scalars("lr")[0].value == pytest.approx(1e-30)


def test_going_on_removes_the_lines_that_are_made_again(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(step, {"loss": float(step), "mfu": None})
    log.close()
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # the process died here
    log = MetricsLog(tmp_path, 3)
    log.write(4, {"loss": float("nan")})
    log.close()
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[0] == {"step": 1, "loss": 1.0}
    assert entries[-1]["loss"] is None
    for line in log.path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_the_plot_is_a_png(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 4):
        log.write(step, {"tokens": step * 10, "loss": 5.0 / step})
    log.write(3, {"tokens": 30, "validation_loss": 2.0})
    log.close()
    path = plot_losses({"a": tmp_path, "empty": tmp_path / "none"}, tmp_path / "x.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_a_terminal_progress_is_a_line_now_and_then():
    stream = io.StringIO()
    progress = Progress(0, 3, stream, every=3600)
    for step in (1, 2, 3):
        progress.update(step, "loss 1.0")
    progress.close()
    assert stream.getvalue() == "step 3/3  loss 1.0  0:00 left\n"
