"""The connection to Ray: starting or joining it, its options, and workers' errors in the driver."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, cast

import ray

from pds_ray.config import ConfigError, RayConfig
from pds_ray.distributed import (
    DATA,
    DRIVER,
    MACHINES_LOST,
    NODES,
    TASK_RETRIES,
    TRAIN,
    environment,
    lifetime,
    limits,
    metrics,
    places,
    ray_private,
)
from pds_ray.distributed.address import WHERE, Address, of_cluster
from pds_ray.distributed.process import default_environment, without_collections
from pds_ray.distributed.tasks import LOST
from pds_ray.distributed.watch import no_space
from pds_ray.errors import UserError, first_line
from pds_ray.telemetry import log

REFUSALS = (ray.exceptions.AuthenticationError, ray.exceptions.RpcError)
STDERR = 2
"""The descriptor of standard error, whatever `sys.stderr` is."""
LEAST_STORE, MOST_STORE = 75 << 20, 8 << 30
"""Bytes of an object store by default; Ray refuses a smaller one."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # threads of a model that wait for each other must not spin while readers and decoders want the
    # same cores
    "OMP_WAIT_POLICY": "PASSIVE",
    **environment(DRIVER, NODES, TRAIN),
}
"""Environment variables of this process during a session, unless they are set already."""

# A process has one Ray, and so one session: the limits that Ray read from the environment because
# `start` began it.
_limits_read: dict[str, str] = {}


def start(config: RayConfig, run: str = "") -> dict[str, Any]:
    """Connect to a cluster, or start a local Ray as large as the job may be, and set all options.

    A Ray that is initialised already is used as it is. The session ends with the outermost
    `lifetime.session_kept` block around the call; outside of any, `stop` ends it. Returns the
    settings in force, for run.json; `run` is the tag of this thread's metrics.

    Raises ConfigError in one line if a given address does not answer.
    """
    address = of_cluster(config.address)
    with without_collections(), ExitStack() as undo:
        undo.enter_context(default_environment(ENVIRONMENT))
        if not ray.is_initialized():
            undo.callback(_limits_read.clear)
            undo.enter_context(_ray(address, config))
            _limits_read.update(_limits_of_environment(local=address is None))
        undo.enter_context(data_options())
        metrics.count_for(run)
        lifetime.undo().callback(undo.pop_all().close)
    resources = ray.cluster_resources()
    return {
        "address": address.shown if address else "local",
        "cpus": resources.get("CPU", 0),
        "gpus": resources.get("GPU", 0),
        "object_store_bytes": int(resources.get("object_store_memory", 0)),
        "driver": limits.of_job_and_machine(),
        **_limits_in_force(),
    }


def stop() -> None:
    """Undo what `start` did: restore environment and options, leave the cluster, end a local Ray.

    A Ray that was initialised before `start` stays.
    """
    lifetime.undo().close()


@contextmanager
def _ray(address: Address | None, config: RayConfig) -> Iterator[None]:
    """Be connected to a cluster, or to a local Ray that ends with the block.

    Environment variables, Ray's log level and the fault handler are afterwards as before.
    """
    before, traced = set(os.environ), faulthandler.is_enabled()
    level = logging.getLogger("ray").level
    if not traced:  # Ray would, and fails where sys.stderr is no file, as in some notebooks
        faulthandler.enable(STDERR, all_threads=False)
    added: set[str] = set()
    try:
        try:
            with _muffled(), _own_signals():
                if address:
                    _connect(address)
                else:
                    with _interrupts_put_off():
                        _start_local(config)
        except BaseException as error:
            # a start that failed may leave processes; in one that was interrupted, this crashes
            if isinstance(error, Exception) or ray.is_initialized():
                ray.shutdown()
            raise
        finally:
            added = os.environ.keys() - before
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        for name in added:
            os.environ.pop(name, None)
        logging.getLogger("ray").setLevel(level)
        if not traced:
            faulthandler.disable()


def _connect(address: Address) -> None:
    """Join a running cluster. Raises ConfigError in one line if none answers."""
    if address.value.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} is where jobs are submitted, by `pds-ray submit --address "
            f"{address.shown}`; {WHERE}"
        )
    address.check_runs_ray()  # asked first: Ray itself would try for minutes
    try:
        ray.init(address=address.value, job_config=ray_private.job_config(), **QUIET)
    except (ConnectionError, RuntimeError, ValueError, *REFUSALS) as error:
        token = (
            ""
            if os.environ.get("RAY_AUTH_MODE")
            else "set RAY_AUTH_MODE=token and its token if it wants one, "
        )
        raise ConfigError(
            f"no Ray cluster can be joined at {address} ({first_line(error)}); {token}start one "
            f"or {address.way_out}"
        ) from error


def _start_local(config: RayConfig) -> None:
    """Start a Ray that is as large as the job may be.

    Raises ConfigError in one line if it cannot start here.
    """
    places.require_current_folder()
    places.require_loopback()
    folders = places.ray_folders()
    if folders.note:
        log.event("other_place", f"pds-ray: {folders.note}", "warning", why=folders.note)
    if folders.spilled:
        _limits_read["object_spilling_directory"] = folders.spilled
    if token := places.ray_token():
        os.environ["RAY_AUTH_TOKEN"] = token
    try:
        _init_local(config, folders)
    except Exception as error:  # Ray raises no narrower one where a process of its own fails
        raise ConfigError(
            f"Ray does not start ({first_line(error)}); often a limit of the shell is too low, see "
            f"ulimit -a; {folders.sockets}/ray/session_latest/logs has more"
        ) from error


