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
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pds_ray.catalog import SOURCES
from pds_ray.config import ConfigError
from pds_ray.errors import first_line, without_secrets
from pds_ray.store.storage import Folder, is_remote

FOLLOW_AGAIN_S = 2.0
PATIENCE_S = 300.0
"""So long a cluster may give no answer before its job is followed no more."""
AGENT_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
PACKAGE = Path(__file__).parents[1]
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""What a job gets unless told otherwise. After Ray's own 3 s a stopped driver is killed, which on an object store may
not be enough to say in the run folder that it was interrupted."""
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
        """What the command works on, however it is written: one job at a time is let at it."""
        path = next((self.paths[name] for name in PATHS if name in self.paths), None)
        if path is None:
            return shlex.join(self.command)
        return path if _scheme(path) else Folder(path).place

    def check(self) -> None:
        """Raises ConfigError for paths that mean nothing on a cluster, and for credentials, which it would show."""
        if any(without_secrets(text) != text for text in (*self.command, *self.paths.values())):
            raise ConfigError(
                "the command holds credentials, and a cluster shows commands; put them in its environment"
            )
        for name, path in self.paths.items():
            scheme = _scheme(path)
            place = path.removeprefix(scheme).removeprefix("file://")
            if not (is_remote(path) or scheme == "scenes:" or place.startswith("/")):
                raise ConfigError(
                    f"{name} is {path!r}; a job needs a path that all nodes have, from the root, or a URI"
                )


def _scheme(path: str) -> str:
    """What a source that is no plain path or URI begins with, as `coco:` in coco:ROOT:SPLIT, or ""."""
    scheme, mark, _ = path.partition(":")
    return scheme + mark if mark and scheme in SOURCES else ""


def stop_command(name: str, address: str | None) -> str:
    """What ends a job, for people to type."""
    return f"ray job stop {name}" + (f" --address {address}" if address else "")


def submit(job: Job, address: str | None) -> str:
    """Submits a job and returns its id.

    Raises ConfigError in one line if the job cannot be, if no cluster can be reached there, or if it refuses or already
    works on the same target.
    """
    job.check()
    client = _client(address)
    prefix = f"pds-ray-{hashlib.sha256(job.target.encode()).hexdigest()[:10]}-"
    try:
        before = [
            other for other in client.list_jobs() if (other.submission_id or "").startswith(prefix)
        ]
        for other in before:
            if not other.status.is_terminal():
                name = str(other.submission_id)
                raise ConfigError(
                    f"job {name} already works on {job.target}; wait for it, or `{stop_command(name, address)}`"
                )
        # two who submit at once get the same id, and Ray refuses one of them
        numbers = [
            int(other.submission_id.removeprefix(prefix)) for other in before if other.submission_id
        ]
        command, runtime_env = (
            list(job.command),
            dict[str, Any](env_vars={**ENVIRONMENT, **job.env}),
        )
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
    except requests.RequestException as error:
        raise ConfigError(
            f"no answer from the cluster ({_reason(error)}); submit again: a job that it took is named then"
        ) from error


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
    """Prints what the job prints until it ends. Returns how it ended (SUCCEEDED, FAILED, STOPPED) and its exit code.

    Raises ConfigError in one line if the cluster gives no answer for `PATIENCE_S` seconds.
    """
    info = asyncio.run(_follow(_client(address), job))
    if info.status == JobStatus.SUCCEEDED:
        return info.status, 0
    return info.status, info.driver_exit_code or 1


async def _follow(client: JobSubmissionClient, job: str) -> JobDetails:
    shown = 0  # characters; whoever follows anew is told everything again
    while True:
        position = 0
        with suppress(
            RuntimeError, aiohttp.ClientError
        ):  # the connection broke; the job does not depend on it
            async for text in client.tail_job_logs(job):
                sys.stdout.write(text[max(0, shown - position) :])
                sys.stdout.flush()
                position += len(text)
                shown = max(shown, position)
        info = await _info(client, job)
        if info.status.is_terminal():
            return info
        await asyncio.sleep(FOLLOW_AGAIN_S)


async def _info(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the cluster knows of a job. A forwarded port that breaks may come back: it is asked again for a while."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.get_job_info(job)
        except (requests.RequestException, RuntimeError, AuthenticationError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no word of job {job} for {PATIENCE_S / 60:.0f} minutes ({_reason(error)}); unless its cluster is "
                    f"gone it goes on: `ray job logs -f --address {client.get_address()} {job}` follows it"
                ) from error
        await asyncio.sleep(FOLLOW_AGAIN_S)


def _client(address: str | None) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except (
        ConnectionError,
        requests.RequestException,
        RuntimeError,
        ValueError,
        AuthenticationError,
    ) as error:
        raise ConfigError(
            f"no Ray cluster takes jobs at {address or 'the default address'} ({_reason(error)}); give --address "
            "http://HEAD:8265, and where it wants a token, RAY_AUTH_MODE=token and the token in RAY_AUTH_TOKEN"
        ) from error


def _reason(error: Exception) -> str:
    silent = (ConnectionError, requests.ConnectionError, requests.Timeout)
    return "nothing answers" if isinstance(error, silent) else first_line(error)
