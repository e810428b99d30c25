"""A run's sign of life: while the driver lives, it leaves in the run folder how far it is, for `pds-ray status`."""

from __future__ import annotations

import _thread
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from pds_ray.errors import first_line
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import StorageError, is_remote
from pds_ray.telemetry import log, progress
from pds_ray.telemetry.state import start_thread

BEAT_S = 10.0
SILENT_S = 6 * BEAT_S
"""After so long without a sign of life a driver counts as gone."""
FORGOTTEN_S = 3_600.0
"""A sign of life that is older is nobody's: no two clocks differ by so much."""
SETTLE_S = 3.0
"""In which the signs of two drivers that begin at once are all written."""


@contextmanager
def beating(run: RunFolder) -> Iterator[None]:
    """Writes the sign of life every `BEAT_S` seconds; takes it away at the end, however that comes.

    An object store has no locks: there the sign of life of another driver keeps this one out of the folder.

    Raises StorageError in one line if another driver is at work.
    """
    if is_remote(run.folder.path):
        _claim(run)
    ended = threading.Event()
    thread = start_thread(_beat, run, ended)
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with _told():  # an error that ended the run is not to be hidden by one of the cleaning
            sign = read(run)
            if sign is None or _is_mine(sign):
                run.folder.delete(RunFolder.HEARTBEAT)


def _claim(run: RunFolder) -> None:
    """Leaves a first sign once no other driver gives any; one that was killed is waited for until it counts as gone."""
    _wait_for_silence(run)
    _sign(run)
    try:
        time.sleep(SETTLE_S)
    except BaseException:  # interrupted: who comes next is not to wait for this one
        run.folder.delete(RunFolder.HEARTBEAT)
        raise
    sign = read(run)
    if sign is not None and not _is_mine(sign):
        raise _occupied(run, sign)  # begun at the same instant: one of the two has the last word


def _wait_for_silence(run: RunFolder) -> None:
    first = read(run)
    if first is None or _is_mine(first) or abs(time.time() - first["written"]) >= FORGOTTEN_S:
        return
    text = f"pds-ray: {_who(first)} may be at work in {run.folder.shown}; waiting to see whether it is gone"
    log.event("waiting_for_driver", text, "warning", host=first["host"], pid=first["pid"])
    until = time.monotonic() + SILENT_S  # not by the two clocks, which may differ
    while time.monotonic() < until:
        time.sleep(BEAT_S / 2)
        sign = read(run)
        if sign is None:
            return
        if sign != first:
            raise _occupied(run, sign)


def _occupied(run: RunFolder, sign: dict[str, Any]) -> StorageError:
    age = time.time() - sign["written"]
    return StorageError(
        f"{_who(sign)} is at work in {run.folder.shown}, heard of {age:.0f} s ago; wait for it or give another --out"
    )


def _who(sign: dict[str, Any]) -> str:
    return f"another driver (process {sign['pid']} on {sign['host']})"


def _is_mine(sign: dict[str, Any]) -> bool:
    """Also one of a process before this one that had its number: it is dead."""
    return (sign["host"], sign["pid"]) == (socket.gethostname(), os.getpid())


def read(run: RunFolder) -> dict[str, Any] | None:
    """The last sign of life (host, pid, time `written`, `progress`), if the driver left one and did not end."""
    if not run.folder.exists(RunFolder.HEARTBEAT):
        return None
    try:
        return run.folder.read_json(RunFolder.HEARTBEAT)
    except (FileNotFoundError, ValueError):  # the driver has just ended, or died while it wrote
        return None


def _sign(run: RunFolder) -> None:
    state = progress.current()
    who = {"host": socket.gethostname(), "pid": os.getpid()}
    sign = {**who, "written": time.time(), "progress": state and asdict(state)}
    run.folder.write_json(RunFolder.HEARTBEAT, sign)


def _beat(run: RunFolder, ended: threading.Event) -> None:
    foreign: dict[str, Any] | None = None
    while True:
        with _told():
            sign = read(run) if is_remote(run.folder.path) else None
            if sign is not None and not _is_mine(sign):
                if (
                    foreign is not None and sign != foreign
                ):  # it lives: one that is only old stays what it was
                    log.event(
                        "another_driver",
                        f"pds-ray: {_occupied(run, sign)}",
                        "error",
                        host=sign["host"],
                    )
                    _thread.interrupt_main()  # of the two the first to see it ends, as if by Ctrl-C
                    return
                foreign = sign
            _sign(run)
        if ended.wait(BEAT_S):
            return


@contextmanager
def _told() -> Iterator[None]:
    """What keeps a sign from being written or removed is told. The run goes on; what it writes itself fails loudly."""
    try:
        yield
    except (StorageError, OSError) as error:
        why = first_line(error)
        log.event(
            "no_heartbeat",
            f"pds-ray: `pds-ray status` cannot follow this run: {why}",
            "warning",
            why=why,
        )
