"""Work in flight: workers report what they do and how far they are, and the driver's bar shows it.

A process keeps what it does in memory, which costs nothing. A thread of it puts that into the
cluster's key-value store, at most once per REPORT_S: a report that is lost or late stops no work,
and an actor for reports would be one more process, lost with its node.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache

import ray

from pds_ray.distributed import ray_private

REPORT_S = 1.0
SILENT_S = 60.0
"""Time without a new report, by the driver's clock, after which a process counts as gone."""
SHOWN = 3  # reports that a description names


@dataclass
class Doing:
    """One thing that a process is doing. Whoever does it says how far it is."""

    what: str
    """The thing waited for meanwhile, for a person."""
    item: str = ""
    """The piece of work whose result the driver will count; "" if there is none."""
    done: float = 0.0
    """Units of the item that are done ahead of its result."""
    since: float = field(default_factory=time.monotonic)

    def now(self, what: str) -> None:
        """Go on to something else with the same item."""
        self.what, self.since = what, time.monotonic()

    def reach(self, done: float) -> None:
        """Say how many units of the item are done."""
        self.done = done


class InFlight:
    """The reports on one piece of the driver's work. Pickles: workers report, the driver reads.

    The reports are deleted at the end of the `with` block, or with the cluster if the driver is
    killed.
    """

    def __init__(self) -> None:
        self._prefix = f"in_flight/{uuid.uuid4().hex}/"

    def __enter__(self) -> InFlight:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ray.exceptions.RayError):  # a cluster that is gone has no reports either
            ray_private.delete_keys(self._prefix.encode())

    @contextmanager
    def doing(self, what: str, item: str = "") -> Iterator[Doing]:
        """Report that `what` is waited for as long as the block takes, as "a model to load"."""
        doing = Doing(what, item)
        reporter = _reporter(self._prefix)
        reporter.begin(doing)
        try:
            yield doing
        finally:
            reporter.end(doing)

    def reports(self, arrived: Callable[[str], bool] = lambda _: False) -> Reports:
        """Return the driver's view; items whose result has `arrived` are in flight no more."""
        return Reports(self._prefix.encode(), arrived)


class _Reporter:
    """The work of this process for one `InFlight`, and the thread that puts it into the store."""

    def __init__(self, prefix: str) -> None:
        self._key = f"{prefix}{uuid.uuid4().hex}".encode()
        self._lock = threading.Lock()
        self._doing: list[Doing] = []
        self._running = False

    def begin(self, doing: Doing) -> None:
        with self._lock:
            self._doing.append(doing)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, daemon=True).start()

    def end(self, doing: Doing) -> None:
        with self._lock:
            self._doing.remove(doing)

    def _run(self) -> None:
        """Put reports until nothing is done any more; what ends within REPORT_S is in none."""
        told, never = False, threading.Event()
        while True:
            never.wait(REPORT_S)
            now = time.monotonic()
            with self._lock:
                doing = [
                    (each.what, each.item, each.done, now - each.since) for each in self._doing
                ]
                # without a cluster, as in a test, nobody listens; the next work looks again
                connected = ray.is_initialized()
                self._running = bool(doing) and connected
            if not connected:
                return
            with suppress(ray.exceptions.RayError):
                if doing:
                    node = ray.get_runtime_context().get_node_id()[:8]
                    ray_private.put_key(self._key, json.dumps([node, doing]).encode())
                    told = True
                elif told:
                    ray_private.delete_keys(self._key)
            if not doing:
                return


@lru_cache(maxsize=32)  # callers hold theirs: one that is dropped or made twice does no harm
def _reporter(prefix: str) -> _Reporter:
    """Return the reporter of this process for the keys with a prefix."""
    return _Reporter(prefix)


@dataclass(frozen=True)
class _Report:
    """One thing that a process reported."""

    what: str
    item: str
    done: float
    seconds: float
    """Since it began with that, by its own clock."""
    node: str

    def __str__(self) -> str:
        return f"{self.what} (for {self.seconds:.0f} s, on node {self.node})"


class Reports:
    """The driver's view of an `InFlight`: what its bar shows ahead of the results."""

    def __init__(self, prefix: bytes, arrived: Callable[[str], bool]) -> None:
        self._prefix = prefix
        self._arrived = arrived
        self._heard: dict[bytes, tuple[bytes, float]] = {}
        """Key -> report and when it was new."""
        self._reports: list[_Report] = []
        self._done: dict[str, float] = {}
        """Item -> units done, kept from its last report until its result arrives."""
        self._problem = ""

    def read(self) -> None:
        """Read the reports anew. It may take seconds; the driver's own thread never calls it."""
        now = time.monotonic()
        try:
            found = ray_private.get_keys(ray_private.list_keys(self._prefix))
        except ray.exceptions.RayError as error:
            self._problem = type(error).__name__
            return
        self._problem = ""
        before = self._heard
        self._heard = {
            key: before[key] if before.get(key, (b"", 0.0))[0] == value else (value, now)
            for key, value in found.items()
        }
        self._reports = [
            _Report(what, item, done, seconds, node)
            for value, since in self._heard.values()
            if now - since < SILENT_S
            for node, doing in [json.loads(value)]
            for what, item, done, seconds in doing
        ]
        reported = {report.item: report.done for report in self._reports if report.item}
        self._done = {
            item: done
            for item, done in {**self._done, **reported}.items()
            if not self._arrived(item)
        }

    def ahead(self) -> int:
        """Return the units done of items that have not arrived, as of the last reading."""
        known = self._done  # read once: the bar's watchdog replaces it
        return int(sum(done for item, done in known.items() if not self._arrived(item)))

    def progress(self) -> object:
        """Return a value that changes whenever any work in flight gets on."""
        return {(report.what, report.item, report.done) for report in self._reports}

    def describe(self) -> str:
        """Name the work that has taken longest, for a person; "" if there is none."""
        if self._problem:
            return f"reports of the workers ({self._problem})"
        waited_for = [
            report for report in self._reports if not (report.item and self._arrived(report.item))
        ]
        oldest = sorted(waited_for, key=lambda report: -report.seconds)
        return ", ".join(map(str, oldest[:SHOWN]))
