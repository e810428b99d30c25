"""The lifetime of a session, which ends with the outermost `session_kept` block. No Ray here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from pds_ray.errors import UserError

_outside = ExitStack()
_session: ContextVar[ExitStack] = ContextVar("session", default=_outside)
_one = threading.Lock()


def undo() -> ExitStack:
    """Return what `session.start` did to this process, for the end of the session to undo."""
    return _session.get()


@contextmanager
def session_kept() -> Iterator[None]:
    """Keep a session that starts in the block for all of the block, and end it there.

    Nested blocks belong to the outermost. A session or a Ray that was there before stays. Starts
    nothing by itself.

    Raises UserError if another thread is in such a block: a process has one set of options of Ray
    Data, and those of a run differ from stage to stage.
    """
    if undo() is not _outside:
        yield
        return
    if not _one.acquire(blocking=False):
        raise UserError(
            "another thread of this process is at work on a run; wait for its end, or use a "
            "process for each"
        )
    try:
        with ExitStack() as session:
            token = _session.set(session)
            try:
                yield
            finally:
                _session.reset(token)
    finally:
        _one.release()
