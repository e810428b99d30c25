"""Tasks without Ray: called one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from pds_ray.distributed import pools, tasks


def map_in_order(
    function: Callable[..., Any],
    items: Iterable[Any],
    *shared: Any,
    share: pools.Share = pools.ONE_CPU,  # noqa: ARG001
) -> Iterator[Any]:
    """Do as `tasks.map_in_order`; a task begins when all before it are counted."""
    for item in items:
        given = [each.value() if isinstance(each, tasks.Latest) else each for each in shared]
        yield function(item, *given)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call tasks in this process."""
    monkeypatch.setattr(tasks, "map_in_order", map_in_order)
    monkeypatch.setattr(pools, "products", lambda: pools.ONE_CPU)
