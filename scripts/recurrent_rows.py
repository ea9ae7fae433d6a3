"""One row of bench_recurrent.py: the arrays, the check, and the clock.

What is timed is checked first, on the very call that is timed: some channels at all times.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

import recurrent_reference as reference
from clock import on_gpu, seconds
from rows import Skipped, WrongResult, compile_each

DTYPES = ("float32", "bfloat16")
# Largest error of a state (their size is at most 1), and of a gradient over its largest entry.
# A bfloat16 has 8 bits, and gradients also start from states rounded to it.
STATE_ERROR = {"float32": 5e-6, "bfloat16": 2e-2}
# The final state is float32 whatever the dtype of u; for bfloat16 the fused GPU kernel has gates
# from the hardware's tanh, right to 5e-4.
FINAL_ERROR = {"float32": 5e-6, "bfloat16": 1e-4}
GRADIENT_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}
# Arrays [B,T,D] that a perfect kernel reads and writes: u and states; u, states, g and du.
ARRAYS = {"gru": {"forward": 4, "backward": 8}, "lstm": {"forward": 5, "backward": 9}}
STATES = {"gru": 1, "lstm": 2}
SAMPLED = 8  # channels of a check, in all rows of the batch
HEADS = 8
BEYOND_CACHE = 120e6  # bytes of inputs to go round in, so that none is still in a GPU's cache
MOST_PROGRAMS = 4
# Recurrences in one program where one is short, as in a model of many layers: what a GPU waits
# between two programs is no part of a kernel.
UNROLLED = 4
SHORT = 1e9  # bytes: a quarter of a millisecond or so


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a recurrence, or a whole layer, of B x D x T."""

    cell: str
    batch: int
    width: int
    length: int
    dtype: str
    method: str

    @property
    def size(self) -> int:
        return self.batch * self.width * self.length

    def bytes(self, what: str) -> int:
        """Bytes that `what`, "forward" or "backward", moves at least and has to hold."""
        return ARRAYS[self.cell][what] * self.size * (4 if self.dtype == "float32" else 2)


# --- the recurrence ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given:
    """What a recurrence is given besides its large arrays; `final_g` is the last state's cotangent.

    `state` and `final_g` are as `initial_state` of the layers; `channels` are those checked.
    """

    weights: Any
    state: Any
    final_g: Any
    channels: np.ndarray

    @classmethod
    def random(cls, case: Case) -> "Given":
        """Weights 0.5 N(0, 1), so up to about 2; states as a cell may leave them."""
        import jax.numpy as jnp

        rng = np.random.default_rng(case.width)
        weights = 0.5 * rng.normal(size=(3 if case.cell == "gru" else 5, case.width))
        parts = [
            jnp.asarray(rng.uniform(-0.9, 0.9, (case.batch, case.width)), "f4")
            for _ in range(2 * STATES[case.cell])
        ]
        state, final_g = tuple(parts[::2]), tuple(parts[1::2])
        if case.cell == "gru":
            state, final_g = state[0], final_g[0]
        channels = np.sort(rng.choice(case.width, min(SAMPLED, case.width), replace=False))
        return cls(jnp.asarray(weights, "f4"), state, final_g, channels)

    def sampled(self, tree):
        """`tree` with the checked channels of its arrays alone, in float64."""
        return as64(_channels()(tree, self.channels))


def recurrence(case: Case, u, weights, state):
    """`(h [B,T,D], final state)` by the method of `case`."""
    from hackle.layers import recurrent

    method = None if case.method == "auto" else case.method
    if case.cell == "gru":
        return recurrent.gru(u, weights, state, method=method)
    return recurrent.lstm(u, weights[:3], weights[3:], state, method=method)


# From a case and a direction to what is compiled for it.
Programs = dict[tuple[Case, str], Any]


def recurrence_row(
    case: Case, row: dict[str, Any], rate: float, rival, programs: Programs, *, backward: bool
) -> None:
    """Fills `row`, as far as it comes, with the columns of a recurrence."""
    given = Given.random(case)
    require(case, "forward")
    program = programs.get((case, "forward")) or lowered(case, "forward").compile()
    exact = forward_columns(case, given, program, row, rate, rival)
    if backward:
        require(case, "backward")
        program = programs.get((case, "backward")) or lowered(case, "backward").compile()
        both_columns(case, given, program, exact, row, rate)


