"""Calls to stores elsewhere: tried again, given up in seconds, and left at once by Ctrl-C.

A call that is blocked in a library of C++ sees no signal and may know no limit. Each runs in a
daemon thread, therefore, and its caller only waits for it.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import TypeVar

import pyarrow as pa

from pds_ray.errors import UserError, first_line, without_secrets
from pds_ray.telemetry import log
from pds_ray.telemetry.state import start_thread

WAITS_S = (1.0, 4.0, 16.0)
"""Mean waits before each retry, in seconds; the store's own client has retried before that."""
ANSWER_S = 20.0
"""Seconds for one call to a store: a question, or a piece of a file."""
UNLIMITED = math.inf
PATIENCE_S = 18.0
"""Seconds that calls may spend in vain, waits not counted; after that no other is made."""
SAY_AFTER_S, SAY_AGAIN_S = 10.0, 60.0
"""Seconds after which a wait is said, and after which another one for the same host is."""
LONGEST_PAUSE_S = 60.0
"""Longest wait before a retry that a server may ask for, in seconds."""
CALLS_AT_ONCE = 32
"""Concurrent calls: one by one, 40,000 round trips to an object store take half an hour."""

FACTS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that tell how things are, and that a retry does not change."""
REFUSED = re.compile(  # others that a retry does not change, by their message
    r"AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH)"
    r"|(HTTP status |Client error ')(3|4(?!08|29))\d\d|Bucket '.*' not found"
    r"|offline mode is enabled"
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class StorageError(UserError):
    """A folder or an object store cannot be used.

    It is no OSError, so that nobody retries it: the retries are used up.
    """


class BusyError(OSError):
    """A server asks to be left alone for `pause_s` seconds."""

    def __init__(self, message: str, pause_s: float) -> None:
        super().__init__(message)
        self.pause_s = min(pause_s, LONGEST_PAUSE_S)


def is_remote(path: str) -> bool:
    """Return True if `path` names a store elsewhere (s3://, https://, hf://), not a local path."""
    return "://" in path and not path.startswith("file://")


def with_retries(action: Callable[[], Result], where: str, limit_s: float | None = None) -> Result:
    """Call `action`, which works on `where`; retry errors of a store elsewhere with backoff.

    One call may take `limit_s` seconds, by default ANSWER_S; UNLIMITED is for calls whose length
    depends on the data, and for which the limits of the store's client are all there is. On a local
    path `action` is called once. Raises FileNotFoundError at once if the object is missing, and
    StorageError in one line if the store refuses, keeps failing or gives no answer.
    """
    if not is_remote(where):
        return action()
    began, in_vain_s = time.monotonic(), 0.0
    for wait_s in (*WAITS_S, None):
        tried = time.monotonic()
        try:
            return _wait_for(action, where, ANSWER_S if limit_s is None else limit_s, began)
        except FACTS:
            raise
        except (OSError, pa.ArrowException) as error:
            if not isinstance(error, OSError) and type(error) is not pa.ArrowException:
                raise  # of what was read, not of the store
            in_vain_s += time.monotonic() - tried
            if wait_s is None or in_vain_s > PATIENCE_S or REFUSED.search(str(error)):
                raise StorageError(_failure(where, error)) from None
            pause_s = wait_s * random.uniform(0.5, 1.5)  # jitter: many workers retry at once
            if isinstance(error, BusyError):
                pause_s = max(pause_s, error.pause_s)
            if time.monotonic() - began + pause_s > SAY_AFTER_S:
                _say(where, f"again in {pause_s:.0f} s: {first_line(error)}")
            time.sleep(pause_s)
    raise AssertionError("unreachable")


def await_answer(question: Callable[[], object], where: str) -> None:
    """Wait until a store answers `question` in any way, be it with an error.

    It is for stores that are then asked what may rightly take long. Raises StorageError in one line
    if there is no answer.
    """
    tried = time.monotonic()
    try:
        _wait_for(question, where, ANSWER_S, tried)
    except (OSError, pa.ArrowException, StorageError) as error:
        if time.monotonic() - tried > PATIENCE_S:
            raise StorageError(_failure(where, error)) from None


def _failure(where: str, error: Exception) -> str:
    store = "server" if where.startswith(("http://", "https://")) else "object store"
    return (
        f"the {store} fails at {where} ({first_line(error)}); check its address "
        "and state and the credentials; the same command continues"
    )


def _wait_for(action: Callable[[], Result], where: str, limit_s: float, began: float) -> Result:
    """Return or raise what `action` does, or TimeoutError after `limit_s` seconds.

    `began` is when the first try did, by the monotonic clock.
    """
    quiet = min(max(0.0, began + SAY_AFTER_S - time.monotonic()), limit_s)
    future = _started(action)
    wait([future], quiet)
    if not future.done() and quiet < limit_s:
        _say(where, f"{SAY_AFTER_S:.0f} s")
        wait([future], None if limit_s == UNLIMITED else limit_s - quiet)
    if not future.done():
        raise TimeoutError(f"no answer for {limit_s:.0f} s")
    return future.result()


def _started(action: Callable[[], Result]) -> Future[Result]:
    """Start `action` in a daemon thread: whoever waits for it may leave, and the process end."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    start_thread(work)
    return future


_said: dict[str, float] = {}  # host or bucket -> when a wait for it was last said


def _say(where: str, detail: str) -> None:
    """Tell people once in SAY_AGAIN_S seconds that a store is waited for."""
    place, now = without_secrets(where), time.monotonic()
    host = "/".join(place.split("/", 3)[:3])
    if now - _said.get(host, -math.inf) >= SAY_AGAIN_S:
        _said[host] = now
        log.event("waiting_for_store", f"pds-ray: waiting for {place} ({detail})", "warning")


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order.

    CALLS_AT_ONCE calls run at a time, in threads, and no more results than that are held. An error
    of one is raised when those under way have ended: none writes any more when its caller cleans up
    or begins again. An interrupt waits for none.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(_started(partial(function, item)))
            if len(pending) == CALLS_AT_ONCE:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except Exception:
        wait(pending)
        raise
