"""Connecting to a Ray cluster or starting a local one, the options set there, and errors of workers as errors of the driver."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray

from pds_ray.config import ConfigError, RayConfig
from pds_ray.distributed import (
    DATA,
    DRIVER,
    MACHINES_LOST,
    NODES,
    TASK_RETRIES,
    metrics,
)
from pds_ray.distributed.process import without_collections
from pds_ray.distributed.tasks import LOST
from pds_ray.distributed.watch import no_space
from pds_ray.errors import UserError, first_line

CONNECT_TIMEOUT_S = 10


def start(config: RayConfig, run: str = "") -> dict[str, Any]:
    """Connects to a cluster, or starts a local Ray sized to the machine; returns the settings in force, for run.json.

    `run` is what metrics are tagged with.

    Raises ConfigError in one line if a given address does not answer.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # threads of a model that wait for each other must not spin while readers and decoders want the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with without_collections():
        if not ray.is_initialized():
            with _muffled(), _own_signals():
                _connect(address) if address else _start_local(config)
        metrics.of_run(run)
        _set_data_options()
    resources = ray.cluster_resources()
    return {
        "address": address or "local",
        "cpus": resources.get("CPU", 0),
        "gpus": resources.get("GPU", 0),
        "object_store_bytes": int(resources.get("object_store_memory", 0)),
        **_limits_in_force(local=address is None),
    }


QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def _connect(address: str) -> None:
    """Joins a running cluster. Raises ConfigError in one line if none answers."""
    advice = "start one or drop --address"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # asked first: Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(
                f"nothing answers at --address {address} ({error.strerror or error}); {advice}"
            ) from None
    try:
        ray.init(address=address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        first = first_line(error)
        token = (
            ""
            if os.environ.get("RAY_AUTH_MODE")
            else "set RAY_AUTH_MODE=token and its token if it wants one, "
        )
        raise ConfigError(
            f"no Ray cluster can be joined at {address} ({first}); {token}{advice}"
        ) from error


def _start_local(config: RayConfig) -> None:
    free = psutil.virtual_memory().available
    store = (
        int(config.object_store_gib * 2**30) if config.object_store_gib else min(free // 4, 8 << 30)
    )
    cpus = config.num_cpus or os.cpu_count()
    ray.init(
        address="local", num_cpus=cpus, object_store_memory=store, include_dashboard=False, **QUIET
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Sets the handlers of signals again that Ray replaces while it starts: its own abort on SIGTERM with a dump."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)


@contextmanager
def _muffled() -> Iterator[None]:
    """Keeps what Ray's C++ side prints while it starts off the terminal; what goes wrong is raised anyway."""
    if (
        os.environ.get("RAY_BACKEND_LOG_LEVEL") != "fatal"
    ):  # set by the command line unless it is verbose
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raises a UserError of a worker (weights that cannot be loaded) as one of the driver, without Ray's wrapping."""
    try:
        yield
    except (ray.exceptions.RayError, UserError) as error:
        cause = getattr(error, "cause", None)
        if no_space(error):
            raise UserError(no_space(error)) from error
        if isinstance(cause, OSError) and not isinstance(
            cause, (UserError, *LOST)
        ):  # a disk that is full, or gone
            raise UserError(first_line(cause)) from error
        kinds = r"^pds_ray\.[\w.]*\.(?:Config|Source|Storage|DistilledSet)Error: (.+)$"
        found = re.findall(kinds, str(error), flags=re.MULTILINE)
        if found:
            raise UserError(found[-1]) from error
        raise


def stop() -> None:
    """Leaves the cluster; ends a local Ray."""
    ray.shutdown()


def _limits_in_force(local: bool) -> dict[str, Any]:
    """The limits of the package as they are; those of the nodes of a cluster that others started are not known."""
    context = ray.data.DataContext.get_current()
    environment = {**DRIVER, **(NODES if local else {})}
    found: dict[str, Any] = {name: os.environ[f"RAY_{name}"] for name in environment}
    if local:
        node: Any = ray._private.worker._global_node
        found["object_spilling_directory"] = (
            node.get_session_dir_path()
        )  # unless it was said otherwise, as it is not
    found |= {name: getattr(context, name) for name in DATA}
    return {
        **found,
        "max_errored_blocks": {"embed": -1, "decode": found["max_errored_blocks"]},
        "task_retries": TASK_RETRIES,
        "machines_lost": MACHINES_LOST,
    }


def _set_data_options() -> None:
    """Ray Data's options, set before any data set is made (each freezes them)."""
    # the number of retries has no other name in the release that is pinned
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    for name, (value, _) in DATA.items():
        setattr(context, name, value)
    context.issue_detectors_config.detectors = []  # its advice is for pipeline authors, not for users
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(
        logging.CRITICAL
    )  # blocks that are lost are looked for; the rest is raised
