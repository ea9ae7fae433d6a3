"""Apple's ml-pararnn (fused mode), timed by bench_recurrent.py: a built checkout, given by path.

Nothing of it is part of this project. Its kernels run three Newton steps from zero, in layouts of
their own (`[B,D,T,3]`), into which inputs are brought before the clock starts.
"""

import importlib
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import recurrent_reference as reference
from clock import ROUND_SECONDS, ROUNDS
from hackle.zoo.errors import UserError

# Its kernels index with 32 bits: 3 B D T must be less.
INDEX_LIMIT = 2**31
CELLS = {
    "gru": ("gru_diag_mh", "GRUDiagMH"),
    "lstm": ("lstm_cifg_diag_mh", "LSTMCIFGDiagMH"),
}


def load(path: Path) -> "Rival":
    """The rival whose built shared object lies in `path`.

    Raises:
      UserError: there is none, or no torch to load it.
    """
    found = sorted(path.glob("*parallel_reduce_cuda*.so"))
    if not found:
        raise UserError(f"--rival {path}: no *parallel_reduce_cuda*.so in it; build it first")
    try:
        # By name: torch is what the rival needs, and no dependency of ours.
        torch = importlib.import_module("torch")
    except ImportError:
        raise UserError("--rival needs torch, which is not installed") from None
    torch.ops.load_library(str(found[0].resolve()))
    # As JAX does by default.
    torch.set_float32_matmul_precision("high")
    sys.path.insert(0, str(path.resolve()))
    return Rival(torch)


