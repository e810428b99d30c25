"""The rows nearest to each query: products of low precision find candidates, exact sums decide.

There are two measures: the cosine (that with a vector of zeros is 0), and the squared distance. To
the products both are distances: of unit vectors |x - y|^2 = 2 - 2 cos(x, y), and a vector of zeros
counts as a unit vector at right angles to all others.

A vector, shifted as all are, is rounded to h; the norm r of what that took is computed. h carries
-|h|^2 / 2 in further columns, so that one matrix product gives -D^2 / 2, D = |h_x - h_y|. By the
triangle inequality the true distance is D up to r_x + r_y; rounding of the product itself is
bounded, too. So no row is lost that may be the nearest. The few that are left are ranked in
float64, by sums in a fixed order. Thus an answer is the same bytes for any precision of the
products, size of blocks, number of threads and device.

Arrays are PyTorch's where it multiplies, on a GPU or bfloat16, else NumPy's, so that a CPU without
bfloat16 never imports PyTorch. All is written once: both libraries have the functions that are
used, under the same names.

Vectors with NaN or infinity are near to nothing: such a row is never found, such a query finds no
row.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

Array = Any  # of NumPy or of PyTorch
Role = Literal["query", "row"]


@dataclass(frozen=True)
class Block:
    """The size of a product."""

    queries: int
    rows: int
    kept: int
    """Rows whose scores are in memory at once, a multiple of `rows`."""


# A CPU's products are 4 MiB, which its cache holds, and 16 MiB are kept; a GPU's are 512 MiB.
BLOCKS = {"cpu": Block(512, 4_096, 16_384), "cuda": Block(8_192, 16_384, 16_384)}
VECTORS_AT_ONCE = {"cpu": 128, "cuda": 8_192}  # rounded at once, in float64
PAIRS_AT_ONCE = {"cpu": 256, "cuda": 16_384}  # ranked exactly at once
GROUP = 32  # rows of which only the highest score is looked at first
# candidates of a query from which a fine product is cheaper than an exact sum for each: one more
# for every so many rows
FEW, ROWS_PER_CANDIDATE = 16, 64
LARGEST = 2.0**40  # far larger values have no squares in float32
SHIFTED_BY = 1_000  # vectors whose mean all are shifted by
TRIED = (512, 512, 768)  # rows, queries and dimensions of the product that is timed
CPU_INFO = Path("/proc/cpuinfo")  # of Linux

# The error of a sum of products, per term and in units of the sum of their sizes. A CPU rounds
# each step to the nearest float32, 2^-24. A tensor core cuts off, at 2^-23, what it has aligned to
# the largest term (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021). More than
# twice that is allowed for here, as squares are summed, too.
CPU_SUM, GPU_SUM = 2.0**-23, 2.0**-21


@dataclass(frozen=True)
class Arithmetic:
    """Types and errors of a product."""

    stored: str
    """Type of the vectors that are multiplied."""
    scores: str
    """Type of the results."""
    work: str
    """Type in which they are shifted."""
    pieces: int
    """Numbers of the stored type that add up to one of the type of the work."""
    summed: float
    """Error of a sum, per term."""
    result: float
    """Error of storing a result, relative."""


FINE = Arithmetic("float64", "float64", "float64", 1, 2.0**-50, 0.0)
PLAIN = Arithmetic("float32", "float32", "float32", 1, CPU_SUM, 0.0)
FAST = Arithmetic("bfloat16", "bfloat16", "float32", 3, CPU_SUM, 2.0**-8)
GPU = Arithmetic("bfloat16", "float32", "float32", 3, GPU_SUM, 0.0)


def coarse(device: str) -> Arithmetic:
    """Return the arithmetic of the first pass."""
    if device != "cpu":
        return GPU
    return FAST if has_fast_bfloat16() else PLAIN


@functools.cache
def has_fast_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32.

    It is tried, in some 20 ms, as each kind of CPU has another name for that. No answer depends on
    it. A CPU that lacks bfloat16 is not tried, as PyTorch takes seconds and 0.5 GiB to import.
    """
    if not _knows_bfloat16():
        return False
    import torch

    rows, queries, dim = TRIED
    seconds = []
    for xp, dtype in ((torch, torch.bfloat16), (np, np.float32)):
        left, right = xp.ones((rows, dim), dtype=dtype), xp.ones((queries, dim), dtype=dtype)
        tries = []
        for _ in range(4):  # the first one sets up
            began = time.perf_counter()
            _product(left, right, xp.empty((rows, queries), dtype=dtype))
            tries.append(time.perf_counter() - began)
        seconds.append(min(tries))
    low, plain = seconds
    return low < plain


