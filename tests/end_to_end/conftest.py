"""The command line, in this process and on the Ray of the session: a start of both takes 10 s.

Few tests use a process of its own (`tests.support.command_line.process`): those of processes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command_line import DEMO, Run, in_process
from tests.support.finished_runs import finished_runs


@pytest.fixture(scope="session")
def pds_ray(request: pytest.FixtureRequest) -> Run:
    """Run `pds-ray ARGS` to its end in this process."""
    request.getfixturevalue("local_ray")
    return in_process


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, pds_ray: Run
) -> tuple[Path, subprocess.CompletedProcess]:
    """Make a run of the built-in world, never interrupted: the reference of the others."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = pds_ray("distill", *DEMO, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture(scope="session")
def finished_by(tmp_path_factory: pytest.TempPathFactory, pds_ray: Run) -> Callable[[str], Path]:
    """Return the finished run of a method, to be copied."""
    return finished_runs(pds_ray, tmp_path_factory.mktemp("finished_by"))