class Rival:
    def __init__(self, torch: ModuleType):
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def free(self) -> None:
        """Gives unused memory back to the device."""
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def recurrence(self, cell: str, inputs: list, weights, channels: np.ndarray) -> dict[str, Any]:
        """Milliseconds and errors of the raw kernels, forward and adjoint solve.

        Args:
          inputs: JAX arrays u `[B, T, 3, D]` float32, to go round in.
          weights: `[R, D]`; channels: which to check against float64.
        """
        if inputs[0].size >= INDEX_LIMIT:
            return {"rival note": "too large for its 32-bit indices"}
        torch, ops = self.torch, self.torch.ops.parallel_reduce_cuda
        try:
            w = torch.from_dlpack(weights).to(self.device)
            a, peephole = w[:3].T.contiguous(), w[3:].T.contiguous()
            sets = [torch.from_dlpack(u).permute(0, 3, 1, 2).contiguous() for u in inputs]
            if cell == "gru":
                forward = lambda u: ops.fused_fwd_gru_diag_mh(a, u)
                adjoint = lambda g, h, u: ops.fused_bwd_gru_diag_mh(g, h, a, u)
            else:
                forward = lambda u: ops.fused_fwd_lstm_cifg_diag_mh(a, u, peephole)
                adjoint = lambda g, h, u: ops.fused_bwd_lstm_cifg_diag_mh(g, h, a, u, peephole)
            states = forward(sets[0])  # [B,D,T], for an LSTM [B,D,T,2] with c before h
            g = torch.randn_like(states)
            if cell == "lstm":
                g[..., 0] = 0
            errors = self._errors(
                cell, inputs[0], weights, channels, states, g, adjoint(g, states, sets[0])
            )
            return errors | {
                "rival ms": self._ms(forward, [(u,) for u in sets]),
                "rival adjoint ms": self._ms(adjoint, [(g, states, u) for u in sets]),
            }
        except RuntimeError as error:  # such as too little memory
            return {"rival note": " ".join(str(error).split())[:120]}

    def _errors(self, cell, u, weights, channels, states, g, solved) -> dict[str, float]:
        def some(x, parts):
            x = x[:, self.torch.as_tensor(channels, device=x.device)].double().cpu().numpy()
            x = x[..., None] if parts == 1 else x
            return tuple(np.swapaxes(x[..., k], 1, 2) for k in range(parts))

        parts = 1 if cell == "gru" else 2
        got, g, solved = some(states, parts), some(g, parts), some(solved, parts)
        u, w = np.asarray(u[..., channels], np.float64), np.asarray(weights, np.float64)
        w = w[:, channels]
        zero = tuple(np.zeros(u.shape[::3]) for _ in range(parts))
        exact = reference.solve(cell, u, w, zero)
        adjoint, *_ = reference.gradients(cell, u, w, zero, exact, g[-1], zero)
        return {
            "rival error": float(np.max(np.abs(got[-1] - exact[-1]))),
            "rival adjoint error": max(
                float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
                for a, b in zip(solved, adjoint, strict=True)
            ),
        }

    def layer(
        self, cell: str, batch: int, width: int, length: int, dtype: str, heads: int
    ) -> dict[str, Any]:
        """Milliseconds of its whole layer in fused mode, and the error of its output; forward also
        as it goes one step after the other."""
        if 3 * batch * length * width >= INDEX_LIMIT:
            return {"rival note": "too large for its 32-bit indices"}
        torch = self.torch
        file, name = CELLS[cell]
        module = importlib.import_module(f"pararnn.rnn_cell.{file}")

        def config(mode: str):
            return getattr(module, f"{name}Config")(
                state_dim=width,
                input_dim=width,
                num_heads=heads,
                device=torch.device(self.device),
                dtype=getattr(torch, dtype),
                mode=mode,
            )

        model = getattr(module, name)(config("parallel_FUSED"))
        steps = getattr(module, name)(config("sequential"))
        like = dict(device=self.device, dtype=getattr(torch, dtype))
        try:
            x = torch.randn(batch, length, width, **like, requires_grad=True)
            g = torch.randn(batch, length, width, **like)
            leaves = [x, *model.parameters()]

            def both():
                return torch.autograd.grad(model(x), leaves, g)

            with torch.no_grad():
                error = self._layer_error(cell, model, x, model(x))
                forward = self._ms(lambda: model(x), [()])
                one_by_one = self._ms(lambda: steps(x), [()], rounds=1)
            return {
                "rival error": error,
                "rival forward ms": forward,
                "rival both ms": self._ms(both, [()]),
                "rival steps ms": one_by_one,
            }
        except RuntimeError as error:  # such as too little memory
            return {"rival note": " ".join(str(error).split())[:120]}

    def _layer_error(self, cell: str, model, x, y) -> float:
        """Of the first channels of the first head."""

        def double(tensor):
            return tensor.detach().double().cpu().numpy()

        count = min(8, model.B.shape[-1])
        block = double(model.B[0, :, :, :count])
        u = np.einsum("bti,ivj->btvj", double(x[..., : block.shape[0]]), block)
        u += double(model.b[:, :count])
        rows = [model.A] if cell == "gru" else [model.A, model.C]
        weights = np.concatenate([double(r[:, :count]) for r in rows])
        zero = tuple(np.zeros((x.shape[0], count)) for _ in range(1 if cell == "gru" else 2))
        exact = reference.solve(cell, u, weights, zero)[-1]
        return float(np.max(np.abs(double(y[..., :count]) - exact)))

    def _ms(self, call, arguments: list[tuple], rounds: int = ROUNDS) -> float:
        """Median milliseconds of one call, by the device's clock."""
        for a in arguments:
            call(*a)
        start = time.perf_counter()
        self._lap(call, arguments, 1)
        calls = max(1, min(400, int(ROUND_SECONDS / (time.perf_counter() - start))))
        return statistics.median(self._lap(call, arguments, calls) for _ in range(rounds))

    def _busy(self) -> None:
        """Starts some 10 ms of work."""
        x = self.torch.zeros(4096, 4096, dtype=self.torch.float64, device=self.device)
        for _ in range(4):
            x = x @ x

    def _lap(self, call, arguments: list[tuple], calls: int) -> float:
        def loop():
            for i in range(calls):
                call(*arguments[i % len(arguments)])

        if self.device == "cpu":
            start = time.perf_counter()
            loop()
            return 1e3 * (time.perf_counter() - start) / calls
        cuda = self.torch.cuda
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.synchronize()
        self._busy()  # so that calls wait in the queue, as in `clock.seconds`
        begin.record()
        loop()
        end.record()
        cuda.synchronize()
        return begin.elapsed_time(end) / calls
