"""Arrays that need not be in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """A float32 array in parts, which are read once."""

    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]
    """Some rows each, in order."""

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        """Return an array that is in memory."""
        return cls(array.shape, [array])

    @property
    def nbytes(self) -> int:
        """Its bytes, of all parts."""
        return 4 * math.prod(self.shape)

    def first(self, rows: int) -> Tensor:
        """Return its first rows."""
        return Tensor((rows, *self.shape[1:]), _first(self.parts, rows))

    def gathered(self) -> np.ndarray:
        """Return it as one array; no more than a part is in memory besides.

        Raises ValueError if its parts have fewer or more rows, as when they were read before.
        """
        found, done = np.empty(self.shape, np.float32), 0
        for part in self.parts:
            found[done : done + len(part)] = part
            done += len(part)
        if done != len(found):
            raise ValueError(f"{done} rows of {len(found)} were found")
        return found


def _first(parts: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    if not rows:
        return
    for part in parts:
        yield part[:rows]
        rows -= min(rows, len(part))
        if not rows:
            return
