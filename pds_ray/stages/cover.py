"""Choice of pairs that cover the whitened space (docs/methods.md, "cover").

Among C candidates with whitened image z and caption u, a share of the pairs is picked by herding in
the product kernel, so that the mean of z u^T follows that of all. The others are picked by facility
location (Nemhauser, Wolsey, Fisher, 1978): with those before them they maximise

    F(A) = sum over i of max over a in A of x_i . x_a,    x = [ z, u ] / sqrt(2)

The greedy choice is exact: gains only fall as picks are added (Minoux, 1978), so that most need not
be computed again. No C x C matrix is held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 1_024
"""Candidates whose gains are computed at once."""
AGAIN = 32
"""Gains computed again at once, the highest first."""


PART = 20_000
"""Candidates that one task picks among."""
FEWEST, PER_PAIR = 20_000, 10
"""Candidates by default: at least, and for each pair."""
AXIS_ROWS = 20_000
"""Candidates from which the axis is computed along which a part is halved."""


def candidates_of(pairs: int, wanted: int) -> int:
    """Return the number of candidates for so many pairs, never fewer; `wanted` 0 is the default."""
    return max(wanted, pairs) if wanted else max(FEWEST, PER_PAIR * pairs)


def parts_of(count: int) -> int:
    """Return the number of parts of so many candidates."""
    parts = 1
    while -(-count // parts) > PART:
        parts *= 2
    return parts


def candidate_bytes(count: int, dim: int) -> int:
    """Return the bytes of `count` candidates: whitened image and caption, as float32."""
    return 2 * 4 * dim * count


def best_pairs(image_row: np.ndarray, similarity: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the kept pair of highest cosine of each image, the first of equals.

    Integers [n], float32 [n], bool [n] -> int64 rows, ascending by image.
    """
    rows = np.flatnonzero(kept)
    order = rows[np.lexsort((rows, -similarity[rows], image_row[rows]))]
    _, first = np.unique(image_row[order], return_index=True)
    return order[first]


