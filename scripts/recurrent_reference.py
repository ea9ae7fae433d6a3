"""The two recurrences and their gradients in numpy and float64: what rows are checked against.

Channels do not read one another, so a check takes a few channels of a large result, at all times.
Arrays here: `u` [B,T,3,D], `weights` [R,D] (the peepholes below the state matrix), one [B,T,D]
or [B,D] per array of state: `(h,)` for "gru", `(c, h)` for "lstm". Equations: ParaRNN, arXiv
2510.21450; gradients are worked out here by hand, apart from those of `hackle.layers`.
"""

import numpy as np

Arrays = tuple[np.ndarray, ...]


def solve(cell: str, u: np.ndarray, weights: np.ndarray, initial: Arrays) -> Arrays:
    """The states at all times."""
    step = {"gru": _gru, "lstm": _lstm}[cell]
    states = []
    state = initial
    for t in range(u.shape[1]):
        state = step(u[:, t], weights, state)
        states.append(state)
    return tuple(np.stack(rows, axis=1) for rows in zip(*states, strict=True))


def gradients(
    cell: str,
    u: np.ndarray,
    weights: np.ndarray,
    initial: Arrays,
    states: Arrays,
    g: np.ndarray,
    g_final: Arrays,
) -> tuple[Arrays, np.ndarray, np.ndarray, Arrays]:
    """The gradients of `sum(h g) + sum(final g_final)`.

    Args:
      states: those of `solve`.
      g: cotangent of h, [B,T,D]; g_final: of the last state, one [B,D] per array of state.

    Returns:
      `(adjoint, du, dweights, dinitial)`; `adjoint` is the gradient with respect to each state,
      through all times after it.
    """
    before = tuple(
        np.concatenate([first[:, None], after[:, :-1]], axis=1)
        for first, after in zip(initial, states, strict=True)
    )
    local = {"gru": _gru_local, "lstm": _lstm_local}[cell]
    jacobian, du_of, dweights_of = local(u, weights, before, states)
    # Time first and state arrays stacked: the loop is over time alone.
    rows = np.moveaxis(np.stack([np.stack(row) for row in jacobian]), 3, 0)  # [T,n,n,B,D]
    lam = np.empty((len(rows), len(states), *g_final[0].shape))
    carry = np.stack(g_final)
    for t in reversed(range(len(rows))):
        lam[t] = carry
        lam[t, -1] += g[:, t]
        carry = (rows[t] * lam[t, :, None]).sum(0)
    adjoint = tuple(np.moveaxis(lam, 0, 2))
    du = du_of(adjoint)
    return adjoint, np.stack(du, axis=2), np.stack(dweights_of(du)), tuple(carry)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gru(u, a, state):
    (h,) = state
    z = _sigmoid(a[0] * h + u[:, 0])
    r = _sigmoid(a[1] * h + u[:, 1])
    c = np.tanh(a[2] * (r * h) + u[:, 2])
    return ((1 - z) * h + z * c,)


def _lstm(u, w, state):
    c, h = state
    f = _sigmoid(w[0] * h + u[:, 0] + w[3] * c)
    c = f * c + (1 - f) * np.tanh(w[2] * h + u[:, 2])
    o = _sigmoid(w[1] * h + u[:, 1] + w[4] * c)
    return c, o * np.tanh(c)


def _gru_local(u, a, before, after):
    (h,) = before
    z = _sigmoid(a[0] * h + u[:, :, 0])
    r = _sigmoid(a[1] * h + u[:, :, 1])
    c = np.tanh(a[2] * (r * h) + u[:, :, 2])
    slope_z, slope_r, slope_c = z * (1 - z), r * (1 - r), 1 - c**2
    jacobian = (1 - z) + (c - h) * slope_z * a[0] + z * slope_c * a[2] * (r + h * slope_r * a[1])

    def du(adjoint):
        (g,) = adjoint
        du_c = g * z * slope_c
        return g * (c - h) * slope_z, du_c * a[2] * h * slope_r, du_c

    def dweights(du):
        return tuple(np.sum(d * x, axis=(0, 1)) for d, x in zip(du, (h, h, r * h), strict=True))

    return ((jacobian,),), du, dweights


def _lstm_local(u, w, before, after):
    (c, h), (new_c, _) = before, after
    f = _sigmoid(w[0] * h + u[:, :, 0] + w[3] * c)
    z = np.tanh(w[2] * h + u[:, :, 2])
    o = _sigmoid(w[1] * h + u[:, :, 1] + w[4] * new_c)
    t = np.tanh(new_c)
    slope_f, slope_z, slope_o = f * (1 - f), 1 - z**2, o * (1 - o)
    c_c = f + (c - z) * slope_f * w[3]
    c_h = (c - z) * slope_f * w[0] + (1 - f) * slope_z * w[2]
    h_of_c = o * (1 - t**2) + t * slope_o * w[4]
    jacobian = ((c_c, c_h), (h_of_c * c_c, t * slope_o * w[1] + h_of_c * c_h))

    def du(adjoint):
        g_c, g_h = adjoint
        g_c = g_c + g_h * h_of_c
        return g_c * (c - z) * slope_f, g_h * t * slope_o, g_c * (1 - f) * slope_z

    def dweights(du):
        of = (du[0] * h, du[1] * h, du[2] * h, du[0] * c, du[1] * new_c)
        return tuple(np.sum(x, axis=(0, 1)) for x in of)

    return jacobian, du, dweights
