"""Three verbs for work on the cluster: `map_in_order`, `stream` and `run_kmeans`, each with exact retries."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import ray

from pds_ray.distributed import (
    MACHINES_LOST,
    TASK_RETRIES,
)
from pds_ray.distributed.pools import SMALL_TASK_CPUS, most_cpus
from pds_ray.distributed.process import Result, with_faiss_threads
from pds_ray.telemetry.progress import waiting_for

FETCH_S = 60.0  # for one value to reach a task


# What a task ends with whose process or machine is gone. Ray would try it again with the CPUs asked for at first, which
# no node may have any more.
LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,  # of `fetch`
)

_WITH_A_MACHINE = (  # of LOST, what is not likely to be the doing of the work
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,
)


class Deaths:
    """How often work was lost: of itself up to TASK_RETRIES times, with its machine up to MACHINES_LOST times."""

    def __init__(self) -> None:
        self._own = self._machines = 0

    def survived(self, error: BaseException) -> bool:
        """Whether the work that ended with `error` may be tried again."""
        if isinstance(error, _WITH_A_MACHINE):
            self._machines += 1
        else:
            self._own += 1
        return self._own <= TASK_RETRIES and self._machines <= MACHINES_LOST

    def __str__(self) -> str:
        return f"processes lost: {self._own}, machines lost: {self._machines}"


def run_kmeans(
    function: Callable[..., Result], parts: Sequence[tuple[ray.ObjectRef, ...]], *args: Any
) -> Result:
    """Calls `function(parts, *args)` with all CPUs of one node for FAISS, or with a GPU where FAISS can use one.

    If the process or its machine is lost, or some of the parts, which it fetches, again on what the cluster then has,
    as often as `Deaths` allows.
    """
    deaths = Deaths()
    while True:
        try:
            return _run_kmeans(function, parts, *args)
        except LOST as error:
            if not deaths.survived(error):
                raise


def await_all(references: Sequence[ray.ObjectRef]) -> None:
    """Returns when all values are there, on whatever node: what was lost is made anew before CPUs are taken for it."""
    if references:
        ray.wait(list(references), num_returns=len(references), fetch_local=False)


def _run_kmeans(
    function: Callable[..., Result], parts: Sequence[tuple[ray.ObjectRef, ...]], *args: Any
) -> Result:
    await_all([reference for part in parts for reference in part])
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU", 0) >= 1 for node in nodes):
        # GPUs named here and not in .options(): Ray then ends the process with the task, and with it what it holds
        with_gpu = ray.remote(num_cpus=SMALL_TASK_CPUS, num_gpus=1, max_retries=0)
        if ray.get(with_gpu(_faiss_gpus).remote()):
            return ray.get(with_gpu(function).remote(parts, *args))
    cpus = most_cpus()
    remote = ray.remote(with_faiss_threads).options(num_cpus=cpus, max_retries=0)
    return ray.get(remote.remote(cpus, function, parts, *args))


def stream(function: Callable[..., Iterator[Result]], *args: Any) -> Iterator[Result]:
    """What `function` yields, as it does, with all CPUs of one node to itself.

    If the process or its machine is lost, again on what the cluster then has, as often as `Deaths` allows: `function`
    must yield the same each time.
    """
    told, deaths = 0, Deaths()
    while True:
        remote = ray.remote(_yielded).options(
            num_cpus=most_cpus(), num_returns="streaming", max_retries=0
        )
        try:
            for number, reference in enumerate(remote.remote(function, *args)):
                value = ray.get(
                    reference
                )  # also of those told before: one may say that the process is lost
                if number == told:
                    yield value
                    told += 1
            return
        except LOST as error:
            if not deaths.survived(error):
                raise


def _yielded(function: Callable[..., Iterator[Result]], *args: Any) -> Iterator[Result]:
    for value in function(*args):  # noqa: UP028 - Ray sends into its generators; not every iterator takes that
        yield value


def _faiss_gpus() -> int:
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


def wait_for(reference: ray.ObjectRef, item: Any) -> Any:
    """The result of the task of `item`, once it is there; until then the watchdog knows what is waited for."""
    waiting_for(partial(str, item))
    try:
        return ray.get(reference)
    finally:
        waiting_for(None)


def fetch(reference: ray.ObjectRef) -> Any:
    """A value from the object stores, inside a task or an actor.

    One that was lost with its node is made anew by a task that may want the very CPUs that wait for it: after FETCH_S
    they are given back. Raises GetTimeoutError then.
    """
    return ray.get(reference, timeout=FETCH_S)


def map_in_order(
    function: Callable[..., Result], items: Iterable[Any], *shared: Any
) -> Iterator[Result]:
    """`function(item, *shared)` for each item on the cluster, results in the order of the items.

    `shared` is sent to each node once. Only a window of tasks is in flight, so that a slow consumer holds few results.
    """
    for item, reference in _started(function, items, shared, 1):
        yield wait_for(reference, item)


def map_to_store(
    function: Callable[..., tuple[Any, Any]], items: Iterable[Any], *shared: Any
) -> Iterator[tuple[ray.ObjectRef, ray.ObjectRef]]:
    """As `map_in_order`, of a function that returns two values, the second a small one: yields references to both.

    What they refer to stays in the object stores of the cluster, and is made anew if a node is lost.
    """
    for item, references in _started(function, items, shared, 2):
        wait_for(references[1], item)
        yield tuple(references)


def _started(
    function: Callable[..., Any], items: Iterable[Any], shared: Iterable[Any], results: int
) -> Iterator[Any]:
    """Each item with the reference to its result, or references if there are several; a window of them runs ahead."""
    window = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    references = [ray.put(value) for value in shared]
    remote = ray.remote(function).options(
        num_cpus=SMALL_TASK_CPUS, num_returns=results, max_retries=TASK_RETRIES
    )
    pending: deque[tuple[Any, Any]] = deque()
    coming = iter(items)
    while True:
        for item in islice(coming, window - len(pending)):
            pending.append((item, remote.remote(item, *references)))
        if not pending:
            return
        yield pending.popleft()
