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
from typing import Any

import ray
from ray.experimental import internal_kv

from pds_ray.errors import UserError

FULL = (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)


@contextmanager
def lost_blocks_allowed() -> Iterator[None]:
    """Data sets made in here go on without blocks that are lost; their maker looks for what is missing."""
    context = ray.data.DataContext.get_current()
    before, context.max_errored_blocks = context.max_errored_blocks, -1
    try:
        yield
    finally:
        context.max_errored_blocks = before


class LostBlocks(logging.Handler):
    """Counts, while data sets run in its `with` block, the blocks that they lose and to what; only Ray's log tells."""

    # by name: importing the module, and with it ray.data, costs every process 0.4 s
    _LOG = logging.getLogger("ray.data._internal.execution.streaming_executor_state")

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.kinds: Counter[str] = Counter()
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
        """Raises UserError in one line if blocks were lost for want of space: others would be, one by one."""
        if self._no_space:
            raise UserError(self._no_space)


def no_space(error: BaseException) -> str:
    """That space is wanting and where, if that is what `error` says; else ""."""
    if not isinstance(error, FULL) and not isinstance(getattr(error, "cause", None), FULL):
        return ""
    nodes = re.findall(
        r"\bip=([^,\s)]+)", str(error)
    )  # in what Ray says of tasks; the last failed by itself
    where = f"on node {nodes[-1]}" if nodes else "here"
    return (
        f"the memory of Ray's object store and the disk it spills to (that of Ray's own files) are full {where}; free "
        "space there and repeat the command"
    )


class UnderWay:
    """Which items are being worked on and since when: workers tell, the watchdog asks. Pickles.

    They tell the cluster's own store of keys, because an actor would be a process more, and lost with its node. What
    was told is forgotten at the end of the `with` block, or with the cluster if the driver is killed.
    """

    _NAMESPACE, _LIMIT_S = b"pds_ray", 5.0

    def __init__(self) -> None:
        self._prefix = f"under_way/{uuid.uuid4().hex}/".encode()

    def __enter__(self) -> UnderWay:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ray.exceptions.RayError):  # a cluster that is gone has forgotten it
            _keys().internal_kv_del(self._prefix, True, self._NAMESPACE, self._LIMIT_S)

    def begin(self, name: str) -> None:
        """Work on `name` begins here and now."""
        told = json.dumps([time.time(), ray.get_runtime_context().get_node_id()[:8]]).encode()
        with suppress(ray.exceptions.RayError):  # it goes on untold
            _keys().internal_kv_put(
                self._prefix + name.encode(), told, True, self._NAMESPACE, self._LIMIT_S
            )

    def describe(self, ended: set[str]) -> str:
        """The three items begun first of those that have not `ended`, for a person. Clocks of nodes may differ."""
        now, begun = time.time(), []
        try:
            store = _keys()
            keys = store.internal_kv_keys(self._prefix, self._NAMESPACE, self._LIMIT_S)
            names = {key: key.removeprefix(self._prefix).decode() for key in keys}
            open_ = [key for key, name in names.items() if name not in ended]
            told = store.internal_kv_multi_get(open_, self._NAMESPACE, self._LIMIT_S)
        except ray.exceptions.RayError as error:
            return f"unknown ({type(error).__name__})"
        for key, value in told.items():
            since, node = json.loads(value)
            begun.append(
                (since, f"{names[key]} (for {max(0.0, now - since):.0f} s, on node {node})")
            )
        return ", ".join(text for _, text in sorted(begun)[:3]) or "none"


def _keys() -> Any:
    """The cluster's store of keys. Raises RaySystemError if it cannot be asked from here."""
    client = internal_kv.internal_kv_get_gcs_client()
    if client is None:  # not connected any more, or by ray://
        raise ray.exceptions.RaySystemError("no connection to the store of keys")
    return client
