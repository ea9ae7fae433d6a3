"""One row of bench_attention.py: the mask, the arrays, the check, and the clock.

What is timed is checked first, on the very program that is timed. Some rows of queries are compared
with float32 attention of those rows alone; backward, cotangents are zero but at these rows, so that
all gradients of keys and values can be compared too, at any length.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from clock import seconds
from rows import Skipped, WrongResult, compile_each

KINDS = ("causal", "branch", "quarter", "packed")
DTYPES = ("bfloat16", "float16", "float32")
# Relative error, in the norm, of rounded operands and probabilities; of float32, TF32 operands.
ERROR = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-3}
SAMPLED = 32  # rows of queries of a check
# Products of a pair of tokens: scores and output; scores again and four gradients.
PRODUCTS = {"forward": 2, "both": 7}
# Tokens of a block of "branch", by path; path 0 is seen by all paths.
BRANCH = ((0, 256), (1, 448), (2, 448), (3, 448), (4, 448), (0, 128))
DOCUMENTS = 8  # of "packed"


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: attention of B x T tokens, H query heads, K key heads of width E."""

    kind: str
    batch: int
    length: int
    heads: int
    key_heads: int
    width: int
    dtype: str
    implementation: str

    def flops(self, what: str) -> float:
        """Of visible pairs alone, of `what`, "forward" or "both" directions."""
        pairs = self.batch * self.heads * Tokens.of(self.kind, self.length).pairs
        return 2.0 * PRODUCTS[what] * self.width * pairs


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Int32 ids of a row of tokens, each `[T]`. Block 0: in no path."""

    segment: np.ndarray
    block: np.ndarray
    path: np.ndarray

    @classmethod
    @functools.cache
    def of(cls, kind: str, length: int) -> "Tokens":
        """Of a mask kind, causal in all of them:

        - causal: nothing else.
        - branch: blocks as in `BRANCH`, one after the other.
        - quarter: one block of four equal paths, so that a quarter of the pairs is left.
        - packed: documents of random lengths that do not see each other.
        """
        zero = np.zeros(length, np.int32)
        index = np.arange(length)
        if kind == "branch":
            path = np.concatenate([np.full(n, p, np.int32) for p, n in BRANCH])
            block = np.where(path[index % len(path)] > 0, index // len(path) + 1, 0)
            return cls(zero, block.astype(np.int32), path[index % len(path)])
        if kind == "quarter":
            return cls(zero, zero + 1, (index * 4 // length + 1).astype(np.int32))
        if kind == "packed":
            count = min(DOCUMENTS, length)
            ends = np.random.default_rng(0).choice(np.arange(1, length), count - 1, replace=False)
            segment = np.searchsorted(np.sort(ends), index, side="right")
            return cls(segment.astype(np.int32), zero, zero)
        return cls(zero, zero, zero)

    @functools.cached_property
    def pairs(self) -> int:
        """How many (query, key) are visible, counted in T log T."""
        siblings = _before(self.block) - _before(self.block.astype(np.int64) << 32 | self.path)
        # Where a block has siblings, documents are one: so are those of `of`.
        return int(np.sum(_before(self.segment) - np.where(self.block > 0, siblings, 0)))

    def mask(self):
        """As described to our layers, with only the parts that hide something."""
        import jax.numpy as jnp

        from hackle.layers import masks

        mask = masks.Causal()
        if self.segment.any():
            ids = jnp.asarray(self.segment)[None]
            mask &= masks.Segments(ids, ids)
        if self.block.any():
            block, path = (jnp.asarray(x)[None, None] for x in (self.block, self.path))
            mask &= masks.Branches(block, path, block, path)
        return mask


def _before(ids: np.ndarray) -> np.ndarray:
    """For each token, how many up to and with it have its id."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    first = np.searchsorted(ordered, ordered, side="left")
    found = np.empty(len(ids), np.int64)
    found[order] = np.arange(len(ids)) - first + 1
    return found


def fill(case: Case, programs: "Programs", rival, row: dict[str, Any]) -> None:
    """Fills `row`, as far as it comes.

    Args:
      programs: what was compiled ahead.
      rival: an `attention_rival.Rival` for implementations of torch, or None.

    Raises:
      Skipped: the implementation cannot do this, or not here.
    """
    try:
        if case.implementation.startswith("torch"):
            rival.row(case, Tokens.of(case.kind, case.length), row)
        else:
            our_row(case, row, programs)
    except NotImplementedError as error:
        raise Skipped(str(error)) from error
    for what in PRODUCTS:
        if f"{what} ms" in row:
            row[f"{what} TFLOP/s"] = case.flops(what) / row[f"{what} ms"] / 1e9


