"""The methods by name, all in one form, and which of them None stands for."""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hackle.layers.recurrent import fused_gpu, fused_tpu, newton, scan, shooting
from hackle.layers.recurrent.newton import Progress

_log = logging.getLogger("hackle")

METHODS = ("scan", "newton", "shooting", "fused")
ITERATIVE: dict[str, ModuleType] = {"newton": newton, "shooting": shooting}
_FUSED: dict[str, ModuleType] = {"gpu": fused_gpu, "tpu": fused_tpu}


class Row(NamedTuple):
    """A line of the table of choices: `method`, on `platform` (None: any), from `time` steps on."""

    platform: str | None
    method: str
    time: int = 1


# What None stands for: the first line that fits and whose method can run.
_TABLE = (
    # reports/recurrent_cpu_2026-11-25.md, B x D of 64 and 2048, T from 64 to 2048. Forward scan is
    # the fastest, at one size level with shooting. With backward shooting takes 0.7 to 1.1 times as
    # long in a GRU, 1.1 to 2.1 times in an LSTM. Newton's method takes 1.8 to 35 times as long.
    Row("cpu", "scan"),
    # reports/recurrent-float32_nvidia-h100-80gb-hbm3_2026-11-25.md: at 8 x 1024 x 8192 the kernel
    # is 310 times as fast as scan. Other methods and sizes were not measured beside it.
    Row("gpu", "fused"),
    # Not measured.
    Row("tpu", "fused"),
    # Without a kernel. Only the step of scan was measured: 15 us on an H100 (same report), nearly
    # all of it launches; so fewer steps are faster, and below two segments shooting makes no fewer.
    Row("gpu", "shooting", time=2 * shooting.STEPS),
    Row("tpu", "shooting", time=2 * shooting.STEPS),
    Row(None, "scan"),
)


class Options(NamedTuple):
    """What a method that iterates may be told; see `dispatch.gru_with_info`."""

    tolerance: float | None = None
    max_iterations: int | None = None
    fallback: bool = False

    def __str__(self) -> str:
        """Those that are given."""
        usual = Options()
        given = zip(self._fields, self, usual, strict=True)
        return ", ".join(f"{name}={value}" for name, value, none in given if value != none)


class Method(NamedTuple):
    """A method that runs.

    Attributes:
      solve: `(cell, u, weights, initial, reset) -> (states, final, Progress)`, see `scan.solve`.
      march: the same with d(final) / d(initial) before the progress, see `scan.march`.
      adjoint: as `scan.adjoint`.
    """

    solve: Callable[..., Any]
    march: Callable[..., Any]
    adjoint: Callable[..., Any]


def platform(u: jax.Array) -> str:
    """Where a recurrence of `u` will run, as far as it can be known: "cpu", "gpu", "tpu", ..."""
    on_mesh = jax.sharding.get_abstract_mesh().abstract_device
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if on_mesh is not None:
        name = on_mesh.platform
    elif not isinstance(u, jax.core.Tracer):
        name = next(iter(u.devices())).platform
    elif default is not None:
        name = default if isinstance(default, str) else default.platform
    else:
        name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def choose(
    name: str, method: str | None, options: Options, platform: str, u: jax.Array
) -> tuple[str, Options]:
    """The method that `method` stands for, and what it is to be told.

    Args:
      name: of the recurrence, for errors.

    Raises:
      ValueError: an unknown method, or options that the method has no use for or cannot keep.
      NotImplementedError: the named method cannot run.
    """
    newton.check_bounds(name, options.tolerance, options.max_iterations)
    if method is not None and method not in METHODS:
        raise ValueError(f"unknown method {method!r} of a recurrence; expected one of {METHODS}")
    # Whatever None stands for may fall back, and one that does not iterate need not.
    unused = options if method is not None else options._replace(fallback=False)
    if method not in ITERATIVE and unused != Options():
        does = "does not iterate" if method else "may be one that does not iterate"
        raise ValueError(
            f"{name}: method {method!r} {does}, got {unused}; expected one of {(*ITERATIVE,)}"
        )
    reason = _no_kernel(platform, u)
    if method == "fused" and reason is not None:
        raise NotImplementedError(f"method 'fused' of a recurrence: {reason}")
    if method is None:
        method = next(
            row.method
            for row in _TABLE
            if row.platform in (platform, None)
            and u.shape[1] >= row.time
            and (row.method != "fused" or reason is None)
        )
        _say_once(method, reason or "")
    return method, options if method in ITERATIVE else Options()


def _no_kernel(platform: str, u: jax.Array) -> str | None:
    """Why there is no fused kernel for `u`, or None if there is."""
    if platform not in _FUSED:
        return f"there is no fused kernel for {platform}"
    return _FUSED[platform].unsupported(u)


def find(method: str, platform: str, options: Options) -> Method:
    """The method of this name, on this platform, that keeps to these options."""
    if method not in ITERATIVE:
        module = _FUSED[platform] if method == "fused" else scan
        return Method(_direct(module.solve), _direct(module.march), module.adjoint)
    module = ITERATIVE[method]
    bounds = {"tolerance": options.tolerance, "max_iterations": options.max_iterations}
    solve: Callable[..., Any] = functools.partial(module.solve, **bounds)
    march: Callable[..., Any] = functools.partial(module.march, **bounds)
    if options.fallback:
        solve, march = _safe(solve, scan.solve), _safe(march, scan.march)
    return Method(solve, march, module.adjoint)


def _direct(run: Callable[..., tuple]) -> Callable[..., tuple]:
    """`run`, which does not iterate."""
    return lambda *given: (*run(*given), Progress(jnp.int32(0), jnp.array(True)))


def _safe(run: Callable[..., tuple], exact: Callable[..., tuple]) -> Callable[..., tuple]:
    """`run`, or `exact` where it did not converge; the progress is that of `run`."""

    def both(*given):
        *found, progress = run(*given)
        found = lax.cond(progress.converged, lambda: tuple(found), lambda: exact(*given))
        return *found, progress

    return both


@functools.cache
def _say_once(method: str, reason: str) -> None:
    _log.info("recurrence: chose %r%s", method, f" ({reason})" if reason else "")