def lowered(case: Case, what: str):
    """The program of `what`, "forward" or "backward" (both directions), for its inputs."""
    import jax

    given = Given.random(case)
    size = (case.batch, case.length, case.width)
    u = jax.ShapeDtypeStruct((*size[:2], 3, case.width), case.dtype)
    if what == "forward":
        arrays: tuple[Any, ...] = (u,)

        def one(state, u):
            h, final = recurrence(case, u, given.weights, state)
            return final, (h, final)

    else:
        arrays = (u, jax.ShapeDtypeStruct(size, case.dtype))

        def one(state, u, g):
            (_, final), pull = jax.vjp(functools.partial(recurrence, case), u, given.weights, state)
            return final, pull((g, given.final_g))

    program = jax.jit(lambda state, inputs: chain(one, state, inputs))
    group = grouped([arrays] * input_sets(case, what))[0]
    return program.lower(given.state, group)


def compile_ahead(cases: list[Case], backward: bool) -> Programs:
    """Compiles what `recurrence_row` of these will run; see `compile_each`."""

    def checked(case: Case, what: str):
        require(case, what)
        return lowered(case, what)

    whats = ("forward", "backward")[: 1 + backward]
    return compile_each([(case, what) for case in cases for what in whats], checked)


def forward_columns(case: Case, given: Given, program, row: dict[str, Any], rate: float, rival):
    """Returns the float64 states of the first inputs, which are those of `both_columns` too."""
    inputs = [(random_array(2 * i, case, 3),) for i in range(input_sets(case, "forward"))]
    groups = grouped(inputs)
    outs = program(given.state, groups[0])[1]
    (h, final), u, weights, state = given.sampled(
        (outs[0], inputs[0][0], given.weights, given.state)
    )
    exact = reference.solve(case.cell, u, weights, state_arrays(state))
    row["error"] = check("h", [h], exact[-1:], STATE_ERROR[case.dtype])
    last = [x[:, -1] for x in exact]
    check("the final state", state_arrays(final), last, FINAL_ERROR[case.dtype])
    del outs
    row |= timed(program, given.state, groups, "forward", case, rate)
    if rival is not None and case.dtype == "float32":
        found = rival.recurrence(case.cell, [u for (u,) in inputs], given.weights, given.channels)
        row |= found
        if "rival ms" in found:
            row["rival / ours"] = found["rival ms"] / row["forward ms"]
    return exact


def both_columns(
    case: Case, given: Given, program, exact, row: dict[str, Any], rate: float
) -> None:
    inputs = [
        (random_array(2 * i, case, 3), random_array(2 * i + 1, case))
        for i in range(input_sets(case, "backward"))
    ]
    groups = grouped(inputs)
    got = program(given.state, groups[0])[1][0]
    (du, dweights, dstate), (u, g), weights, state, final_g = given.sampled(
        (got, inputs[0], given.weights, given.state, given.final_g)
    )
    del got
    _, *gradients, dinitial = reference.gradients(
        case.cell, u, weights, state_arrays(state), exact, g, state_arrays(final_g)
    )
    row["gradient error"] = check(
        "a gradient",
        [du, dweights, *state_arrays(dstate)],
        [*gradients, *dinitial],
        GRADIENT_ERROR[case.dtype],
        relative=True,
    )
    row |= timed(program, given.state, groups, "both", case, rate)


def chain(one, state, inputs):
    """Recurrences one after the other, each from the state that the last one left."""
    import jax

    one, outs = jax.jit(one), []  # so that it is lowered once
    for arrays in inputs:
        state, out = one(state, *arrays)
        outs.append(out)
    return state, outs


def state_arrays(state) -> tuple[np.ndarray, ...]:
    return state if isinstance(state, tuple) else (state,)


def check(name: str, got, want, allowed: float, *, relative: bool = False) -> float:
    """The largest error of these arrays, each over its largest entry if `relative`.

    Raises:
      WrongResult: it is more than `allowed`, or not a number.
    """
    errors = [
        float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) if relative else 1))
        for a, b in zip(got, want, strict=True)
    ]
    if not all(error <= allowed for error in errors):
        raise WrongResult(f"{name} is off by {max(errors):.1e}, allowed {allowed:.0e}")
    return max(errors)


# --- the layer -----------------------------------------------------------------------------------