def check(names: str, got, want, case: Case) -> float:
    """The largest relative error of these arrays.

    Raises:
      WrongResult: it is more than allowed, or not a number.
    """
    allowed = ERROR[case.dtype]
    errors = {}
    for name, a, b in zip(names.split(), got, want, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        errors[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not all(error <= allowed for error in errors.values()):
        found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise WrongResult(f"relative errors {found}; allowed {allowed:.0e}")
    return max(errors.values())


def sampled_rows(length: int) -> np.ndarray:
    """The first, the last, and some between."""
    rng = np.random.default_rng(length)
    some = rng.choice(length, min(SAMPLED, length), replace=False)
    return np.unique(np.concatenate([[0, length - 1], some]))


# --- ours ----------------------------------------------------------------------------------------

# From a case and "forward" or "both" to what is compiled for it.
Programs = dict[tuple[Case, str], Any]


def our_row(case: Case, row: dict[str, Any], programs: Programs) -> None:
    """Fills `row`, as far as it comes."""
    import jax

    mask, rows = Tokens.of(case.kind, case.length).mask(), sampled_rows(case.length)
    query, key, value, dout = arrays(case)
    exact = jax.jit(sampled_attention)
    dsampled = dout[:, rows].astype("float32")
    want, *gradients = exact(query[:, rows], key, value, mask, rows, dsampled)

    program = programs.get((case, "forward")) or lowered(case, "forward").compile()
    out = program(mask, query, key, value)
    row["error"] = check("output", [out[:, rows].astype("float32")], [want], case)
    del out
    row["forward ms"] = 1e3 * seconds(lambda x: program(mask, *x), [(query, key, value)])
    row["forward MiB"] = temporary(program)

    program = programs.get((case, "both")) or lowered(case, "both").compile()
    kept = np.zeros(case.length, bool)
    kept[rows] = True
    alone = jax.jit(lambda x: x * kept[:, None, None].astype(x.dtype))(dout)
    _, dquery, dkey, dvalue = program(mask, query, key, value, alone)
    if float(abs(dquery[:, ~kept][:, :4096].astype("float32")).max(initial=0)) != 0:
        raise WrongResult("a query without a cotangent has a gradient")
    got = [x.astype("float32") for x in (dquery[:, rows], dkey, dvalue)]
    row["gradient error"] = check("dquery dkey dvalue", got, gradients, case)
    del got, dquery, dkey, dvalue, alone
    arguments = [(query, key, value, dout)]
    row["both ms"] = 1e3 * seconds(lambda x: program(mask, *x), arguments)
    row["both MiB"] = temporary(program)


def sampled_attention(query, key, value, mask, rows, dout):
    """Float32 attention of queries `[B,n,H,E]` at `rows` to all keys, and its gradients."""
    import jax
    import jax.numpy as jnp

    from hackle.layers.attention.reference import attend_tile

    visible = mask.visible(rows, jnp.arange(key.shape[1]))
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    with jax.default_matmul_precision("highest"):
        attend = lambda *a: attend_tile(*a, visible, query.shape[-1] ** -0.5)[0]
        out, pull = jax.vjp(attend, *wide)
        return out, *pull(dout)


def shapes(case: Case) -> list[tuple[int, ...]]:
    """Of query, key, value and the cotangent of the output."""
    query = (case.batch, case.length, case.heads, case.width)
    key = (case.batch, case.length, case.key_heads, case.width)
    return [query, key, key, query]


def arrays(case: Case) -> list[Any]:
    """N(0, 1), on the device."""
    import jax

    keys = jax.random.split(jax.random.key(case.length), 4)
    make = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return [make(key, shape, case.dtype) for key, shape in zip(keys, shapes(case), strict=True)]


def lowered(case: Case, what: str):
    """The program of `what`, "forward" or "both" directions: its first argument is the mask."""
    import jax

    from hackle.layers import attention

    def forward(mask, query, key, value):
        return attention(query, key, value, mask=mask, implementation=case.implementation)

    def both(mask, query, key, value, dout):
        out, pull = jax.vjp(functools.partial(forward, mask), query, key, value)
        return out, *pull(dout)

    given = [jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes(case)]
    mask = Tokens.of(case.kind, case.length).mask()
    if what == "forward":
        return jax.jit(forward).lower(mask, *given[:3])
    return jax.jit(both).lower(mask, *given)


def temporary(program) -> int | None:
    """MiB that a program needs besides what it is given and gives."""
    found = program.memory_analysis()
    return None if found is None else round(found.temp_size_in_bytes / 2**20)


def compile_ahead(cases: list[Case]) -> Programs:
    """Compiles what `our_row` of these will run; see `compile_each`."""
    ours = [case for case in cases if not case.implementation.startswith("torch")]
    return compile_each([(case, what) for case in ours for what in PRODUCTS], lowered)
