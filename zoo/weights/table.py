"""How one parameter of ours corresponds to published tensors: a name, a regrouping, an order.

A row is written with the names of the axes on both sides, for instance
`("(h e) d", "d h e")`: the published matrix `[H*E, D]` is our array `[D, H, E]`. The same row
serves reading and writing, for whole tensors and for slices of them.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

Bounds = tuple[tuple[int, int], ...]  # [start, stop) per dimension


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a family's table.

    Attributes:
      path: our state path, joined by dots.
      name: published tensor name. With `{layer}` in it, our array has a leading depth axis and
        there is one tensor per layer.
      published: axis names of the published tensor; `(a b)` is one dimension, `a` the slow axis.
      ours: axis names of our array without the depth axis; the same names in another order, no
        groups.

    Raises:
      ValueError: the two sides do not name the same axes.
    """

    path: str
    name: str
    published: str
    ours: str

    def __post_init__(self):
        if sorted(self._flat) != sorted(self._axes) or len(set(self._axes)) != len(self._axes):
            raise ValueError(f"row {self.path!r}: {self.published!r} and {self.ours!r} differ")

    @property
    def stacked(self) -> bool:
        """Whether our array has a leading depth axis."""
        return "{layer}" in self.name

    @property
    def _axes(self) -> list[str]:
        return self.ours.split()

    @property
    def _groups(self) -> list[list[str]]:
        return [(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\S+)", self.published)]

    @property
    def _flat(self) -> list[str]:
        return [axis for group in self._groups for axis in group]

    def names(self, shape: Sequence[int]) -> list[str]:
        """Published names of our array of `shape`, layer by layer if it is stacked."""
        if not self.stacked:
            return [self.name]
        return [self.name.format(layer=layer) for layer in range(shape[0])]

    def published_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of each published tensor of our array of `shape` (depth axis included)."""
        size = self._sizes(shape)
        return tuple(math.prod(size[axis] for axis in group) for group in self._groups)

    def _sizes(self, shape: Sequence[int]) -> dict[str, int]:
        inner = tuple(shape)[1:] if self.stacked else tuple(shape)
        if len(inner) != len(self._axes):
            raise ValueError(f"{self.path} has shape {tuple(shape)}; the table says {self.ours!r}")
        return dict(zip(self._axes, inner, strict=True))

    def to_published(self, array: np.ndarray) -> np.ndarray:
        """Our array (of one layer) in the published form."""
        sizes = dict(zip(self._axes, array.shape, strict=True))
        shape = [math.prod(sizes[axis] for axis in group) for group in self._groups]
        return array.transpose([self._axes.index(axis) for axis in self._flat]).reshape(shape)

    def read(self, tensor: np.ndarray, shape: Sequence[int], bounds: Bounds) -> np.ndarray:
        """The part `bounds` of our array (of one layer), taken from the published tensor.

        Of a grouped dimension the slow axis is sliced before anything is touched, so that only
        what is needed is read from a memory map.

        Args:
          tensor: the published tensor, usually a memory map.
          shape: shape of our whole array, depth axis included.
          bounds: per axis of ours, depth axis not included.

        Returns:
          A view of `tensor` or a copy; the caller must not write to it.
        """
        size = self._sizes(shape)
        bound = dict(zip(self._axes, bounds, strict=True))
        outer, view, inner = [], [], []
        for first, *rest in self._groups:
            fast = math.prod(size[axis] for axis in rest)
            start, stop = bound[first]
            outer.append(slice(start * fast, stop * fast))
            view += [stop - start, *(size[axis] for axis in rest)]
            inner += [slice(None), *(slice(*bound[axis]) for axis in rest)]
        part = tensor[tuple(outer)].reshape(view)[tuple(inner)]
        return part.transpose([self._flat.index(axis) for axis in self._axes])


def by_path(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows of a table by our path.

    Raises:
      ValueError: a path or a published name stands in two rows.
    """
    rows = list(rows)
    for kind, keys in (("path", [r.path for r in rows]), ("name", [r.name for r in rows])):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"table lists {kind} {', '.join(twice)} twice")
    return {row.path: row for row in rows}
