"""Linear recurrences of three kinds of matrix, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hackle.layers.recurrent import affine

TIME = 200


def draw(kind, time=TIME, channels=3):
    """A matrix of about norm 1, its dense form `[T, channels, n, n]`, and a right-hand side."""
    rng = np.random.default_rng(0)
    n = {"diagonal": 1, "block": 2, "dense": 4}[kind]
    dense = rng.normal(size=(time, channels, n, n)) / np.sqrt(n) / 1.2
    rhs = rng.normal(size=(time, channels, n))
    if kind == "dense":
        return jnp.asarray(dense, jnp.float32), dense, (jnp.asarray(rhs, jnp.float32),), rhs
    rows = tuple(
        tuple(jnp.asarray(dense[..., i, k], jnp.float32) for k in range(n)) for i in range(n)
    )
    matrix = affine.Diagonal(rows[0]) if kind == "diagonal" else rows
    return matrix, dense, tuple(jnp.asarray(rhs[..., i], jnp.float32) for i in range(n)), rhs


def together(kind, vector):
    return np.asarray(vector[0] if kind == "dense" else np.stack(vector, -1), np.float64)


@pytest.mark.parametrize("kind", ["diagonal", "block", "dense"])
def test_solves_and_adjoint_solves(kind):
    matrix, dense, vector, rhs = draw(kind)
    x, y = [rhs[0]], [rhs[-1]]
    for t in range(1, TIME):
        x.append(np.einsum("cik,ck->ci", dense[t], x[-1]) + rhs[t])
        s = TIME - 1 - t
        y.append(np.einsum("cik,ci->ck", dense[s + 1], y[-1]) + rhs[s])
    got = jax.jit(affine.solve, static_argnums=2)(matrix, vector, 0)
    np.testing.assert_allclose(together(kind, got), np.stack(x), atol=1e-4)
    got = jax.jit(affine.solve_transposed, static_argnums=2)(matrix, vector, 0)
    np.testing.assert_allclose(together(kind, got), np.stack(y[::-1]), atol=1e-4)


@pytest.mark.parametrize("kind", ["diagonal", "block", "dense"])
def test_the_first_jacobian_has_no_part_in_it(kind):
    """The state before the first step is given: it does not move."""
    matrix, _, vector, _ = draw(kind, time=7)
    other = jax.tree.map(lambda x: x.at[0].set(9.0), matrix)
    for solve in (affine.solve, affine.solve_transposed):
        for x, y in zip(solve(matrix, vector, 0), solve(other, vector, 0), strict=True):
            np.testing.assert_array_equal(x, y)


def test_products_have_the_first_factor_on_the_right():
    matrix, dense, _, _ = draw("block", time=7)
    want = dense[0]
    for t in range(1, 7):
        want = np.einsum("cij,cjk->cik", dense[t], want)
    got = affine.product(matrix, 0)
    for i, k in np.ndindex(2, 2):
        np.testing.assert_allclose(got[i][k], want[:, i, k], atol=1e-5)


def test_signs_and_integers_are_exact():
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], size=(TIME, 3))
    rhs = rng.integers(-5, 6, size=(TIME, 3))
    x = [rhs[0]]
    for t in range(1, TIME):
        x.append(signs[t] * x[-1] + rhs[t])
    matrix = affine.Diagonal((jnp.asarray(signs, jnp.float32),))
    (got,) = affine.solve(matrix, (jnp.asarray(rhs, jnp.float32),), 0)
    np.testing.assert_array_equal(got, np.stack(x))


def test_rotations_of_two_arrays_keep_the_norm():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, size=(TIME, 3))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    start = rng.normal(size=(2, 3))
    rhs = tuple(jnp.zeros((TIME, 3)).at[0].set(jnp.asarray(x, jnp.float32)) for x in start)
    got = affine.solve(((cos, -sin), (sin, cos)), rhs, 0)
    turned = (start[0] + 1j * start[1]) * np.exp(1j * np.cumsum(angle, 0) - 1j * angle[0])
    np.testing.assert_allclose(got[0] + 1j * got[1], turned, atol=1e-5 * np.abs(start).max() * 3)
    norms = np.hypot(*got)
    np.testing.assert_allclose(norms, np.broadcast_to(np.hypot(*start), norms.shape), rtol=1e-5)


@pytest.mark.parametrize("time", [1, 2, 3, 13, 32])
@pytest.mark.parametrize("kind", ["diagonal", "block", "dense"])
def test_marks_go_where_they_are_carried(kind, time):
    """Against a loop over time; a mark is carried on by entries that are not zero."""
    rng = np.random.default_rng(time)
    cut = rng.random((time, 3)) < 0.2
    marked = [rng.random((time, 3)) < 0.1 for _ in range(2)]
    entry = jnp.asarray(np.where(cut, 0, -0.5))
    zero = jnp.zeros_like(entry)
    if kind == "dense":
        cut = np.broadcast_to(cut[:, :1], cut.shape)
        matrix = jnp.asarray(np.where(cut[:, :1, None], 0, np.eye(3)))
        marked = marked[:1]
    else:
        block = ((zero, entry), (zero, zero))
        matrix = affine.Diagonal((entry, entry)) if kind == "diagonal" else block
    want, before = [m.copy() for m in marked], [np.zeros(3, bool)] * 2
    for t in range(time):
        for m, b in zip(want, before, strict=False):
            m[t] |= ~cut[t] & b
        before = [m[t] for m in want]
        if kind == "block":
            before = [before[0] | before[1]] * 2
        if kind == "dense":
            before = [np.full(3, before[0].any())]
    got = affine.reached(matrix, tuple(map(jnp.asarray, marked)), 0)
    np.testing.assert_array_equal(got, want)