def _knows_bfloat16() -> bool:
    """Return whether this CPU may have instructions for bfloat16: on Linux their names say so."""
    return not CPU_INFO.exists() or "bf16" in CPU_INFO.read_text()


def _library(array: Array) -> Any:
    """Return numpy or torch, to which an array belongs."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def _on(array: np.ndarray, device: str) -> Array:
    """Return an array that is not to be written to, of PyTorch if on a GPU."""
    return array if device == "cpu" else _tensor(array).to(device)


def _tensor(array: Array) -> Array:
    """Return an array of either library as one of PyTorch that is not to be written to."""
    import torch

    with warnings.catch_warnings():  # of arrays that are read-only, as Ray's are
        warnings.simplefilter("ignore")
        return torch.as_tensor(array)


def _on_host(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _product(rows: Array, queries: Array, scores: Array) -> None:
    """Multiply vectors [n, k] and [b, k] into scores [n, b]."""
    if isinstance(scores, np.ndarray):
        np.matmul(rows, queries.T, out=scores)
        return
    import torch

    if rows.dtype == scores.dtype:
        torch.mm(rows, queries.T, out=scores)
    else:
        torch.mm(rows, queries.T, out_dtype=scores.dtype, out=scores)


# ---- vectors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """Rounded vectors on a device, and what is known of them."""

    columns: Array
    """[n, k]: h, its own -|h|^2 / 2, ones for that of the other side; a row has them swapped."""
    residual: Array
    """float64 [n]: a bound of the norm of what rounding took."""
    square: Array
    """float64 [n]: |h|^2, and 1 more for a vector of zeros that should be a unit vector."""
    usable: Array
    """bool [n]: True where finite."""
    longest: float
    """The largest norm of those."""

    def part(self, some: slice) -> Rounded:
        """Return some of them."""
        return replace(
            self,
            columns=self.columns[some],
            residual=self.residual[some],
            square=self.square[some],
            usable=self.usable[some],
        )


@np.errstate(all="ignore")  # values that are too large or not finite
def rounded(
    raw: Array, role: Role, unit: bool, shift: np.ndarray, arithmetic: Arithmetic
) -> Rounded:
    """Bring vectors, float32 [n, d], to unit length if asked to, shift them and round them."""
    xp, device = _library(raw), raw.device
    step = VECTORS_AT_ONCE["cpu" if str(device) == "cpu" else "cuda"]
    work, stored = getattr(xp, arithmetic.work), getattr(xp, arithmetic.stored)
    (count, dim), pieces = raw.shape, arithmetic.pieces
    own, ones = dim + pieces * (role == "row"), dim + pieces * (role == "query")
    width = -(-(dim + 2 * pieces) // 8) * 8  # as tensor cores like it
    columns = xp.zeros((count, width), dtype=stored, device=device)
    columns[:, ones : ones + pieces] = 1
    residual, square, norm = xp.zeros((3, count), dtype=xp.float64, device=device)
    moved = xp.asarray(shift, dtype=work, device=device)
    eps, least = float(xp.finfo(work).eps), float(xp.finfo(work).tiny) ** 0.5
    for start in range(0, count, step):
        some = slice(start, start + step)
        values = xp.asarray(raw[some], dtype=xp.float64)  # which holds all their squares
        norms = xp.sqrt(xp.square(values).sum(axis=1))
        norm[some], usable = norms, xp.isfinite(norms)
        values[~usable] = 0
        zero = 0.0
        if unit:
            zero = norms == 0
            values *= (1 / xp.where(norms > 0, norms, 1.0))[:, None]
        values = xp.asarray(values, dtype=work) - moved
        columns[some, :dim] = values
        near = xp.asarray(columns[some, :dim], dtype=work)
        squares = xp.square(near).sum(axis=1) + zero
        square[some] = squares
        # rounding, which is summed; shifting; unit length; values too small for the type
        if stored != work:
            lost = xp.sqrt(xp.square(values - near).sum(axis=1))
            residual[some] = lost * (1 + dim * eps)
        residual[some] += 2 * eps * (xp.sqrt(square[some]) + unit) + dim * 2.0**-52 * unit
        residual[some] += 2**12 * least
        rest = squares / -2
        for piece in range(own, own + pieces):
            columns[some, piece] = rest
            rest = rest - xp.asarray(columns[some, piece], dtype=work)
        columns[some, own][~usable] = float(xp.finfo(stored).min) / 8  # further than any
    usable = xp.isfinite(norm)
    longest = float(norm[usable].max()) if bool(usable.any()) else 0.0
    return Rounded(columns, residual, square, usable, longest)


class Vectors:
    """One side of a search, float32 [n, d], with its rounded form.

    A side that stays while the other changes is made once: by `as_queries` or `as_centroids`.
    """

    def __init__(
        self,
        raw: np.ndarray,
        role: Role,
        unit: bool,
        device: str,
        shift: np.ndarray | None = None,
    ) -> None:
        self.raw = np.ascontiguousarray(raw, np.float32)
        self.role: Role = role
        self.unit, self.device = unit, device
        self.shift = _middle(self.raw, unit) if shift is None else shift

    @functools.cached_property
    def values(self) -> Array:
        """The vectors on the device, float32 [n, d], not to be written to."""
        return _on(self.raw, self.device)

    @functools.cached_property
    def coarse(self) -> Rounded:
        """The form for the first pass."""
        arithmetic = coarse(self.device)
        low = arithmetic.stored == "bfloat16"  # which NumPy lacks
        return self._rounded(_tensor(self.values) if low else self.values, arithmetic)

    def fine(self, which: np.ndarray | slice) -> Rounded:
        """Return some vectors in their form for the second pass, which is not kept."""
        return self._rounded(self.values[which], FINE)

    def _rounded(self, values: Array, arithmetic: Arithmetic) -> Rounded:
        return rounded(values, self.role, self.unit, self.shift, arithmetic)

    def opposite(self, raw: np.ndarray) -> Vectors:
        """Return vectors as the other side of a search."""
        role: Role = "row" if self.role == "query" else "query"
        return Vectors(raw, role, self.unit, self.device, self.shift)


def _middle(raw: np.ndarray, unit: bool) -> np.ndarray:
    """Return the mean of some vectors, float32 [d]. Any shift is right; this makes them short."""
    some = raw[:: 1 + len(raw) // SHIFTED_BY].astype(np.float64)
    some = some[(np.abs(some) < LARGEST).all(axis=1)]
    if unit:
        norms = np.linalg.norm(some, axis=1, keepdims=True)
        some /= np.where(norms > 0, norms, 1)
    return (some.sum(axis=0) / max(1, len(some))).astype(np.float32)


def as_queries(vectors: np.ndarray | Vectors, device: str = "cpu") -> Vectors:
    """Prepare queries, float32 [B, d], for several searches by cosine."""
    return vectors if isinstance(vectors, Vectors) else Vectors(vectors, "query", True, device)


def as_centroids(vectors: np.ndarray | Vectors, device: str = "cpu") -> Vectors:
    """Prepare centroids, float32 [K, d], for several calls of `assign`."""
    return vectors if isinstance(vectors, Vectors) else Vectors(vectors, "row", False, device)


# ---- candidates --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Queries and rows, int64 [pairs] each."""

    query: np.ndarray
    row: np.ndarray


