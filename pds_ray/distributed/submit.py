"""Commands as jobs of a Ray cluster, by its Jobs API."""

from __future__ import annotations

import asyncio
import hashlib
import shlex
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pds_ray.config import ConfigError
from pds_ray.errors import first_line, without_secrets
from pds_ray.storage import is_remote

FOLLOW_AGAIN_S = 2.0
AGENT_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
PACKAGE = Path(__file__).parents[1]
CONFIG = "run.yaml"  # the configuration's name in the job's working directory
PATHS = ("out", "set", "run", "source", "embed.store", "test", "val")
"""What names places, in a command or its configuration; the first that is there is what the command works on."""


@dataclass(frozen=True)
class Job:
    """`pds-ray COMMAND` as a job."""

    command: list[str]
    paths: dict[str, str]
    """Those of `PATHS` that the command names."""
    config: str | None
    """A file of this machine that the command names; it is sent along."""
    env: dict[str, str]
    driver_cpus: float
    """With 0 the driver runs on the head."""
    installed: bool
    """Use the pds_ray of the cluster; otherwise this one is sent along."""

    @property
    def target(self) -> str:
        """What the command works on: one job at a time is let at it."""
        return next(iter(self.paths[name] for name in PATHS if name in self.paths), shlex.join(self.command))

    def check(self) -> None:
        """Raises ConfigError for paths that mean nothing on a cluster, and for credentials, which it would show."""
        if any(without_secrets(text) != text for text in (*self.command, *self.paths.values())):
            raise ConfigError(
                "the command holds credentials, and a cluster shows commands; put them in its environment"
            )
        for name, path in self.paths.items():
            if not (is_remote(path) or path.startswith("scenes:") or path.rpartition(":")[2].startswith("/")):
                raise ConfigError(
                    f"{name} is {path!r}; a job needs a path that all nodes have, from the root, or a URI"
                )


def submit(job: Job, address: str | None) -> str:
    """Submits a job and returns its id.

    Raises ConfigError in one line if the job cannot be, if no cluster can be reached there, or if it refuses or already
    works on the same target.
    """
    job.check()
    client = _client(address)
    prefix = f"pds-ray-{hashlib.sha256(job.target.encode()).hexdigest()[:10]}-"
    try:
        before = [other for other in client.list_jobs() if (other.submission_id or "").startswith(prefix)]
        for other in before:
            if not other.status.is_terminal():
                name = other.submission_id
                raise ConfigError(f"job {name} already works on {job.target}; wait for it, or `ray job stop {name}`")
        # two who submit at once get the same id, and Ray refuses one of them
        numbers = [int(other.submission_id.removeprefix(prefix)) for other in before if other.submission_id]
        command, runtime_env = list(job.command), dict[str, Any](env_vars=job.env)
        with tempfile.TemporaryDirectory() as folder:
            if job.config is not None:
                (Path(folder) / CONFIG).write_bytes(Path(job.config).read_bytes())
                names = {job.config: CONFIG, f"--config={job.config}": f"--config={CONFIG}"}
                command = [names.get(part, part) for part in command]
            runtime_env["working_dir"] = folder
            if not job.installed:
                runtime_env["py_modules"] = [str(PACKAGE)]
                runtime_env["excludes"] = ["__pycache__"]
            return _submit(
                client,
                entrypoint=shlex.join(["python", "-m", "pds_ray.cli", *command]),
                submission_id=f"{prefix}{max(numbers, default=0) + 1}",
                runtime_env=runtime_env,
                entrypoint_num_cpus=job.driver_cpus or None,
            )
    except RuntimeError as error:
        raise ConfigError(f"the cluster refuses the job: {first_line(error)}") from error


def _submit(client: JobSubmissionClient, **job: Any) -> str:
    """A head that has just started answers before it takes jobs."""
    for wait_s in AGENT_WAITS_S:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "try again later" not in str(error):
                raise
            time.sleep(wait_s)
    return client.submit_job(**job)


def follow(job: str, address: str | None) -> tuple[str, int]:
    """Prints what the job prints until it ends. Returns how it ended (SUCCEEDED, FAILED, STOPPED) and its exit code."""
    client = _client(address)
    asyncio.run(_follow(client, job))
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return info.status, 0
    return info.status, info.driver_exit_code or 1


async def _follow(client: JobSubmissionClient, job: str) -> None:
    shown = 0  # characters; whoever follows anew is told everything again
    while True:
        position = 0
        with suppress(RuntimeError, aiohttp.ClientError):  # the connection broke; the job does not depend on it
            async for text in client.tail_job_logs(job):
                sys.stdout.write(text[max(0, shown - position) :])
                sys.stdout.flush()
                position += len(text)
                shown = max(shown, position)
        if client.get_job_status(job).is_terminal():
            return
        await asyncio.sleep(FOLLOW_AGAIN_S)


def _client(address: str | None) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        why = "nothing answers" if isinstance(error, ConnectionError) else first_line(error)
        raise ConfigError(
            f"no Ray cluster takes jobs at {address or 'the default address'} ({why}); give --address "
            "http://HEAD:8265, and where it wants a token, RAY_AUTH_MODE=token and the token in RAY_AUTH_TOKEN"
        ) from error
