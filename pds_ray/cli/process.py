"""The process of a command: streams, signals, warnings and logging, set up and put back."""

from __future__ import annotations

import atexit
import errno
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

QUIET = {  # for libraries that print on import or on load; they stay set when `main` ends
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


def usable_streams() -> None:
    """Open the standard streams that are closed, as services close them.

    A closed one is None, and its number would go to the next file that is opened: what C code
    prints would end up in that.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # the lowest number first
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode))  # noqa: SIM115


def flush() -> None:
    """Write what standard output holds back in files and pipes.

    Nowhere, if its reader or its terminal is gone.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Silence libraries in the block, unless the command is verbose."""
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if not verbose:
                for name, value in QUIET.items():
                    os.environ.setdefault(name, value)
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def any_character() -> Iterator[None]:
    """Print characters that standard output cannot encode as escapes, as standard error does."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):  # another program's, or closed
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM interrupt the block as Ctrl-C does, in the background too.

    A stopped job then ends like an interrupted one, and so does one whose terminal is closed, if
    nohup does not shield it.
    """
    if not in_main_thread():  # only that one may set handlers
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        atexit.unregister(ignore_interrupts)
        atexit.register(ignore_interrupts)  # again: the last registered is the first called


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def ignore_interrupts() -> None:
    """Ignore Ctrl-C: all is done, and an interrupt would only spoil the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