@dataclass(frozen=True)
class Search:
    """A search for the `count` rows nearest to each query, and no further than `reach` if known."""

    queries: Vectors
    rows: Vectors
    count: int
    reach: np.ndarray
    """float64 [B]: a distance, infinite where none is known."""
    block: Block

    def coarse(self) -> Iterator[tuple[Pairs, np.ndarray]]:
        """Yield all pairs of a query with one of its nearest rows, and few others, by the block.

        Beside them, int64: the queries with too many candidates, which have no pairs.
        """
        most = FEW + 4 * self.count + len(self.rows.raw) // ROWS_PER_CANDIDATE
        arithmetic = coarse(self.queries.device)
        queries, rows = self.queries.coarse, self.rows.coarse
        if max(queries.longest, rows.longest) > LARGEST and not self.queries.unit:
            nothing = np.zeros(0, np.int64)
            yield Pairs(nothing, nothing), np.flatnonzero(_on_host(queries.usable))
            return
        for first in range(0, len(self.reach), self.block.queries):
            some = slice(first, first + self.block.queries)
            pairs, many = self._pairs(
                queries.part(some), rows.part, self.reach[some], arithmetic, most
            )
            yield Pairs(pairs.query + first, pairs.row), many + first

    def fine(self, which: np.ndarray) -> Iterator[Pairs]:
        """Yield the pairs of some queries, all of each, by an arithmetic that leaves fewer."""
        size = BLOCKS["cpu"].queries  # there may be a pair for every row
        for first in range(0, len(which), size):
            mine = which[first : first + size]
            queries, reach = self.queries.fine(mine), self.reach[mine]
            pairs, _ = self._pairs(queries, self.rows.fine, reach, FINE, np.inf)
            yield Pairs(mine[pairs.query], pairs.row)

    @np.errstate(all="ignore")  # distances that are infinite
    def _pairs(
        self,
        queries: Rounded,
        rows: Callable[[slice], Rounded],
        reach: np.ndarray,
        arithmetic: Arithmetic,
        most: float,
    ) -> tuple[Pairs, np.ndarray]:
        """Return candidates, and the queries that have more than `most`, of one block."""
        xp, device = _library(queries.columns), queries.columns.device
        nearest = xp.asarray(reach, dtype=xp.float64, device=device)
        seen = xp.zeros(len(reach), dtype=xp.float64, device=device)
        found = []
        for start in range(0, len(self.rows.raw), self.block.kept):
            some = rows(slice(start, start + self.block.kept))
            scores, highest = self._scores(queries, some, arithmetic)
            apart = queries.residual + some.residual.max()
            sizes = queries.square + some.square.max()
            slack = arithmetic.summed * queries.columns.shape[1] * sizes + 2.0**-100
            score = xp.asarray(self._last(scores, highest), dtype=xp.float64)
            score = xp.where(score > 0, 0.0, score)
            # of the last row that counts, at most
            distance = xp.sqrt(2 * (slack - score / (1 - arithmetic.result))) + apart
            nearest = xp.minimum(nearest, distance)
            furthest = self._tied(nearest) + apart
            lowest = (xp.square(furthest) / -2 - slack) * (1 + arithmetic.result)
            lowest = xp.asarray(lowest * (1 + 2.0**-20), dtype=xp.float32)  # rounded down
            near = highest >= lowest
            seen += near.sum(axis=0)
            group, query = xp.where(near & (seen <= most))
            place, row = xp.where(
                scores.reshape(-1, GROUP, len(reach))[group, :, query] >= lowest[query, None]
            )
            row, query = row + GROUP * group[place], query[place]
            exists = row < len(some.usable)  # scores are padded to whole groups
            row, query = row[exists], query[exists]
            usable = some.usable[row] & queries.usable[query]
            found.append((_on_host(query[usable]), _on_host(row[usable]) + start))
        pairs = Pairs(*(np.concatenate(each) for each in zip(*found, strict=True)))
        many = _on_host((seen > most) & queries.usable)
        many |= np.bincount(pairs.query, minlength=len(many)) > most
        given = ~many[pairs.query]
        return Pairs(pairs.query[given], pairs.row[given]), np.flatnonzero(many)

    def _scores(
        self, queries: Rounded, rows: Rounded, arithmetic: Arithmetic
    ) -> tuple[Array, Array]:
        """Return the score -D^2 / 2 of each row, [n, b], and the highest of each GROUP rows.

        n is a multiple of GROUP: there are further rows of score -inf.
        """
        xp, device = _library(queries.columns), queries.columns.device
        count, asked = len(rows.usable), len(queries.usable)
        groups = -(-count // GROUP)
        dtype = getattr(xp, arithmetic.scores)
        scores = xp.empty((groups * GROUP, asked), dtype=dtype, device=device)
        scores[count:] = -np.inf
        for start in range(0, count, self.block.rows):
            some = slice(start, min(start + self.block.rows, count))
            _product(rows.columns[some], queries.columns, scores[some])
        return scores, xp.amax(scores.reshape(groups, GROUP, asked), axis=1)

    def _last(self, scores: Array, highest: Array) -> Array:
        """Return a score that at least `count` rows reach, [b], as high as is found quickly."""
        xp = _library(scores)
        if self.count == 1:
            return xp.amax(highest, axis=0)
        if self.count > len(scores):
            return xp.full_like(highest[0], -np.inf)
        several = highest if self.count <= len(highest) else scores
        if xp is np:
            return np.partition(several, -self.count, axis=0)[-self.count]
        return several.float().topk(self.count, dim=0).values[-1]

    def _tied(self, distance: Array) -> Array:
        """Return the distance up to which a row may rank with one of this distance.

        Cosines are compared in float32, squared distances as far as float64 sums tell them apart.
        """
        if self.queries.unit:
            return (distance**2 + 2.0**-21) ** 0.5
        return distance * (1 + self.queries.raw.shape[1] * 2.0**-50)


# ---- exact values ------------------------------------------------------------------------------


def _folded(terms: Array) -> Array:
    """Sum terms, float64 [m, d], which are overwritten: halves are added until one is left.

    The order depends on d alone, so that the bytes are the same on every machine and device.
    """
    width = terms.shape[1]
    while width > 1:
        half = width // 2
        terms[:, :half] += terms[:, width - half : width]
        width -= half
    return terms[:, 0]


def _sums(terms: Callable[[Array, Array], Array], pairs: Pairs, device: str) -> np.ndarray:
    """Sum the terms of each pair, float64 [pairs], some pairs at once."""
    found, step = np.empty(len(pairs.query)), PAIRS_AT_ONCE[device]
    for start in range(0, len(found), step):
        some = slice(start, start + step)
        query, row = (_on(each[some], device) for each in (pairs.query, pairs.row))
        found[some] = _on_host(_folded(terms(query, row)))
    return found


def _exactly(vectors: Array) -> Array:
    """Return float32 vectors as new ones of float64, which holds the product of any two of them."""
    xp = _library(vectors)
    return xp.asarray(vectors, dtype=xp.float64)


def _norms(vectors: Vectors, which: np.ndarray) -> np.ndarray:
    """Return the norms of some vectors, float64 [m]."""
    own, place = np.unique(which, return_inverse=True)

    def terms(row: Array, _same: Array) -> Array:
        values = _exactly(vectors.values[row])
        values *= values
        return values

    return np.sqrt(_sums(terms, Pairs(own, own), vectors.device))[place]


def cosines(queries: Vectors, rows: Vectors, pairs: Pairs) -> np.ndarray:
    """Return the cosine of each pair, float32 [pairs]: rounded once, from float64."""

    def terms(query: Array, row: Array) -> Array:
        values = _exactly(queries.values[query])
        values *= rows.values[row]
        return values

    norms = _norms(queries, pairs.query) * _norms(rows, pairs.row)
    products = _sums(terms, pairs, queries.device)
    return (products / np.where(norms > 0, norms, 1)).astype(np.float32)


def squared_distances(queries: Vectors, rows: Vectors, pairs: Pairs) -> np.ndarray:
    """Return the squared distance of each pair, float64 [pairs]; 0 if it is its query's only one.

    That needs none to be the nearest.
    """

    def terms(query: Array, row: Array) -> Array:
        values = _exactly(queries.values[query])
        values -= rows.values[row]
        values *= values
        return values

    several = np.bincount(pairs.query)[pairs.query] > 1
    found = np.zeros(len(several))
    some = Pairs(pairs.query[several], pairs.row[several])
    found[several] = _sums(terms, some, queries.device)
    return found


# ---- answers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """The first `count` rows of each query by a key, the lowest first, then the first row."""

    key: np.ndarray
    """[B, count], infinite where there is no row."""
    row: np.ndarray
    """int32 [B, count], -1 where there is no row."""

    def add(self, pairs: Pairs, key: np.ndarray) -> None:
        """Rank the rows of some queries, all of each at once."""
        order = np.lexsort((pairs.row, key, pairs.query))
        query = pairs.query[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        kept = place < self.key.shape[1]
        order, query, place = order[kept], query[kept], place[kept]
        self.key[query, place] = key[order]
        self.row[query, place] = pairs.row[order]


def _without_copies(rows: np.ndarray, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """Return pairs whose rows all differ, and for each given pair the place of its like there."""
    used, place = np.unique(pairs.row, return_inverse=True)
    as_bytes = rows[used].view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    _, first, copy = np.unique(as_bytes, return_index=True, return_inverse=True)
    alike = used[first[copy]][place]
    codes, like = np.unique(pairs.query * len(rows) + alike, return_inverse=True)
    return Pairs(*np.divmod(codes, len(rows))), like


Measure = Callable[[Vectors, Vectors, Pairs], np.ndarray]


def _ranked(search: Search, measure: Measure, dtype: str) -> Ranked:
    """Run a search and rank what it finds by an exact measure, the lowest first."""
    shape = len(search.queries.raw), search.count
    found = Ranked(np.full(shape, np.inf, dtype), np.full(shape, -1, np.int32))
    if not len(search.queries.raw) or not len(search.rows.raw):
        return found
    crowded = []
    for pairs, many in search.coarse():
        found.add(pairs, measure(search.queries, search.rows, pairs))
        crowded.append(many)
    for pairs in search.fine(np.concatenate(crowded)):
        different, like = _without_copies(search.rows.raw, pairs)
        found.add(pairs, measure(search.queries, search.rows, different)[like])
    return found


def _negative_cosines(queries: Vectors, rows: Vectors, pairs: Pairs) -> np.ndarray:
    return -cosines(queries, rows, pairs)


def nearest_rows(
    queries: np.ndarray | Vectors,
    rows: np.ndarray,
    at_least: np.ndarray | None = None,
    device: str = "cpu",
    block: Block | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest cosine and its row for each query, the first of equals.

    float32 [B, d], [n, d] -> float32 [B], int32 [B]. Cosines are compared as the float32 that they
    are returned as. Where no row reaches the cosine `at_least`, float32 [B], which may be known
    from other rows, and where there are no rows, -inf and -1. `device` is that of the products, cpu
    or cuda, unless the queries are prepared.
    """
    cosine, row = top_rows(queries, rows, 1, at_least, device, block)
    return cosine[:, 0], row[:, 0]


def top_rows(
    queries: np.ndarray | Vectors,
    rows: np.ndarray,
    count: int,
    at_least: np.ndarray | None = None,
    device: str = "cpu",
    block: Block | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` highest cosines and their rows for each query, the first of equals first.

    float32 [B, count], int32 [B, count]; the rest is as in `nearest_rows`.
    """
    left = as_queries(queries, device)
    asked = np.full(len(left.raw), -np.inf) if at_least is None else at_least.astype(np.float64)
    reach = np.sqrt(np.maximum(2 - 2 * asked, 0))
    block = block or BLOCKS[left.device]
    search = Search(left, left.opposite(rows), count, reach, block)
    found = _ranked(search, _negative_cosines, "float32")
    cosine, lower = -found.key, -found.key < asked[:, None]
    cosine[lower], found.row[lower] = -np.inf, -1
    return cosine, found.row


def assign(
    vectors: np.ndarray,
    centroids: np.ndarray | Vectors,
    device: str = "cpu",
    block: Block | None = None,
) -> np.ndarray:
    """Return the centroid at the least squared distance to each vector, the first of equals.

    float32 [n, d], [K, d] -> int32 [n]. Distances are compared in float64. -1 for a vector that is
    not finite. `device` is as in `nearest_rows`.
    """
    right = as_centroids(centroids, device)
    left = right.opposite(vectors)
    reach = np.full(len(left.raw), np.inf)
    search = Search(left, right, 1, reach, block or BLOCKS[right.device])
    return _ranked(search, squared_distances, "float64").row[:, 0]
