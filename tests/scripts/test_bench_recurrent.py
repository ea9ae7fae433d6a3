"""scripts/bench_recurrent.py: float64 recurrences against torch, a speed only after its check."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.scripts.running import load

EVERYWHERE = "CompositeExplicitAutograd"  # of torch: whatever the device
SIZES = "--shapes 2x16 --lengths 12 --layers 2x16x12 --scan 2x16x12"
TINY = f"{SIZES} --cells gru --dtypes bfloat16 --methods shooting scan".split()


@pytest.fixture(scope="module")
def script():
    return load("bench_recurrent")


@pytest.fixture(scope="module")
def rows(script):
    import recurrent_rows

    return recurrent_rows


@pytest.fixture(autouse=True)
def quick(script, rows, tmp_path, monkeypatch):
    import clock
    import report

    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.75")  # the script would leave its own
    monkeypatch.setattr(clock, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(clock, "ROUNDS", 1)
    write = report.write
    monkeypatch.setattr(report, "write", lambda *a, **k: write(*a, **k, folder=tmp_path))


def rows_in(output):
    """The JSON lines of the rows."""
    return [json.loads(x) for x in output.splitlines() if x.startswith('{"section"')]


# --- an oracle: torch in float64, with autograd --------------------------------------------------


def torch_step(cell, u, w, state):
    """`u` [B,3,D]; the state arrays `[B,D]` after one step."""
    if cell == "gru":
        (h,) = state
        z, r = torch.sigmoid(w[0] * h + u[:, 0]), torch.sigmoid(w[1] * h + u[:, 1])
        return (torch.lerp(h, torch.tanh(w[2] * h * r + u[:, 2]), z),)
    c, h = state
    f = torch.sigmoid(w[0] * h + u[:, 0] + w[3] * c)
    c = torch.lerp(torch.tanh(w[2] * h + u[:, 2]), c, f)
    return c, torch.sigmoid(w[1] * h + u[:, 1] + w[4] * c) * torch.tanh(c)


def torch_states(cell, u, w, state, nudges=None):
    """States of all times `[B,T,D]`; `nudges` (zeros) are added to each, to differentiate by."""
    steps = []
    for t in range(u.shape[1]):
        state = torch_step(cell, u[:, t], w, state)
        if nudges is not None:
            state = tuple(s + n[:, t] for s, n in zip(state, nudges, strict=True))
        steps.append(state)
    return tuple(torch.stack(x, dim=1) for x in zip(*steps, strict=True))


@pytest.mark.parametrize(("cell", "states", "weights"), [("gru", 1, 3), ("lstm", 2, 5)])
def test_the_float64_recurrence_is_torchs(script, cell, states, weights):
    import recurrent_reference as reference

    torch.manual_seed(0)
    double = dict(dtype=torch.float64, requires_grad=True)
    u, w = torch.randn(2, 9, 3, 5, **double), torch.randn(weights, 5, **double)
    first = tuple(torch.randn(2, 5, **double) for _ in range(states))
    nudges = tuple(torch.zeros(2, 9, 5, **double) for _ in range(states))
    g, g_final = torch.randn(2, 9, 5).double(), torch.randn(states, 2, 5).double()
    out = torch_states(cell, u, w, first, nudges)
    last = sum((x[:, -1] * y).sum() for x, y in zip(out, g_final, strict=True))
    want = torch.autograd.grad((out[-1] * g).sum() + last, (*nudges, u, w, *first))

    inputs = [x.detach().numpy() for x in (u, w)]
    first = tuple(x.detach().numpy() for x in first)
    got = reference.solve(cell, *inputs, first)
    np.testing.assert_allclose(np.stack(got), torch.stack(out).detach().numpy(), atol=1e-13)
    adjoint, du, dw, dfirst = reference.gradients(
        cell, *inputs, first, got, g.numpy(), tuple(g_final.numpy())
    )
    for a, b in zip((*adjoint, du, dw, *dfirst), want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-12)


# --- the command ---------------------------------------------------------------------------------


def test_tables_report_and_json(script, tmp_path, capsys):
    assert script.main([*TINY, "--report", "tiny"]) == 0
    lines = rows_in(capsys.readouterr().out)
    assert [(x["section"], x["method"]) for x in lines] == [
        ("layers", "shooting"),
        ("scan", "shooting"),
        ("scan", "scan"),
        ("table", "shooting"),
        ("table", "scan"),
    ]
    for row in lines:
        assert row["forward ms"] > 0 and not row["failed"] and not row["skipped"]
        assert ("both ms" in row) == (row["section"] != "scan")
        assert row["section"] != "table" or 1e-4 < row["gradient error"] < 1e-2
    (page,) = tmp_path.glob("recurrent-tiny_cpu_*.md")
    text = page.read_text()
    assert "| gru | 2 | 16 | 12 | bfloat16 | shooting |" in text and "x scan" in text
    assert json.loads(text.split("```json\n")[1].split("\n```")[0])["left out"] == 0


OVER = "--shapes --layers --scan --methods shooting --cells lstm --devices".split()


@pytest.mark.devices(8)
def test_time_over_all_devices(script, capsys):
    assert script.main([*OVER, "1x16x64"]) == 0
    out = capsys.readouterr().out
    (row,) = rows_in(out)
    assert row["error"] < 1e-6 and row["gradient error"] < 1e-6 and row["devices"] == 8
    assert row["both speedup"] > 0 and "| lstm | 1 | 16 | 64 | float32 | shooting | 8 |" in out


@pytest.mark.devices(8)
def test_no_speed_where_time_is_not_split(script, monkeypatch, capsys):
    import recurrent_devices

    monkeypatch.setattr(
        recurrent_devices, "mesh", lambda count, mesh=recurrent_devices.mesh: mesh(1)
    )
    assert script.main([*OVER, "1x16x64"]) == 1
    (row,) = rows_in(capsys.readouterr().out)
    assert "h lies on 1 devices, expected 8" in row["failed"] and "both speedup" not in row
    assert not [name for name in row if name.endswith(" ms")]


@pytest.mark.parametrize("wrong", ["state", "gradient"])
def test_no_speed_for_a_row_that_is_wrong(script, rows, monkeypatch, capsys, wrong):
    import jax

    right = rows.recurrence

    def off(case, u, weights, state):
        if wrong == "state":
            h, final = right(case, u, weights, state)
            return h.at[:, -1].add(1e-4), final
        scale = 1 + 1e-2 * (u - jax.lax.stop_gradient(u))
        return right(case, u * scale, weights, state)

    monkeypatch.setattr(rows, "recurrence", off)
    options = "--shapes 2x16 --lengths 12 --cells gru --dtypes float32 --layers --scan"
    assert script.main(options.split()) == 1
    out = capsys.readouterr().out
    (row,) = rows_in(out)
    assert "is off by" in row["failed"] and "both ms" not in row
    assert ("forward ms" in row) == (wrong == "gradient")
    assert "FAILED" in out


def test_rows_left_out_for_want_of_time_are_counted(script, capsys):
    assert script.main([*TINY, "--seconds", "-1"]) == 0
    assert "5 rows not started" in capsys.readouterr().out


def test_what_does_not_fit_is_skipped_with_its_size(script, rows, monkeypatch, capsys):
    import jax

    small = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7000}, device_kind="cpu")
    monkeypatch.setattr(jax, "devices", lambda: [small])
    options = "--shapes 2x16 --lengths 12 --cells gru --dtypes float32 --layers --scan"
    assert script.main(options.split()) == 0
    (row,) = rows_in(capsys.readouterr().out)
    assert row["skipped"].startswith("backward needs 0.0 GiB") and row["forward ms"] > 0
    assert "both ms" not in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods best", "--methods 'best' is unknown; expected some of auto, scan"),
        ("--lengths 0", "--lengths 0 is too small"),
        ("--devices 1x16x60", "--devices: T 60 does not divide over 8 devices"),
        ("--layers 2x12x8", "width 12 is not divisible by 8 heads"),
        ("--rival nowhere", "no *parallel_reduce_cuda*.so in it"),
    ],
)
def test_bad_options_end_with_one_line(script, options, message, capsys):
    import cli

    assert cli.call(lambda: script.main([*TINY, *options.split()])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# --- the rival -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operations():
    """The rival's operations in its own layouts, computed by the oracle."""
    library = torch.library.Library("parallel_reduce_cuda", "DEF")

    def solve(cell, a, u, peephole=None):
        with torch.enable_grad():
            w = (a if peephole is None else torch.cat([a, peephole], dim=1)).T.double()
            u = u.permute(0, 2, 3, 1).double()
            n = 1 if cell == "gru" else 2
            zeros = tuple(torch.zeros_like(u[:, 0, 0]) for _ in range(n))
            nudges = tuple(torch.zeros_like(u[:, :, 0], requires_grad=True) for _ in range(n))
            out = torch_states(cell, u, w, zeros, nudges)
        return nudges, out

    def laid(arrays):
        arrays = [x.transpose(1, 2).float() for x in arrays]
        return arrays[0].contiguous() if len(arrays) == 1 else torch.stack(arrays, dim=-1)

    def adjoint(cell, g, h, *inputs):
        nudges, out = solve(cell, *inputs)
        torch.testing.assert_close(h, laid([x.detach() for x in out]))
        cotangents = [g] if cell == "gru" else [g[..., 0], g[..., 1]]
        with torch.enable_grad():
            loss = sum((x * y.transpose(1, 2)).sum() for x, y in zip(out, cotangents, strict=True))
        return laid(torch.autograd.grad(loss, nudges))

    for cell, name in (("gru", "gru_diag_mh"), ("lstm", "lstm_cifg_diag_mh")):
        inputs = "Tensor a, Tensor u" + ", Tensor c" * (cell == "lstm")
        library.define(f"fused_fwd_{name}({inputs}) -> Tensor")
        library.define(f"fused_bwd_{name}(Tensor g, Tensor h, {inputs}) -> Tensor")
        forward = lambda *x, cell=cell: laid([s.detach() for s in solve(cell, *x)[1]])
        library.impl(f"fused_fwd_{name}", forward, EVERYWHERE)
        library.impl(f"fused_bwd_{name}", lambda *x, cell=cell: adjoint(cell, *x), EVERYWHERE)
    return library


