"""The loop that everything is tested against, and the recurrences, against PyTorch in float64.

With a diagonal state matrix the reset gate of `torch.nn.GRU`, which scales what the matrix gives,
is the one that scales the state; its update gate keeps where ours renews. `torch.nn.LSTM` with an
input gate whose pre-activation is minus that of the forget gate has them coupled; peepholes it
has not.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.layers.recurrent.reference import (
    CELLS,
    METHODS,
    cotangents,
    draw,
    error,
    exact_gradients,
    gradients,
    relative_error,
    run,
    solve,
)

SHAPE = (2, 160, 8)


def by_torch(cell, u, weights, initial, of_output, of_final):
    """`(states [B,T,D], final)` and the gradients `(du, dweights, dinitial)`; no peepholes."""
    width = SHAPE[-1]
    leaf = lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    u, a, initial = leaf(u), leaf(weights[:3]), [leaf(x) for x in initial]
    # Their gates, each a row of ours and a sign.
    gates = {
        "gru": ((1, 1), (0, -1), (2, 1)),  # reset, update (keeps), new
        "lstm": ((0, -1), (0, 1), (2, 1), (1, 1)),  # input, forget, cell, output
    }[cell]
    make = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    many = len(gates) * width
    rnn = make(many, width, bias=False, batch_first=True, dtype=torch.float64)
    x = torch.cat([sign * u[:, :, row] for row, sign in gates], dim=-1)
    hidden = torch.cat([sign * torch.diag(a[row]) for row, sign in gates])
    parameters = {"weight_ih_l0": torch.eye(many, dtype=torch.float64), "weight_hh_l0": hidden}
    state = tuple(s[None] for s in initial)
    state = state[0] if cell == "gru" else (state[1], state[0])  # theirs is (h, c)
    states, final = torch.func.functional_call(rnn, parameters, (x, state))
    final = (final,) if cell == "gru" else (final[1], final[0])
    loss = (states * torch.tensor(np.asarray(of_output))).sum()
    for s, g in zip(final, of_final, strict=True):
        loss = loss + (s[0] * torch.tensor(np.asarray(g))).sum()
    loss.backward()
    number = lambda x: x.detach().numpy()
    return (
        (number(states), tuple(number(s[0]) for s in final)),
        (u.grad.numpy(), a.grad.numpy(), tuple(s.grad.numpy() for s in initial)),
    )


@pytest.mark.parametrize("cell", CELLS)
def test_torch_agrees(cell):
    u, weights, initial, _ = draw(cell, SHAPE, 0.9)
    weights = weights.at[3:].set(0)
    seeds = cotangents(cell, SHAPE)
    values, slopes = by_torch(cell, u, weights, initial, *seeds)

    states, last = solve(cell, u, weights, initial)
    assert error((states[-1], last), values) < 1e-12
    exact = exact_gradients(cell, u, weights, initial, None, *seeds)
    assert relative_error((exact[0], exact[1][:3], exact[2]), slopes) < 1e-12

    never = jnp.zeros(SHAPE[:2], bool)
    for method in METHODS:
        assert error(run(cell, method, u, weights, initial, never), values) < 5e-6
        du, dweights, dinitial = gradients(cell, method, u, weights, initial, never, *seeds)
        assert relative_error((du, dweights[:3], dinitial), slopes) < 1e-5
