"""Heartbeat file of the driver: while it lives, its progress lies in the run folder.

`pds-ray status` reads it. On an object store, which has no locks, it also keeps a second driver out
of the run folder: a driver that sees the heartbeat of another one that is alive interrupts its run,
as Ctrl-C does, once the run's thread runs Python code again.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
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
"""Age after which a driver without a new heartbeat counts as gone."""
FORGOTTEN_S = 3_600.0
"""Age from which a heartbeat is stale whatever the clocks say: no two differ by so much."""
SETTLE_S = 3.0
"""Time within which two drivers that start at once have both written their first heartbeat."""


@contextmanager
def beating(run: RunFolder) -> Iterator[None]:
    """Write the heartbeat every `BEAT_S` seconds, and remove it when the block ends in any way.

    On an object store the heartbeat of another driver keeps this one out of the folder, at the
    start and later, when the block is interrupted.

    Raises StorageError in one line if another driver is at work.
    """
    if is_remote(run.folder.path):
        _claim(run)
    ended = threading.Event()
    others: list[StorageError] = []
    thread = start_thread(_beat, run, ended, threading.current_thread(), others)
    try:
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with _warned():  # an error of the clean-up must not hide the one that ended the run
                beat = read(run)
                if beat is None or _is_mine(beat):
                    run.folder.delete(RunFolder.HEARTBEAT)
    except KeyboardInterrupt:
        if others:
            raise others[0] from None
        raise


def _claim(run: RunFolder) -> None:
    """Write the first heartbeat once no other driver writes any.

    A driver that was killed is waited for until it counts as gone.
    """
    _wait_for_silence(run)
    _write(run)
    try:
        time.sleep(SETTLE_S)
    except BaseException:  # interrupted: the next driver must not wait for this one
        run.folder.delete(RunFolder.HEARTBEAT)
        raise
    beat = read(run)
    if beat is not None and not _is_mine(beat):
        raise _occupied(run, beat)  # both started at once: one of the two has written last


def _wait_for_silence(run: RunFolder) -> None:
    """Return once no other driver writes heartbeats. Raises StorageError if one does."""
    first = read(run)
    if first is None or _is_mine(first) or abs(time.time() - first["written"]) >= FORGOTTEN_S:
        return
    text = (
        f"pds-ray: {_who(first)} may be at work in {run.folder.shown}; "
        "waiting to see whether it is gone"
    )
    log.event("waiting_for_driver", text, "warning", host=first["host"], pid=first["pid"])
    until = time.monotonic() + SILENT_S  # by one clock: those of two machines may differ
    while time.monotonic() < until:
        time.sleep(BEAT_S / 2)
        beat = read(run)
        if beat is None:
            return
        if beat != first:
            raise _occupied(run, beat)


def _occupied(run: RunFolder, beat: dict[str, Any]) -> StorageError:
    age = time.time() - beat["written"]
    return StorageError(
        f"{_who(beat)} is at work in {run.folder.shown}, heard of {age:.0f} s ago; "
        "wait for it or give another --out"
    )


def _who(beat: dict[str, Any]) -> str:
    return f"another driver (process {beat['pid']} on {beat['host']})"


def _is_mine(beat: dict[str, Any]) -> bool:
    """Return True for a heartbeat of this process, or of a dead one that had the same number."""
    return (beat["host"], beat["pid"]) == (socket.gethostname(), os.getpid())


def read(run: RunFolder) -> dict[str, Any] | None:
    """Return the last heartbeat (host, pid, time `written`, `progress`) of a driver.

    None if there is no driver, or none that came as far as its first heartbeat.
    """
    if not run.folder.exists(RunFolder.HEARTBEAT):
        return None
    try:
        return run.folder.read_json(RunFolder.HEARTBEAT)
    except (FileNotFoundError, ValueError):  # the driver has just ended, or died while writing
        return None


def _write(run: RunFolder) -> None:
    state = progress.current()
    who = {"host": socket.gethostname(), "pid": os.getpid()}
    beat = {**who, "written": time.time(), "progress": state and asdict(state)}
    run.folder.write_json(RunFolder.HEARTBEAT, beat)


def _beat(
    run: RunFolder, ended: threading.Event, thread: threading.Thread, others: list[StorageError]
) -> None:
    """Write heartbeats until `ended` is set, or until another driver is seen alive.

    Then the run's thread is interrupted: of two drivers, the first that sees the other ends. What
    it is to raise is added to `others`.
    """
    other: dict[str, Any] | None = None
    while True:
        with _warned():
            beat = read(run) if is_remote(run.folder.path) else None
            if beat is not None and not _is_mine(beat):
                if other is not None and beat != other:  # a stale heartbeat would not change
                    others.append(_occupied(run, beat))
                    log.event("another_driver", level="error", host=beat["host"])
                    _interrupt(thread)
                    return
                other = beat
            _write(run)
        if ended.wait(BEAT_S):
            return


def _interrupt(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in a thread as soon as it runs Python code.

    The program around a run may have other plans for a Ctrl-C, and another main thread.
    """
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if own and thread is threading.main_thread():
        _thread.interrupt_main()  # this one also ends calls in which Ray waits
    else:
        number, error = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, error)


@contextmanager
def _warned() -> Iterator[None]:
    """Log storage errors as a warning, and go on.

    The run does not need its heartbeat; its own writes fail loudly.
    """
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
