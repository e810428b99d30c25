"""Watching work: which items are in flight, which blocks were lost, where space ran out."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray

from pds_ray.distributed import ray_private
from pds_ray.errors import UserError

FULL = (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)


@contextmanager
def lost_blocks_allowed() -> Iterator[None]:
    """Let data sets made in here go on without lost blocks; their maker looks for the gaps."""
    context = ray.data.DataContext.get_current()
    before, context.max_errored_blocks = context.max_errored_blocks, -1
    try:
        yield
    finally:
        context.max_errored_blocks = before


class LostBlocks(logging.Handler):
    """Counter of blocks that data sets lose in its `with` block; Ray reports them in its log."""

    _LOG = logging.getLogger(ray_private.DATA_LOG)

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.kinds: Counter[str] = Counter()  # name of the cause -> blocks
        self._no_space = ""

    def __enter__(self) -> LostBlocks:
        self._before = self._LOG.level, self._LOG.propagate
        self._LOG.propagate = False
        self._LOG.setLevel(logging.ERROR)
        self._LOG.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._LOG.removeHandler(self)
        level, self._LOG.propagate = self._before
        self._LOG.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            cause = getattr(error, "cause", None) or error
            self.kinds[type(cause).__name__] += 1
            self._no_space = self._no_space or no_space(error)

    def check_space(self) -> None:
        """Raise UserError in one line if blocks were lost for want of space."""
        if self._no_space:
            raise UserError(self._no_space)


def no_space(error: BaseException) -> str:
    """Return a line that says where space ran out if that is what `error` means, else ""."""
    if not isinstance(error, FULL) and not isinstance(getattr(error, "cause", None), FULL):
        return ""
    # Ray names the nodes of all tasks on the way; the last is where it happened
    nodes = re.findall(r"\bip=([^,\s)]+)", str(error))
    where = f"on node {nodes[-1]}" if nodes else "here"
    return (
        "the memory of Ray's object store and the disk it spills to (that of Ray's own files) are "
        f"full {where}; free space there and repeat the command"
    )


class InFlight:
    """The items that are being worked on. Pickles.

    Workers report when they start an item; the stall watchdog reads it. Reports go to the cluster's
    key-value store, because an actor would be one more process, lost with its node. They are
    deleted at the end of the `with` block, or with the cluster if the driver is killed.
    """

    def __init__(self) -> None:
        self._prefix = f"in_flight/{uuid.uuid4().hex}/".encode()

    def __enter__(self) -> InFlight:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ray.exceptions.RayError):  # a cluster that is gone has no reports either
            ray_private.delete_keys(self._prefix)

    def begin(self, name: str) -> None:
        """Report that work on `name` begins here and now; a report that is lost stops no work."""
        node = ray.get_runtime_context().get_node_id()[:8]
        with suppress(ray.exceptions.RayError):
            ray_private.put_key(
                self._prefix + name.encode(), json.dumps([time.time(), node]).encode()
            )

    def describe(self, ended: set[str]) -> str:
        """Return the three oldest items that have not `ended`, for a person.

        The times are only as good as the clocks of the nodes agree.
        """
        now, begun = time.time(), []
        try:
            names = {
                key: key.removeprefix(self._prefix).decode()
                for key in ray_private.list_keys(self._prefix)
            }
            reports = ray_private.get_keys([key for key in names if names[key] not in ended])
        except ray.exceptions.RayError as error:
            return f"unknown ({type(error).__name__})"
        for key, value in reports.items():
            since, node = json.loads(value)
            seconds = max(0.0, now - since)
            begun.append((since, f"{names[key]} (for {seconds:.0f} s, on node {node})"))
        return ", ".join(text for _, text in sorted(begun)[:3]) or "none"
