"""A script that starts Ray clusters of its own, run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

TIMEOUT_S = 500


def output_of(script: str) -> list[str]:
    """Return the lines that a script prints; it must exit with 0."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=dict(os.environ), capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
