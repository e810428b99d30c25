"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.command_line import DEMO, Run, command


@pytest.fixture(scope="session")
def pds_ray() -> Run:
    """Runs `pds-ray ARGS` to its end, without a network."""

    def run(*args: str, **options) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            command(*args),
            capture_output=True,
            text=True,
            timeout=400,
            env=environment,
            check=False,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, pds_ray: Run
) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished run of the built-in world, never interrupted: the reference of the others."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = pds_ray("distill", *DEMO, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done