def _init_local(config: RayConfig, folders: places.RayFolders) -> None:
    free = limits.free_memory_bytes()
    store = _object_store_bytes(config, free)
    ray.init(
        address="local",
        num_cpus=config.num_cpus or limits.cpus(),
        object_store_memory=store,
        _memory=max(1, free - store),  # for tasks that ask for memory; Ray would share the machine
        include_dashboard=False,
        _temp_dir=f"{folders.sockets}/ray",
        object_spilling_directory=folders.spilled,
        job_config=ray_private.job_config(),
        **QUIET,
    )


def _object_store_bytes(config: RayConfig, free: int) -> int:
    """Return the size of a local Ray's object store where `free` bytes of memory are free."""
    if config.object_store_gib:
        return int(config.object_store_gib * 2**30)
    return max(LEAST_STORE, min(free // 4, MOST_STORE))


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the signal handlers that Ray replaces: its own aborts on SIGTERM with a dump."""
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
def _interrupts_put_off() -> Iterator[None]:
    """Put off a first Ctrl-C to the end of the block: a Ray that half started would stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    pressed: list[tuple[int, FrameType | None]] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        if pressed:
            handlers[signal.Signals(number)](number, frame)
        pressed.append((number, frame))

    for name in handlers:
        signal.signal(name, put_off)
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    for number, frame in pressed[:1]:
        handlers[signal.Signals(number)](number, frame)


@contextmanager
def _muffled() -> Iterator[None]:
    """Keep the prints of Ray's C++ side off the terminal; errors are raised anyway."""
    # the command line sets this unless it is verbose
    if os.environ.get("RAY_BACKEND_LOG_LEVEL") != "fatal":
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
    """Raise a UserError of a worker, such as missing weights, without Ray's wrapping."""
    try:
        yield
    except (ray.exceptions.RayError, UserError) as error:
        found = _user_error(error)
        if found is None:
            raise
        raise found from error


def _user_error(error: BaseException) -> UserError | None:
    """Return the cause of `error` that the user can fix, if there is one."""
    if no_space(error):
        return UserError(no_space(error))
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return cause
    if isinstance(cause, OSError) and not isinstance(cause, LOST):  # a disk that is full, or gone
        return UserError(first_line(cause))
    # Ray Data and Ray Train wrap the error in one of their own, and its text alone reaches the
    # driver
    names = "|".join(re.escape(f"{kind.__module__}.{kind.__name__}") for kind in _kinds(UserError))
    found = re.findall(rf"^(?:{names}): (.+)$", str(error), flags=re.MULTILINE)
    return UserError(found[-1]) if found else None


def _kinds(kind: type[UserError]) -> Iterator[type[UserError]]:
    """Yield the class and all its subclasses that are imported."""
    yield kind
    for subclass in kind.__subclasses__():
        yield from _kinds(subclass)


def _limits_of_environment(local: bool) -> dict[str, str]:
    """Return the limits that a Ray begun now reads; nodes that others started are unknown."""
    names = {**DRIVER, **(NODES if local else {})}
    return {name: os.environ[f"RAY_{name}"] for name in names}


def _limits_in_force() -> dict[str, Any]:
    """Return the package's limits as they are, as far as they are known."""
    context = ray.data.DataContext.get_current()
    found: dict[str, Any] = dict(_limits_read)
    if NODES.keys() <= found.keys():  # a local Ray
        found.setdefault("object_spilling_directory", ray_private.session_folder())
    found |= {name: getattr(context, name) for name in DATA}
    return {
        **found,
        "max_errored_blocks": {"embed": -1, "decode": found["max_errored_blocks"]},
        "task_retries": TASK_RETRIES,
        "machines_lost": MACHINES_LOST,
    }


@contextmanager
def data_options() -> Iterator[None]:
    """Set Ray Data's options and quieten its logs; restore both afterwards.

    They are those of this process. A data set keeps the options that it was made with.
    """
    context = ray.data.DataContext.get_current()
    options: dict[str, Any] = {
        "enable_progress_bars": False,
        "enable_operator_progress_bars": False,
        "print_on_execution_start": False,
        **{name: value for name, (value, _) in DATA.items()},
    }
    # of Ray Data's own log, lost blocks are read by `watch.LostBlocks`; the rest is raised
    levels = {"ray": logging.ERROR, "ray.data": logging.CRITICAL}
    before = {name: getattr(context, name) for name in options}
    levels_before = {name: logging.getLogger(name).level for name in levels}
    filters = cast(list[Any], warnings.filters)
    filters_before = list(filters)
    # the number of retries has no other name in the release that is pinned
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    added = [entry for entry in filters if entry not in filters_before]
    detectors = context.issue_detectors_config.detectors
    context.issue_detectors_config.detectors = []  # their advice is for authors of pipelines
    _set(context, options, levels)
    try:
        yield
    finally:
        context.issue_detectors_config.detectors = detectors
        _set(context, before, levels_before)
        for entry in added:
            if entry in filters:  # the program around may have taken it back by now
                filters.remove(entry)


def _set(context: Any, options: dict[str, Any], levels: dict[str, int]) -> None:
    for name, value in options.items():
        setattr(context, name, value)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