def layer_row(case: Case, row: dict[str, Any], rival) -> None:
    """Forward, and forward + backward, of projection and recurrence; x is as wide as the state."""
    import jax

    forward, both, params = layer_programs(case)
    x, g = random_array(1, case), random_array(2, case)
    with jax.default_matmul_precision("highest"):
        short = [a[:, :256] for a in (x, g)]
        scan = layer_programs(dataclasses.replace(case, method="scan"))
        got, want = (
            jax.tree.leaves(as64(f(p, *short))) for _, f, p in ((forward, both, params), scan)
        )
    row["error"] = check(
        "the layer or a gradient", got, want, GRADIENT_ERROR[case.dtype], relative=True
    )
    row["forward ms"] = 1e3 * seconds(lambda _: forward(params, x), [None])
    row["both ms"] = 1e3 * seconds(lambda _: both(params, x, g), [None])
    if rival is not None:
        row |= rival.layer(case.cell, case.batch, case.width, case.length, case.dtype, HEADS)
        if "rival both ms" in row:
            row["rival / ours"] = row["rival both ms"] / row["both ms"]
            row["rival steps / ours"] = row["rival steps ms"] / row["forward ms"]


def layer_programs(case: Case):
    """`forward(params, x)`, `both(params, x, g) -> (y, dparams, dx)`, and parameters."""
    import jax
    from flax import nnx

    from hackle.layers import recurrent

    layer = {"gru": recurrent.ParaGRU, "lstm": recurrent.ParaLSTM}[case.cell](
        case.width,
        case.width,
        heads=HEADS,
        method=None if case.method == "auto" else case.method,
        rngs=nnx.Rngs(0),
    )
    graph, params = nnx.split(layer)

    def forward(params, x):
        return nnx.merge(graph, params)(x)[0]

    def both(params, x, g):
        y, pull = jax.vjp(forward, params, x)
        return y, pull(g)

    return jax.jit(forward), jax.jit(both), params


# --- arrays and clocks ---------------------------------------------------------------------------


def random_array(seed: int, case: Case, *gates: int):
    """N(0, 1) of shape `[B, T, *gates, D]` in the dtype of `case`, on the device."""
    import jax

    # Row by row: the random bits of a whole array would need as much room again.
    def make(keys):
        size = (case.length, *gates, case.width)
        return jax.lax.map(lambda key: jax.random.normal(key, size, case.dtype), keys)

    return jax.jit(make)(jax.random.split(jax.random.key(seed), case.batch))


def as64(tree):
    """Float64 numpy arrays of the same values."""
    import jax

    return jax.tree.map(lambda x: np.asarray(x.astype("float32"), np.float64), tree)


@functools.cache
def _channels():
    import jax

    return jax.jit(lambda tree, channels: jax.tree.map(lambda x: x[..., channels], tree))


def input_sets(case: Case, what: str) -> int:
    """How many sets of inputs to go round in: one, or enough for some programs."""
    size = case.bytes(what)
    if not on_gpu() or size >= SHORT:
        return 1
    programs = -(-BEYOND_CACHE // (size * UNROLLED))
    return UNROLLED * min(MOST_PROGRAMS, int(programs))


def grouped(inputs: list) -> list[list]:
    """Inputs of the calls of a program, UNROLLED recurrences each where there is more than one."""
    size = min(UNROLLED, len(inputs))
    return [inputs[i : i + size] for i in range(0, len(inputs), size)]


def require(case: Case, what: str) -> None:
    """Raises Skipped if the arrays of `what` do not fit the device."""
    import jax

    size = case.bytes(what) * input_sets(case, what)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and size > limit:
        raise Skipped(f"{what} needs {size / 2**30:.1f} GiB, JAX has {limit / 2**30:.1f}")


def timed(program, state, groups, what: str, case: Case, rate: float) -> dict[str, Any]:
    """Columns of `what`, "forward" or "both" directions."""
    each = seconds(lambda group: program(state, group), groups) / len(groups[0])
    size = case.bytes("forward") + (case.bytes("backward") if what == "both" else 0)
    floor = size / rate
    return {
        f"{what} ms": 1e3 * each,
        f"{what} GB/s": size / each / 1e9,
        f"{what} floor ms": 1e3 * floor,
        f"{what} / floor": each / floor,
    }


def copy_rate() -> float:
    """Bytes per second, read and written, of an elementwise operation on a large array."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**28 if on_gpu() else 2**22, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(add, [x])
