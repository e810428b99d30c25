"""On PYTHONPATH, each process of a test meets poison: images that kill their reader.

Poison is a good image with a mark behind its end, where no decoder looks: POISON:crash,
POISON:hang or POISON:eat.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

import PIL.Image

_open = PIL.Image.open


def _open_poison(file, *args, **kwargs):
    kind = file.getvalue()[-32:].partition(b"POISON:")[2] if hasattr(file, "getvalue") else b""
    if kind == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == b"hang":
        ctypes.PyDLL(None).sleep(
            1_000_000
        )  # in C, with the interpreter's lock held: no signal handler ever runs
    elif kind == b"eat":
        held = []
        while len(held) < 64:  # a GiB
            held.append(b"\1" * (16 << 20))
            time.sleep(0.01)
        time.sleep(1_000_000)
    return _open(file, *args, **kwargs)


PIL.Image.open = _open_poison
