"""AdamW with a decay rule by name, clipping and projection, and learning-rate schedules."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hackle.zoo.errors import UserError

Schedule = Callable[[jax.Array | int], jax.Array]
SCHEDULES = ("cosine", "wsd", "constant")


def schedule(
    kind: str, peak: float, *, steps: int, warmup: int = 0, decay: int = 0, final: float = 0.0
) -> Schedule:
    """Learning rate of update 0, 1, 2, ...

    All kinds rise linearly to `peak` over `warmup` updates (the first is `peak / (warmup + 1)`,
    never 0). Then "cosine" falls to `final * peak` at `steps`; "wsd" (warm-up, stable, decay)
    stays at the peak and falls linearly to `final * peak` over the last `decay` updates, and with
    `decay=0` is the stable phase alone; "constant" stays.

    Raises:
      UserError: unknown kind, or phases that do not fit into `steps`.
    """
    if kind not in SCHEDULES:
        raise UserError(f"unknown schedule {kind!r}; expected one of {', '.join(SCHEDULES)}")
    tail = decay if kind == "wsd" else 0
    if steps < 1 or warmup < 0 or tail < 0 or warmup + tail > steps:
        raise UserError(
            f"schedule {kind!r}: warmup={warmup} and decay={tail} do not fit into steps={steps}; "
            "set them too"
        )
    if kind == "cosine":
        main = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=final)
    elif tail:
        stable = optax.constant_schedule(peak)
        fall = optax.linear_schedule(peak, final * peak, tail)
        main = optax.join_schedules([stable, fall], [steps - warmup - tail])
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, main], [warmup])


def decays(path: tuple[Any, ...]) -> bool:
    """The rule of weight decay: matrices do; scales, biases and prefixes do not.

    Args:
      path: state path of a parameter, e.g. `("blocks", "block", "mlp", "up", "weight")`.
    """
    leaf = str(path[-1])
    return not (leaf.endswith(("scale", "bias")) or "prefix" in path)


def is_state_weight(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is what a recurrence multiplies its state with; see `decays`."""
    return str(path[-1]) in ("state_weight", "peephole")


def mask_of(rule: Callable[[tuple[Any, ...]], bool], params: Any) -> Any:
    """Booleans in the structure of `params` (an `nnx.State`): where `rule` says yes."""

    def of_leaf(path, leaf):
        answer = rule(tuple(str(getattr(entry, "key", entry)) for entry in path))
        return leaf.replace(answer) if isinstance(leaf, nnx.Variable) else answer

    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree_util.tree_map_with_path(of_leaf, params, is_leaf=is_variable)


def project_states(bound: float) -> optax.GradientTransformation:
    """Keeps the norm of a recurrence's state matrices at most `bound`; stands last in a chain.

    The matrices of ParaRNN are diagonal, so that their norm is their largest entry, and the
    projection onto the ball of that norm clips every entry (arXiv 2510.21450: 0.5 in language
    models, 0.9 in synthetic tasks).
    """

    def project(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p: jnp.clip(p + u, -bound, bound) - p, updates, params)

    mask = functools.partial(mask_of, is_state_weight)
    return optax.masked(optax.stateless(project), mask)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Constants of the optimiser; `transform` turns them into optax.

    Attributes:
      weight_decay: coefficient, times the learning rate, on parameters that `decays` names.
      clip: bound of the global gradient norm; None leaves gradients as they are.
      state_clip: see `project_states`; None leaves state matrices as they are.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0
    state_clip: float | None = None

    def transform(self, learning_rate: Schedule) -> optax.GradientTransformation:
        """Clip, Adam moments in float32, decay, learning rate, projection."""
        clip = optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)
        last = () if self.state_clip is None else (project_states(self.state_clip),)
        return optax.chain(
            clip,
            optax.scale_by_adam(self.beta1, self.beta2, self.epsilon, mu_dtype=jnp.float32),
            optax.add_decayed_weights(self.weight_decay, mask=functools.partial(mask_of, decays)),
            optax.scale_by_learning_rate(learning_rate),
            *last,
        )
