"""PyTorch's attention beside ours, on its own arrays, checked and timed as ours is."""

import importlib
import statistics
import time
from typing import Any

import clock
from attention_rows import Case, Tokens, check, sampled_rows, shapes

IMPLEMENTATIONS = ("torch-flex", "torch-cudnn")


def load() -> "Rival | None":
    """PyTorch with a GPU, or None where there is none."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return Rival(torch) if torch.cuda.is_available() else None


class Rival:
    """FlexAttention compiled for the mask, and cuDNN's causal attention."""

    def __init__(self, torch: Any, device: str = "cuda"):
        self.torch, self.device = torch, device

    def free(self) -> None:
        """Forgets what a row left: past a few compiled masks it would compile no more."""
        self.torch.cuda.empty_cache()
        self.torch.compiler.reset()

    def row(self, case: Case, tokens: Tokens, row: dict[str, Any]) -> None:
        """Fills `row`, as far as it comes."""
        torch = self.torch
        dtype = getattr(torch, case.dtype)
        torch.manual_seed(case.length)
        query, key, value, dout = (
            # [B, heads, L, E], as torch has it
            torch.randn(b, h, n, e, device=self.device, dtype=dtype)
            for b, n, h, e in shapes(case)
        )
        given = [x.requires_grad_() for x in (query, key, value)]
        start = time.perf_counter()
        attend = self._flex(tokens) if case.implementation == "torch-flex" else self._cudnn(case)
        rows = torch.from_numpy(sampled_rows(case.length)).to(self.device)
        with torch.no_grad():
            out = attend(*given)
        torch.cuda.synchronize()
        row["first call s"] = time.perf_counter() - start
        want, gradients = self.sampled(tokens, given, dout, rows)
        row["error"] = check("output", [_host(out[:, :, rows])], [_host(want)], case)
        del out

        def forward():
            with torch.no_grad():
                return attend(*given)

        def both(cotangent=dout):
            return torch.autograd.grad(attend(*given), given, cotangent)

        row["forward ms"] = 1e3 * self._seconds(forward)
        alone = torch.zeros_like(dout)
        alone[:, :, rows] = dout[:, :, rows]
        dquery, dkey, dvalue = both(alone)
        got = [dquery[:, :, rows], dkey, dvalue]
        exact = map(_host, gradients)
        row["gradient error"] = check("dquery dkey dvalue", map(_host, got), exact, case)
        del got, dquery, dkey, dvalue, alone
        row["both ms"] = 1e3 * self._seconds(both)

    def visible(self, tokens: Tokens):
        """`(query, key) -> bool`, of indices."""
        ids = (tokens.segment, tokens.block, tokens.path)
        segment, block, path = (self.torch.from_numpy(x).to(self.device) for x in ids)

        def visible(q, k):
            apart = (block[q] != block[k]) | (block[q] == 0)
            return (q >= k) & (segment[q] == segment[k]) & (apart | (path[q] == path[k]))

        return visible

    def _flex(self, tokens: Tokens):
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        torch, size, visible = self.torch, len(tokens.segment), self.visible(tokens)
        mod = lambda _, __, query, key: visible(query, key)
        # Compiled, since else it makes the mask of all pairs first.
        mask = torch.compile(flex.create_block_mask)(
            mod, None, None, size, size, device=self.device
        )
        attend = torch.compile(flex.flex_attention)
        return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True)

    def _cudnn(self, case: Case):
        backends = importlib.import_module("torch.nn.attention")
        if case.kind != "causal":
            raise NotImplementedError("torch's cuDNN attention takes causal masks alone")

        def attend(q, k, v):
            with backends.sdpa_kernel(backends.SDPBackend.CUDNN_ATTENTION):
                run = self.torch.nn.functional.scaled_dot_product_attention
                return run(q, k, v, is_causal=True, enable_gqa=True)

        return attend

    def sampled(self, tokens: Tokens, given, dout, rows):
        """Float32 output of some rows of queries, and gradients of it."""
        torch = self.torch
        query, key, value = (x.detach().float() for x in given)
        query = query[:, :, rows].contiguous()
        wide = [x.requires_grad_() for x in (query, key, value)]
        each = lambda x: x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)
        keys = torch.arange(key.shape[2], device=self.device)
        visible = self.visible(tokens)(rows[:, None], keys)
        scores = wide[0] @ each(wide[1]).transpose(2, 3) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out = weights @ each(wide[2])
        return out, torch.autograd.grad(out, wide, dout[:, :, rows].float())

    def _seconds(self, call) -> float:
        """As `clock.seconds`; its calls are long, so that the host keeps up."""
        torch, rounds = self.torch, []
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        calls = max(1, min(400, int(clock.ROUND_SECONDS / once)))
        for _ in range(clock.ROUNDS):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            rounds.append((time.perf_counter() - start) / calls)
        return statistics.median(rounds)


def _host(x):
    return x.detach().float().cpu().numpy()
