"""Watching work: which blocks were lost, where space ran out."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pds_ray.distributed import ray_private
from pds_ray.errors import UserError

FULL = (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)


@contextmanager
def lost_blocks_allowed() -> Iterator[ray.data.DataContext]:
    """Let data sets made in here go on without lost blocks; their maker looks for the gaps.

    Yields the options that they are made with, which are afterwards as before.
    """
    context = ray.data.DataContext.get_current()
    before = context.max_errored_blocks, context.target_max_block_size
    context.max_errored_blocks = -1
    try:
        yield context
    finally:
        context.max_errored_blocks, context.target_max_block_size = before


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
