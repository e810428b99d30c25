"""Commands as jobs of a Ray cluster, through its Jobs API."""

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
from ray.exceptions import AuthenticationError, RpcError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pds_ray.catalog import SOURCES
from pds_ray.config import ConfigError
from pds_ray.distributed.address import of_jobs
from pds_ray.errors import first_line, without_secrets
from pds_ray.store.storage import Folder, is_remote
from pds_ray.telemetry import log

FOLLOW_AGAIN_S = 2.0
PATIENCE_S = 300.0
"""A cluster that gives no answer for so long is not followed any more."""
AGENT_WAIT_S, AGENT_POLL_S = 600.0, 2.0
"""Seconds that a new cluster may take until a node can start jobs; seconds between attempts."""
PACKAGE = Path(__file__).parents[1]
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""Environment of a job unless --env sets it.

After Ray's own 3 s a stopped driver is killed, which
on an object store may be too early for it to record in the run folder that it was interrupted.
"""
CONFIG = "run.yaml"  # the configuration's name in the job's working directory
PATHS = ("out", "set", "run", "source", "embed.store", "test", "val")
"""Options that name places; a command works on the first that it or its file gives."""


@dataclass(frozen=True)
class Job:
    """`pds-ray COMMAND` as a job."""

    command: list[str]
    paths: dict[str, str]
    """The paths among `PATHS` that the command names."""
    config: str | None
    """A file of this machine that the command names; it is sent along."""
    env: dict[str, str]
    driver_cpus: float
    """With 0 the driver runs on the head."""
    installed: bool
    """Use the pds_ray of the cluster; otherwise this one is sent along."""

    @property
    def target(self) -> str:
        """The place that the command works on, in one spelling; one job at a time may."""
        path = next((self.paths[name] for name in PATHS if name in self.paths), None)
        if path is None:
            return shlex.join(self.command)
        return path if _scheme(path) else Folder(path).place

    def check(self) -> None:
        """Raise ConfigError for paths unknown to a cluster, and for credentials, which it shows."""
        if any(without_secrets(text) != text for text in (*self.command, *self.paths.values())):
            raise ConfigError(
                "the command holds credentials, and a cluster shows commands; put them in its "
                "environment"
            )
        for name, path in self.paths.items():
            scheme = _scheme(path)
            place = path.removeprefix(scheme).removeprefix("file://")
            if not (is_remote(path) or scheme == "scenes:" or place.startswith("/")):
                raise ConfigError(
                    f"{name} is {path!r}; a job needs a path that all nodes have, from the root, "
                    "or a URI"
                )


def _scheme(path: str) -> str:
    """Return the prefix of a source that is no path or URI, as `coco:` in coco:ROOT:SPLIT."""
    scheme, mark, _ = path.partition(":")
    return scheme + mark if mark and scheme in SOURCES else ""


def stop_command(name: str, address: str | None) -> str:
    """Return the command that ends a job, for people to type."""
    return f"ray job stop {name}" + (f" --address {address}" if address else "")


def submit(job: Job, address: str | None) -> str:
    """Submit a job and return its id.

    Raises ConfigError in one line if the job is refused here, if no cluster can be reached there,
    or if the cluster refuses it, already works on the same target or can start no job for
    AGENT_WAIT_S seconds.
    """
    job.check()
    client = _client(address)
    try:
        name = _new_id(client, job, address)
        with tempfile.TemporaryDirectory() as folder:
            return _submit(client, submission_id=name, **_request(job, Path(folder)))
    except RuntimeError as error:
        raise ConfigError(f"the cluster refuses the job: {first_line(error)}") from error
    except requests.RequestException as error:
        raise ConfigError(
            f"no answer from the cluster ({_reason(error)}); submit again: a job that it took is "
            "named then"
        ) from error


def _new_id(client: JobSubmissionClient, job: Job, address: str | None) -> str:
    """Return an id for the job. Raises ConfigError if another job works on its target.

    Two who submit at once get the same id, and Ray refuses one of them.
    """
    prefix = f"pds-ray-{hashlib.sha256(job.target.encode()).hexdigest()[:10]}-"
    numbers = [0]
    for other in client.list_jobs():
        name = other.submission_id or ""
        if not name.startswith(prefix):
            continue
        if not other.status.is_terminal():
            raise ConfigError(
                f"job {name} already works on {job.target}; wait for it, or "
                f"`{stop_command(name, address)}`"
            )
        numbers.append(int(name.removeprefix(prefix)))
    return f"{prefix}{max(numbers) + 1}"


def _request(job: Job, folder: Path) -> dict[str, Any]:
    """Return the job as arguments of `submit_job`; its working directory is `folder`."""
    command = list(job.command)
    if job.config is not None:
        (folder / CONFIG).write_bytes(Path(job.config).read_bytes())
        names = {job.config: CONFIG, f"--config={job.config}": f"--config={CONFIG}"}
        command = [names.get(part, part) for part in command]
    package = {} if job.installed else {"py_modules": [str(PACKAGE)], "excludes": ["__pycache__"]}
    return {
        "entrypoint": shlex.join(["python", "-m", "pds_ray.cli", *command]),
        "entrypoint_num_cpus": job.driver_cpus or None,
        "runtime_env": {
            "env_vars": {**ENVIRONMENT, **job.env},
            "working_dir": str(folder),
            **package,
        },
    }


def _submit(client: JobSubmissionClient, **request: Any) -> str:
    """Submit a job, and again while the cluster is new: its head answers before nodes take jobs."""
    deadline = time.monotonic() + AGENT_WAIT_S
    waiting = False
    while True:
        try:
            return client.submit_job(**request)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the cluster answers, but for {AGENT_WAIT_S / 60:.0f} minutes none of its "
                    "nodes could start a job (no job agent); see `ray status` and "
                    "dashboard_agent.log on its head, and submit again"
                ) from error
        if not waiting:
            text = "pds-ray: the cluster cannot start jobs yet; waiting for one of its nodes"
            log.event("waiting_for_cluster", text)
            waiting = True
        time.sleep(AGENT_POLL_S)


def follow(job: str, address: str | None) -> tuple[str, int]:
    """Print what the job prints until it ends; return its final status and its exit code.

    The status is SUCCEEDED, FAILED or STOPPED. Raises ConfigError in one line if the cluster gives
    no answer for `PATIENCE_S` seconds.
    """
    info = asyncio.run(_follow(_client(address), job))
    if info.status == JobStatus.SUCCEEDED:
        return info.status, 0
    return info.status, info.driver_exit_code or 1


async def _follow(client: JobSubmissionClient, job: str) -> JobDetails:
    shown = 0  # characters; each connection tells the log from its beginning
    while True:
        position = 0
        # a connection that breaks: the job does not depend on it
        with suppress(RuntimeError, aiohttp.ClientError):
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
    """Return what the cluster knows of a job.

    It is asked again for PATIENCE_S seconds, as a forwarded port may come back.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.get_job_info(job)
        except (requests.RequestException, RuntimeError, AuthenticationError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no word of job {job} for {PATIENCE_S / 60:.0f} minutes ({_reason(error)}); "
                    "unless its cluster is gone it goes on: "
                    f"`ray job logs -f --address {client.get_address()} {job}` follows it"
                ) from error
        await asyncio.sleep(FOLLOW_AGAIN_S)


def _client(flag: str | None) -> JobSubmissionClient:
    address = of_jobs(flag)
    if address:
        address.check_takes_jobs()
    try:
        return JobSubmissionClient(flag)
    except (
        ConnectionError,
        requests.RequestException,
        RuntimeError,
        ValueError,
        AuthenticationError,
        RpcError,
    ) as error:
        raise ConfigError(
            f"no Ray cluster takes jobs at {address or 'the default address'} ({_reason(error)}); "
            "give http://HEAD:8265, and where it wants a token, RAY_AUTH_MODE=token and the token "
            "in RAY_AUTH_TOKEN"
        ) from error


def _reason(error: Exception) -> str:
    silent = (ConnectionError, requests.ConnectionError, requests.Timeout)
    return "nothing answers" if isinstance(error, silent) else first_line(error)
