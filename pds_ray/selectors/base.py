"""The interface of a selector: of all real image-caption pairs it picks some, one by one.

No image is picked twice, whatever the method: K pairs show K images, as K prototypes do. Where
several captions belong to an image this makes a baseline stronger than one that may repeat an
image.

The joint embedding of a pair is a unit vector,

    x_n = [ v_n / |v_n| , t_n / |t_n| ] / sqrt(2)      (docs/methods.md, "Selectors")

It is never built: an image's half would be repeated for each of its captions. Dot products with it
are sums of two, which is all that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pds_ray.config import SelectConfig

BLOCK = 65_536  # rows a thread takes at a time


@dataclass(frozen=True)
class Candidates:
    """All pairs of a source as embeddings: N pairs of n images, width d."""

    image: np.ndarray
    """float32 [n, d], unit rows."""
    text: np.ndarray
    """float32 [N, d], unit rows."""
    owner: np.ndarray
    """int64 [N]: the row of each pair's image."""
    similarity: np.ndarray
    """float32 [N]: cosine of each pair's image and text."""
    tell: Callable[[str], object] = lambda _what: None
    """Called now and then with what the first pick waits for."""

    def __len__(self) -> int:
        return len(self.owner)

    def joint(self, pair: int) -> np.ndarray:
        """Return the joint embedding of one pair. float32 [2 d]."""
        both = [self.image[self.owner[pair]], self.text[pair]]
        return np.concatenate(both) / np.float32(math.sqrt(2))

    def joint_mean(self) -> np.ndarray:
        """Return the mean joint embedding of all pairs, summed in float64. float64 [2 d]."""
        captions = np.bincount(self.owner, minlength=len(self.image))
        image = np.einsum("n,nd->d", captions, self.image, dtype=np.float64)
        text = self.text.sum(axis=0, dtype=np.float64)
        return np.concatenate([image, text]) / (math.sqrt(2) * len(self))

    def joint_dots(self, query: np.ndarray) -> np.ndarray:
        """Return the dot products of all joint embeddings with a vector [2 d]. float32 [N].

        Equal pairs have equal ones.
        """
        on_image, on_text = np.split(query.astype(np.float32) / np.float32(math.sqrt(2)), 2)
        return _dots(self.image, on_image)[self.owner] + _dots(self.text, on_text)

    def same_image(self, pair: int) -> np.ndarray:
        """Mark the pairs that share this pair's image, itself among them. bool [N]."""
        return self.owner == self.owner[pair]

    def one_per_image(self, order: np.ndarray) -> np.ndarray:
        """Return the first pair of each image among pairs in some order, int64 [N]. int64 [n]."""
        _, first = np.unique(self.owner[order], return_index=True)
        return order[np.sort(first)]


def _dots(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return dot products that are functions of their row alone. float32 [n, d], [d] -> [n].

    Not by BLAS, which rounds a row by its place and by the number of threads.
    """
    result = np.empty(len(rows), np.float32)

    def block(start: int) -> None:
        part = slice(start, start + BLOCK)
        np.einsum("nd,d->n", rows[part], query, out=result[part])

    with ThreadPoolExecutor() as threads:
        list(threads.map(block, range(0, len(rows), BLOCK)))
    return result


class Selector(Protocol):
    """A module that the catalog names as a selector."""

    DESCRIPTION: str
    """Method, source and preference, for the card of the set; no full stop."""

    def select(
        self, candidates: Candidates, pairs: int, seed: int, config: SelectConfig
    ) -> Iterator[int]:
        """Yield the rows of `pairs` chosen pairs, at most as many as images, as each is picked.

        A function of its arguments, whatever the number of threads; of pairs that are equally good
        the first is picked.
        """
        ...
