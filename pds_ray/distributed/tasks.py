"""Verbs for work on the cluster, `map_in_order`, `stream`, `run_kmeans`, with exact retries."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice, pairwise
from typing import Any, TypeVar

import ray

from pds_ray.distributed import MACHINES_LOST, TASK_RETRIES
from pds_ray.distributed.pools import (
    ONE_CPU,
    SMALL_TASK_CPUS,
    Share,
    most,
    most_cpus,
    most_free,
    places_as_free,
)
from pds_ray.distributed.process import Result, with_faiss_threads, with_gpu_emptied
from pds_ray.telemetry.progress import waiting_for

Item = TypeVar("Item")

FETCH_S = 60.0  # for one value to reach a task
# A task whose value stays in object stores: a loss of it with its node, however late, counts as a
# retry of the task, too.
STORED_RETRIES = TASK_RETRIES + MACHINES_LOST

# Errors of tasks whose process or machine is gone. They are tried again here and not by Ray, which
# would ask for the same number of CPUs, and no node may have so many any more.
LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,  # raised by `fetch`
)

_MACHINE_LOST = (  # those of LOST that the work itself is not likely to have caused
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,
)


class RetryBudget:
    """Worker crashes (up to `crashes`) and node losses (up to MACHINES_LOST) of one work."""

    def __init__(self, crashes: int | None = None) -> None:
        self._crashes = TASK_RETRIES if crashes is None else crashes
        self._processes = self._machines = 0

    def spend(self, error: BaseException) -> bool:
        """Count `error`, one of LOST; return whether the work may be tried again."""
        if isinstance(error, _MACHINE_LOST):
            self._machines += 1
        else:
            self._processes += 1
        return self._processes <= self._crashes and self._machines <= MACHINES_LOST

    def __str__(self) -> str:
        return f"processes lost: {self._processes}, machines lost: {self._machines}"


def run_kmeans(
    function: Callable[..., Result], parts: Sequence[tuple[ray.ObjectRef, ...]], *args: Any
) -> Result:
    """Return `function(parts, *args)`, run with all CPUs of one node, or all GPUs, for FAISS.

    If the process, its machine or some of the parts, which it fetches, are lost, it runs again on
    what the cluster has then, as often as `RetryBudget` allows.
    """
    return again_where_lost(lambda: _run_kmeans(function, parts, *args))


def kmeans_places() -> int:
    """Return the number of nodes that can have a k-means each: those with as much free as any.

    A node of which others leave less would prolong its k-means, which waits for a free one instead.
    """
    return places_as_free("GPU" if most("GPU") >= 1 else "CPU")


def retried(start: Callable[[], ray.ObjectRef]) -> Any:
    """Return the result of a task; it is started again where `RetryBudget` allows."""
    return again_where_lost(lambda: ray.get(start()))


def again_where_lost(work: Callable[[], Result], crashes: int | None = None) -> Result:
    """Return `work()`; it is called again where `RetryBudget(crashes)` allows.

    It must answer the same each time and change nothing. Raises the last of LOST.
    """
    budget = RetryBudget(crashes)
    while True:
        try:
            return work()
        except LOST as error:
            if not budget.spend(error):
                raise


def await_all(references: Sequence[ray.ObjectRef]) -> None:
    """Wait for all values, so that lost ones are recomputed before CPUs are taken for them."""
    if references:
        ray.wait(list(references), num_returns=len(references), fetch_local=False)


def _run_kmeans(
    function: Callable[..., Result], parts: Sequence[tuple[ray.ObjectRef, ...]], *args: Any
) -> Result:
    await_all([reference for part in parts for reference in part])
    if most("GPU") >= 1:
        # GPUs named here and not in .options(): Ray then ends the process with the task, and with
        # it what it holds
        one = ray.remote(num_cpus=SMALL_TASK_CPUS, num_gpus=1, max_retries=0)
        if ray.get(one(_faiss_gpus).remote()):
            gpus = max(1, most_free("GPU"))
            several = ray.remote(num_cpus=SMALL_TASK_CPUS, num_gpus=gpus, max_retries=0)
            return ray.get(several(function).remote(parts, *args))
    cpus = most_cpus()
    remote = ray.remote(with_faiss_threads).options(num_cpus=cpus, max_retries=0)
    return ray.get(remote.remote(cpus, function, parts, *args))


def stream(function: Callable[..., Iterator[Result]], *args: Any) -> Iterator[Result]:
    """Yield what `function(*args)` yields on all CPUs of one node, as soon as it does.

    If the process or its machine is lost, `function` runs again on what the cluster has then, as
    often as `RetryBudget` allows: it must yield the same values each time.
    """
    received, budget = 0, RetryBudget()
    while True:
        remote = ray.remote(_yielded).options(
            num_cpus=most_cpus(), num_returns="streaming", max_retries=0
        )
        try:
            for number, reference in enumerate(remote.remote(function, *args)):
                # fetched also if it was received before: it may say that the process is lost
                value = ray.get(reference)
                if number == received:
                    yield value
                    received += 1
            return
        except LOST as error:
            if not budget.spend(error):
                raise


def _yielded(function: Callable[..., Iterator[Result]], *args: Any) -> Iterator[Result]:
    # not `yield from`: Ray sends into its generators, which not every iterator allows
    for value in function(*args):  # noqa: UP028
        yield value


def _faiss_gpus() -> int:
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


def wait_for(reference: ray.ObjectRef, item: Any) -> Any:
    """Return the result of the task of `item`; meanwhile the stall watchdog names `item`."""
    waiting_for(partial(_named, item))
    try:
        return ray.get(reference)
    finally:
        waiting_for(None)


def _named(item: Any) -> str:
    """Name an item of work for a person: shards by their names, whatever else goes with them."""
    if isinstance(item, list):
        names = [_named(each) for each in item]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    if isinstance(item, tuple):
        return next(part for part in item if isinstance(part, str))
    return str(item)


def fetch(reference: ray.ObjectRef) -> Any:
    """Return a value from the object stores, inside a task or an actor.

    A value that was lost with its node is recomputed by a task that may need the very CPUs that
    wait for it: after FETCH_S this raises GetTimeoutError, which gives them back.
    """
    return ray.get(reference, timeout=FETCH_S)


class Latest:
    """A shared argument that changes: tasks are given its value of about when they were started.

    It is sent once per window of tasks.
    """

    def __init__(self, value: Callable[[], Any]) -> None:
        self.value = value


def groups(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Cut items into `count` lists of about the same length, one per task; none if there are none.

    There are no fewer items than lists.
    """
    bounds = [len(items) * place // count for place in range(count + 1)]
    return [list(items[start:end]) for start, end in pairwise(bounds)] if items else []


def map_in_order(
    function: Callable[..., Result],
    items: Iterable[Any],
    *shared: Any,
    share: Share = ONE_CPU,
    at_once: int | None = None,
) -> Iterator[Result]:
    """Yield `function(item, *shared)` for each item, in order, computed on the cluster.

    `shared` is sent to each node once, but for what is `Latest`. Only a window of tasks is in
    flight, so that a slow consumer holds few results; it has at most `at_once`. Each task takes
    `share`.
    """
    started = _started(function, items, shared, 1, share, TASK_RETRIES, at_once)
    for item, reference in started:
        yield wait_for(reference, item)


def map_to_store(
    function: Callable[..., Iterable[Any]], items: Iterable[Any], *shared: Any, results: int = 2
) -> Iterator[tuple[ray.ObjectRef, ...]]:
    """Yield references to the results of a function that has several, the last one small.

    It returns a tuple, or yields them one by one and need not hold them together.

    Otherwise as `map_in_order`. The values stay in the object stores of the cluster and are
    recomputed if a node is lost.
    """
    started = _started(function, items, shared, results, ONE_CPU, STORED_RETRIES)
    for item, references in started:
        wait_for(references[-1], item)
        yield tuple(references)


def in_store(
    function: Callable[..., Any], *args: Any, results: int = 1, share: Share = ONE_CPU
) -> Any:
    """Start `function`, with the values of references among its arguments; return one to its own.

    It stays in the object stores of the cluster, and is recomputed if a node is lost. There is a
    list of references to the results of a function that returns several.
    """
    return _remote(function, results, share, STORED_RETRIES)(*args)


def _remote(
    function: Callable[..., Any], results: int, share: Share, retries: int
) -> Callable[..., Any]:
    """Return `function` as one that starts a task, which is tried again where it is lost."""
    options = {"num_cpus": SMALL_TASK_CPUS, "num_returns": results, "max_retries": retries}
    if not share.num_gpus:
        return partial(_start, _known(function).options(**options))
    # in .options(), so that Ray keeps the process and torch in it for the next task
    remote = _known(with_gpu_emptied).options(**options, num_gpus=share.num_gpus)
    return partial(_start, remote, function)


def _start(function: Any, *args: Any) -> Any:
    """Start a task of one of Ray's functions; return the reference(s) to its results."""
    try:
        return function.remote(*args)
    except BaseException:
        _by_name.cache_clear()  # if it could not be sent, it counts as sent nevertheless
        raise


def _known(function: Callable[..., Any]) -> Any:
    """Return `function` as one of Ray's: the same one each time, if workers import it by its name.

    Ray sends each of its functions to the cluster once per session, and workers fetch it once.
    """
    # Other functions are sent with the values that they have now, of closures and of globals of a
    # script or notebook, which may be others at the next call.
    module = sys.modules.get(function.__module__) if function.__module__ != "__main__" else None
    by_name = getattr(module, function.__qualname__, None) is function
    return _by_name(function) if by_name else ray.remote(function)


@lru_cache(maxsize=256)
def _by_name(function: Callable[..., Any]) -> Any:
    return ray.remote(function)


def _started(
    function: Callable[..., Any],
    items: Iterable[Any],
    shared: Sequence[Any],
    results: int,
    share: Share,
    retries: int,
    at_once: int | None = None,
) -> Iterator[Any]:
    """Yield each item with the reference(s) to its results; a window of tasks runs ahead."""
    window = max(2, 2 * share.places)
    window = min(window, at_once or window)
    start = _remote(function, results, share, retries)
    references = [None if isinstance(value, Latest) else ray.put(value) for value in shared]
    pending: deque[tuple[Any, Any]] = deque()
    coming = iter(items)
    started = 0
    while True:
        for item in islice(coming, window - len(pending)):
            if started % window == 0:
                for place, value in enumerate(shared):
                    if isinstance(value, Latest):
                        references[place] = ray.put(value.value())
            started += 1
            pending.append((item, start(item, *references)))
        if not pending:
            return
        yield pending.popleft()
