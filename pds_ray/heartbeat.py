"""A run's sign of life: while the driver lives, it leaves in the run folder how far it is, for `pds-ray status`."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from pds_ray import log, progress
from pds_ray.artifacts import RunFolder
from pds_ray.errors import first_line
from pds_ray.storage import StorageError

BEAT_S = 10.0


@contextmanager
def beating(run: RunFolder) -> Iterator[None]:
    """Writes the sign of life every `BEAT_S` seconds; takes it away at the end, however that comes."""
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(run, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        run.folder.delete(RunFolder.HEARTBEAT)


def read(run: RunFolder) -> dict[str, Any] | None:
    """The last sign of life (host, pid, time `written`, `progress`), if the driver left one and did not end."""
    if not run.folder.exists(RunFolder.HEARTBEAT):
        return None
    try:
        return run.folder.read_json(RunFolder.HEARTBEAT)
    except FileNotFoundError:  # the driver has just ended
        return None


def _beat(run: RunFolder, ended: threading.Event) -> None:
    who = {"host": socket.gethostname(), "pid": os.getpid()}
    while True:
        state = progress.current()
        sign = {**who, "written": time.time(), "progress": state and asdict(state)}
        try:
            run.folder.write_json(RunFolder.HEARTBEAT, sign)
        except (StorageError, OSError) as error:  # the run goes on unseen; what it writes itself fails loudly
            why = first_line(error)
            log.event("no_heartbeat", f"pds-ray: `pds-ray status` cannot follow this run: {why}", "warning", why=why)
        if ended.wait(BEAT_S):
            return
