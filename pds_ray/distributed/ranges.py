"""Answers cut into ranges, which are added up in the object stores of the cluster.

What the shards say of a million cells, or of the sums of 100,000 matches, is too much for one
process to receive. A tree of tasks adds it up, range by range.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from pds_ray.distributed import pools, tasks
from pds_ray.distributed.sizes import ADDED_TOGETHER, additions_at_once

Parts = Sequence[ray.ObjectRef]
"""A part of an answer for each range."""


def bounds(items: int, ranges: int) -> list[int]:
    """Return the bounds of ranges of about the same length, from 0 to `items`."""
    return np.linspace(0, items, ranges + 1).astype(int).tolist()


def added_up(
    function: Callable[..., Iterator[Any]],
    groups: Sequence[list[str]],
    *shared: Any,
    ranges: int,
    add: Callable[..., Any],
    bar: tqdm,
) -> Parts:
    """Return the sums over all groups of shards, one per range.

    `function(group, *shared)` yields a part for each range and at last the number of shards;
    `add(*parts)` returns the sum of neighbours, in their order. `bar` counts shards.
    """
    levels: list[list[Parts]] = [[]]
    started: deque[Parts] = deque()
    at_once = additions_at_once(pools.ONE_CPU.places)
    answers = tasks.map_to_store(function, groups, *shared, results=ranges + 1)
    for group, (*parts, _) in zip(groups, answers, strict=True):
        levels[0].append(parts)
        bar.update(len(group))
        for level, waiting in enumerate(levels):
            if len(waiting) < ADDED_TOGETHER:
                break
            if level + 1 == len(levels):
                levels.append([])
            if len(started) == at_once:  # else answers would come sooner than they are added up
                tasks.await_all(started.popleft())
            started.append(_sum(add, waiting))
            levels[level + 1].append(started[-1])
            waiting.clear()
    left = [parts for waiting in reversed(levels) for parts in waiting]
    while len(left) > 1:
        left = [
            _sum(add, left[start : start + ADDED_TOGETHER])
            for start in range(0, len(left), ADDED_TOGETHER)
        ]
    return left[0]


def _sum(add: Callable[..., Any], neighbours: Sequence[Parts]) -> Parts:
    """Start adding up neighbouring parts, range by range; those of one answer are their own sum."""
    if len(neighbours) == 1:
        return neighbours[0]
    return [tasks.in_store(add, *parts) for parts in zip(*neighbours, strict=True)]