def test_the_rival_gets_our_inputs_as_it_lays_them(
    script, operations, tmp_path, monkeypatch, capsys
):
    (tmp_path / "parallel_reduce_cuda.so").touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    options = f"{SIZES} --layers --scan --rival {tmp_path} --dtypes float32 bfloat16"
    assert script.main(options.split()) == 0
    out = capsys.readouterr().out
    found = rows_in(out)
    with_rival = [x for x in found if x["dtype"] == "float32"]
    assert [x["cell"] for x in with_rival] == ["gru", "lstm"]
    for row in with_rival:
        assert row["rival ms"] > 0 and row["rival adjoint ms"] > 0
        assert row["rival error"] < 1e-6 and row["rival adjoint error"] < 1e-6
    assert "geometric mean" in out
    assert all("rival ms" not in x for x in found if x["dtype"] == "bfloat16")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b"])
def test_a_report_is_named_by_letters_and_digits(script, capsys, name):
    with pytest.raises(SystemExit, match="2"):
        script.parser().parse_args(["--report", name])
    assert f"{name!r} is no name" in capsys.readouterr().err


def test_sizes_beyond_the_rivals_indices_are_not_run(script):
    import recurrent_rival

    rival = recurrent_rival.Rival(torch)
    u = SimpleNamespace(size=3 * 2**30)
    huge = {"too large for its 32-bit indices"}
    assert set(rival.recurrence("gru", [u], None, None).values()) == huge
    assert set(rival.layer("gru", 2**10, 2**10, 2**10, "float32", 8).values()) == huge
