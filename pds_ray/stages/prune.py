"""Pruning: the int(ratio * N) pairs of lowest cosine are dropped (docs/methods.md, "prune").

Exact without gathering the N cosines: two histograms over the bits of the float32 values find the
threshold (a radix selection), then ties at the threshold are dropped in shard order. Memory is
O(65,536) per shard, whatever N.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BUCKETS = 1 << 16


def sort_key(similarity: np.ndarray) -> np.ndarray:
    """Map float32 [n] to uint32 [n] with the same order; -0.0 sorts as 0.0."""
    bits = (similarity.astype(np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def histogram(similarity: np.ndarray, high: int | None = None) -> np.ndarray:
    """Count by the upper 16 bits of the sort key; with `high`, by the lower 16 bits.

    Only keys whose upper bits are `high` are then counted. float32 [n] -> int64 [65536].
    """
    keys = sort_key(similarity)
    if high is None:
        return np.bincount(keys >> 16, minlength=BUCKETS)
    return np.bincount(keys[(keys >> 16) == high] & 0xFFFF, minlength=BUCKETS)


def find_bucket(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Return the bucket that holds the item of 0-based `rank`, and the items before that bucket."""
    ends = np.cumsum(counts)
    bucket = int(np.searchsorted(ends, rank, side="right"))
    return bucket, int(ends[bucket] - counts[bucket])


@dataclass(frozen=True)
class Threshold:
    """The key below which pairs are dropped, with the first `ties` equal to it in shard order."""

    key: int
    ties: int


def drop_count(ratio: float, pairs: int) -> int:
    """Return int(ratio * N), the rounding of the published code."""
    return int(ratio * pairs)


def count_ties(similarity: np.ndarray, threshold: Threshold) -> int:
    """Count the pairs of a shard exactly at the threshold."""
    return int((sort_key(similarity) == threshold.key).sum())


def keep_mask(similarity: np.ndarray, threshold: Threshold, ties_before: int) -> np.ndarray:
    """Mark the pairs of a shard that stay, given the ties in the shards before it. bool [n]."""
    keys = sort_key(similarity)
    tied = np.flatnonzero(keys == threshold.key)
    kept = keys >= threshold.key
    kept[tied[: max(0, threshold.ties - ties_before)]] = False
    return kept