def lowest(ranks: np.ndarray, pairs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` lowest ranks, ascending, and their pairs; of equals the first."""
    order = np.argsort(ranks, kind="stable")[:count]
    return ranks[order], pairs[order]


def rank(seed: int, key: str, caption: str) -> int:
    """Return a number below 2**64, as good as random, that a pair has in any shard."""
    digest = hashlib.blake2b(f"{seed}\0{key}\0{caption}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class Candidates:
    """C pairs that may be chosen, no two of one image."""

    image: np.ndarray
    """float32 [C, d]: whitened images, unit rows."""
    text: np.ndarray
    """float32 [C, d]: whitened captions, unit rows."""

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: np.ndarray) -> Candidates:
        """Return some of them."""
        return Candidates(self.image[rows], self.text[rows])

    def similarity(self, rows: np.ndarray) -> np.ndarray:
        """Return x_i . x_a of all candidates i and some rows a. float32 [C, len(rows)]."""
        both = self.image @ self.image[rows].T
        both += self.text @ self.text[rows].T
        both /= 2
        return both


def choose(candidates: Candidates, pairs: int, herded: float) -> Iterator[int]:
    """Yield the rows of `pairs` candidates: a share `herded` by herding, then those that cover."""
    first = []
    for row in herding(candidates, round(herded * pairs)):
        first.append(row)
        yield row
    yield from facility_location(candidates, pairs - len(first), first)


def herding(candidates: Candidates, pairs: int) -> Iterator[int]:
    """Yield `pairs` picks that each bring the mean of z u^T nearest to C, that of all candidates.

    With S the sum of t picks, |S + z u^T - (t + 1) C| in the Frobenius norm is least where
    (t + 1) z'Cu - sum over picks s of (z.z_s)(u.u_s) is greatest: all z and u have length 1.
    """
    image, text = candidates.image, candidates.text
    mean = image.T @ text / np.float32(max(len(image), 1))
    wanted = np.einsum("nd,nd->n", image @ mean, text).astype(np.float64)
    served = np.zeros(len(image))
    taken = np.zeros(len(image), bool)
    for picks in range(pairs):
        best = int(np.where(taken, -np.inf, (picks + 1) * wanted - served).argmax())
        yield best
        taken[best] = True
        served += (image @ image[best]) * (text @ text[best])


def facility_location(
    candidates: Candidates, pairs: int, first: Sequence[int] = ()
) -> Iterator[int]:
    """Yield the rows of `pairs` candidates, each with the highest gain; the first of equals.

    What the picks `first` cover already is no gain.
    """
    covered = np.full(len(candidates), -1, np.float32)  # by no pick yet: the lowest cosine
    for pick in first:
        np.maximum(covered, candidates.similarity(np.array([pick]))[:, 0], out=covered)
    gains = np.concatenate(
        [
            _gains(candidates, np.arange(start, min(start + BLOCK, len(candidates))), covered)
            for start in range(0, len(candidates), BLOCK)
        ]
    )
    gains[list(first)] = -np.inf
    known = np.zeros(len(candidates), np.int64)  # number of picks when the gain was computed
    for picks in range(pairs):
        while known[best := int(gains.argmax())] < picks:
            stale = np.flatnonzero((known < picks) & np.isfinite(gains))
            highest = np.argpartition(-gains[stale], min(AGAIN, len(stale)) - 1)[:AGAIN]
            rows = np.sort(stale[highest])
            gains[rows], known[rows] = _gains(candidates, rows, covered), picks
        yield best
        gains[best] = -np.inf
        np.maximum(covered, candidates.similarity(np.array([best]))[:, 0], out=covered)


def _gains(candidates: Candidates, rows: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Return by how much each of some candidates would raise F. float64 [len(rows)]."""
    more = candidates.similarity(rows)
    more -= covered[:, None]
    return np.maximum(more, 0, out=more).sum(axis=0, dtype=np.float64)


def split(candidates: Candidates, most: int) -> list[np.ndarray]:
    """Return rows of the candidates in parts of at most `most`, ascending in each.

    All are halved at the median along their principal axis, then the halves, until they are small
    enough: near ones stay together, and parts differ by at most one.
    """
    parts = [np.arange(len(candidates))]
    while len(parts[0]) > most:
        parts = [half for part in parts for half in _halves(candidates, part)]
    return parts


def _halves(candidates: Candidates, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the halves of a part; the first is larger by one if they differ."""
    some = rows[:AXIS_ROWS]  # candidates are in a random order
    both = np.concatenate([candidates.image[some], candidates.text[some]], axis=1)
    centred = both.astype(np.float64) - both.mean(axis=0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    on_image, on_text = np.split(axes[:, -1].astype(np.float32), 2)
    place = np.einsum("nd,d->n", candidates.image[rows], on_image)
    place += np.einsum("nd,d->n", candidates.text[rows], on_text)
    order = rows[np.argsort(place, kind="stable")]
    middle = (len(rows) + 1) // 2
    return np.sort(order[:middle]), np.sort(order[middle:])


def shares(sizes: list[int], pairs: int) -> list[int]:
    """Return how many of `pairs` picks parts of these sizes get: in proportion to their size.

    What rounding leaves over goes to the largest remainders, the first of equals.
    """
    total = sum(sizes)
    pairs = min(pairs, total)
    exact = [pairs * size for size in sizes]
    counts = [share // max(total, 1) for share in exact]
    left = np.argsort([-(share % max(total, 1)) for share in exact], kind="stable")
    for part in left[: pairs - sum(counts)]:
        counts[part] += 1
    return counts


def interleaved(picks: list[np.ndarray]) -> np.ndarray:
    """Return the picks of all parts in one order: each part's own, the parts evenly mixed."""
    place = np.concatenate([(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in picks])
    return np.concatenate(picks)[np.argsort(place, kind="stable")]
