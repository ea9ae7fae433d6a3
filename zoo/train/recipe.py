"""What a run is: one frozen dataclass, checked when it is made."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from hackle.layers.multiverse import MAX_DEPTH
from hackle.zoo.errors import UserError, unknown
from hackle.zoo.train.optimizer import SCHEDULES, AdamW, Schedule, schedule
from hackle.zoo.train.step import MODES

# What a resumed run may change: how often it looks up, where things are, and how the same
# computation is laid out. (Only with the same `preset`, `attention`, `recurrence` and `remat` is
# the continuation bitwise equal.) The number of steps is not among them, since the schedule hangs
# on it.
FREE_ON_RESUME = frozenset({
    "data_dir", "preset", "attention", "recurrence", "remat",
    "eval_every", "eval_batches", "save_every", "keep", "log_every", "max_nonfinite", "export",
})  # fmt: skip


# In place of a folder that only the caller knows.
REQUIRED = "required"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All choices of one training run.

    Raises:
      UserError: a value that cannot be, whatever the model and the mesh are; names field, value
        and what was expected. What depends on model and mesh is checked by `Plan`.
    """

    model: str = "parscale-tiny-p4"
    """Name in the registry."""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the model's config to change, e.g. depth; `--set model.depth=2`."""
    mode: str = "all"
    """What is trained: all, or frozen_trunk (only prefixes and aggregator)."""
    start_from: str | None = None
    """Folder of a finished P=1 run: its weights become the trunk, and its data go on."""
    continue_data: bool = True
    """With start_from: begin where that run's data ended; false begins anew."""

    corpus: str = "python"
    """python (the standard library), a folder of text files, random (tokens, for speed), a set of
    generated problems (mapreduce, mapreduce-easy, ...), or published Multiverse rows (*.jsonl)."""
    data_dir: str = "data"
    """Where prepared data lie."""
    tokenizer: str | None = None
    """A tokenizer.json to use; none trains one of vocab_size on the corpus."""
    vocab_size: int = 4096
    """Of the tokenizer and the model."""
    packing: str = "documents"
    """documents (each sees itself only), stream (rows of one segment), or branches (documents
    whose sibling paths do not see each other; problems and Multiverse rows only)."""
    branch_depth: int = 2
    """With branches: blocks inside one another, at most."""
    length: int = 256
    """Tokens in a row."""
    batch: int = 16
    """Rows in a step, over all devices and microbatches."""
    accumulate: int = 1
    """Microbatches of a step."""

    steps: int = 200
    """Steps of the whole run."""
    schedule: str = "cosine"
    """cosine, wsd (warm-up, stable, decay) or constant."""
    learning_rate: float = 1e-3
    """At the peak."""
    warmup: int = 20
    """Steps of linear rise."""
    decay: int = 0
    """Steps of linear fall at the end of wsd; 0 is its stable phase alone."""
    final: float = 0.1
    """Last learning rate, as a share of the peak."""
    weight_decay: float = 0.1
    """On matrices; norms, biases and prefixes have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float | None = 1.0
    """Bound of the global gradient norm, or none."""
    state_clip: float | None = None
    """Bound of the norm of a recurrence's state matrices after every step, or none."""
    z_loss: float = 0.0
    """Coefficient of the mean squared log normaliser."""
    seed: int = 0
    """Of parameters and data order."""
    workers: int = 0
    """Processes that make batches ahead; 0 is a thread of this one."""
    max_nonfinite: int = 10
    """The run ends after so many steps in a row without a finite loss and gradient."""

    preset: str = "cpu1"
    """Mesh, placement and dtypes; see hackle.pjit_configs."""
    attention: str | None = None
    """Attention implementation; none chooses."""
    recurrence: str | None = None
    """Method of a recurrence; none chooses."""
    remat: str = "preset"
    """What the backward pass recomputes: none, dots, full, or what the preset says."""

    eval_every: int = 100
    """Steps between validations; 0 validates at the end only."""
    eval_batches: int = 8
    """Batches of a validation, always the same; 0 never validates."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Checkpoints kept; 0 saves none."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    export: bool = True
    """Write the published layout into OUT/model at the end."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _typed(field.name, value, _TYPES[field.name]))
        for name in ("vocab_size", "length", "batch", "accumulate", "steps", "log_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "length", self.length >= 2, "at least 2")
        for name in (
            "warmup", "decay", "weight_decay", "z_loss", "seed",
            "workers", "eval_every", "eval_batches", "save_every", "keep",
        ):  # fmt: skip
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        _require(self, "branch_depth", 1 <= self.branch_depth <= MAX_DEPTH, f"1 to {MAX_DEPTH}")
        _require(self, "max_nonfinite", self.max_nonfinite >= 1, "at least 1")
        _require(self, "learning_rate", self.learning_rate > 0, "more than 0")
        _require(self, "final", 0 <= self.final <= 1, "between 0 and 1")
        for name in ("beta1", "beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("clip", "state_clip"):
            bound = getattr(self, name)
            _require(self, name, bound is None or bound > 0, "more than 0, or none")
        _require(self, "mode", self.mode in MODES, f"one of {', '.join(MODES)}")
        _require(self, "schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        _require(self, "batch", self.batch % self.accumulate == 0,
                 f"a multiple of accumulate={self.accumulate}")  # fmt: skip
        _require(self, "decay", self.decay == 0 or self.schedule == "wsd",
                 f"0, since schedule={self.schedule!r} has no decay phase")  # fmt: skip
        self.learning_rates()

    def learning_rates(self) -> Schedule:
        """The schedule of this run."""
        return schedule(
            self.schedule,
            self.learning_rate,
            steps=self.steps,
            warmup=self.warmup,
            decay=self.decay,
            final=self.final,
        )

    def optimizer(self) -> AdamW:
        return AdamW(
            self.beta1,
            self.beta2,
            weight_decay=self.weight_decay,
            clip=self.clip,
            state_clip=self.state_clip,
        )

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, padding too."""
        return self.steps * self.batch * self.length

    def replace(self, **changes: Any) -> "Recipe":
        """A changed copy; `overrides` are merged.

        Raises:
          UserError: no such field, or a bad value.
        """
        for name in changes:
            if name not in _TYPES:
                raise unknown("recipe field", name, _TYPES)
        if isinstance(changes.get("overrides"), Mapping):
            changes["overrides"] = {**self.overrides, **changes["overrides"]}
        return dataclasses.replace(self, **changes)

    def set(self, assignments: Iterable[str]) -> "Recipe":
        """A copy with `key=value` texts applied; `model.<field>=value` goes to `overrides`.

        Raises:
          UserError: not of this form, no such field, or a value that the field cannot take.
        """
        changes: dict[str, Any] = {}
        overrides: dict[str, Any] = {}
        for text in assignments:
            name, equals, value = text.partition("=")
            name, value = name.strip(), value.strip()
            if not equals or not name:
                raise UserError(f"--set {text!r} is not of the form key=value")
            if name.startswith("model."):
                overrides[name.removeprefix("model.")] = _literal(value)
            elif name not in _TYPES or name == "overrides":
                raise unknown("recipe field", name, _TYPES)
            else:
                changes[name] = _parse(name, value, _TYPES[name])
        if overrides:
            changes["overrides"] = overrides
        return self.replace(**changes)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "overrides": dict(self.overrides)}


_TYPES: dict[str, Any] = typing.get_type_hints(Recipe)


def field_names() -> list[str]:
    """Fields of a recipe, in order."""
    return [field.name for field in dataclasses.fields(Recipe)]


def _require(recipe: Recipe, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}={getattr(recipe, name)!r}; expected {expected}")


def _allowed(hint: Any) -> tuple[type, ...]:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(part) or part for part in parts)


def _typed(name: str, value: Any, hint: Any) -> Any:
    allowed = _allowed(hint)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool) and bool not in allowed:
        raise UserError(f"{name}={value!r}; expected {_names(allowed)}")
    if not isinstance(value, allowed):
        raise UserError(f"{name}={value!r}; expected {_names(allowed)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value!r}; expected a finite number")
    return value


_TYPE_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false",
               types.NoneType: "none"}  # fmt: skip


def _names(allowed: tuple[type, ...]) -> str:
    return " or ".join(_TYPE_NAMES.get(kind, kind.__name__) for kind in allowed)


def _parse(name: str, text: str, hint: Any) -> Any:
    allowed = _allowed(hint)
    if types.NoneType in allowed and text.lower() == "none":
        return None
    try:
        if bool in allowed:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if int in allowed:
            return int(text.replace("_", ""))
        if float in allowed:
            return float(text)
    except (KeyError, ValueError):
        raise UserError(f"{name}={text!r}; expected {_names(allowed)}") from None
    return text


def _literal(text: str) -> Any:
    """A config value: JSON where it is one, none, or plain text."""
    if text.lower() == "none":
        return None
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
