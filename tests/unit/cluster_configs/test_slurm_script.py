"""The Slurm script, run with stand-ins for Slurm's commands; `make lint-configs` lints it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cluster_files import CLUSTERS, start_options

SCRIPT = CLUSTERS / "slurm" / "pds_ray.sbatch"
PATIENCE_S = 300
TEXT = SCRIPT.read_text(encoding="utf-8")


def test_slurm_reads_every_directive() -> None:
    """It stops at the first command."""
    lines = TEXT.splitlines()
    first_command = next(
        number for number, line in enumerate(lines) if line and not line.startswith("#")
    )
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < first_command
    given = {re.split(r"[ =]", lines[number])[1] for number in directives}
    assert {"--requeue", "--signal", "--time", "--nodes", "--gpus-per-node", "--open-mode"} <= given


def test_ray_has_the_options() -> None:
    command = re.search(
        r"ray symmetric-run (.*?) -- python", TEXT.replace("\\\n", " "), flags=re.DOTALL
    )
    assert command
    options = set(re.findall(r"--([\w-]+)", command[1]))
    assert "object-spilling-directory" in options
    assert options - {"address", "min-nodes"} <= start_options()


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a job whose Slurm commands log their calls.

    srun does what $STEP says.
    """
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    commands = {
        "srun": r"""printf "%s\n" "$RAY_AUTH_MODE" "${#RAY_AUTH_TOKEN}" "$@" > srun.log
            eval "$STEP" """,
        "scontrol": r"""echo "$@" >> scontrol.log
            [[ $1 == show ]] && printf "node7\nnode8\n"; true""",
    }
    for name, body in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PDS_RAY_VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
        "TMPDIR": str(tmp_path),
    }


@pytest.mark.parametrize("code", [0, 3])
def test_the_job_ends_as_the_run_does(tmp_path: Path, slurm: dict[str, str], code: int) -> None:
    environment = {**slurm, "STEP": f"exit {code}"}
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == code
    said = (tmp_path / "srun.log").read_text(encoding="utf-8").splitlines()
    assert said[:2] == ["token", "64"]
    assert said[said.index("--address") + 1] == "node7:6379"
    assert said[said.index("--min-nodes") + 1] == "2"
    assert "--num-cpus=14" in said
    assert said[said.index("--") + 1 :][:2] == ["python", "jobs/distill.py"]
    assert "requeue" not in (tmp_path / "scontrol.log").read_text(encoding="utf-8")


def test_before_the_time_is_up_the_job_is_requeued_while_the_run_goes_on(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    step = "touch begun; until [[ -e signalled ]]; do sleep 0.1; done; touch ended"
    job = subprocess.Popen(["bash", SCRIPT], cwd=tmp_path, env={**slurm, "STEP": step})
    try:
        until(tmp_path / "begun")
        job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1 does, to the script alone
        until(tmp_path / "scontrol.log", "requeue 42")
        assert job.poll() is None, "it went before Slurm ended it"
        (tmp_path / "signalled").touch()
        assert job.wait(timeout=PATIENCE_S) != 0, "a job that was requeued must not look finished"
        assert (tmp_path / "ended").exists()
    finally:
        job.kill()


def until(path: Path, text: str = "") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (path.exists() and text in path.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.05)
