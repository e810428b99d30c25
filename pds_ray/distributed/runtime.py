"""The one place that starts Ray, asks it for resources and names its options.

Resources on purpose: readers, decoders and encoders ask for different amounts of CPU, so that Ray Data never fuses
them into one operator; on a machine without a GPU the encoder takes half of the CPUs and the rest feeds it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import psutil
import ray
from ray.experimental import internal_kv

from pds_ray.config import Actors, ConfigError, RayConfig
from pds_ray.distributed import (
    DATA,
    DRIVER,
    MACHINES_LOST,
    NODES,
    TASK_RETRIES,
    keeping_memory,
    metrics,
)
from pds_ray.errors import UserError, first_line
from pds_ray.telemetry.progress import waiting_for

Result = TypeVar("Result")
Model = TypeVar("Model")

READ_CPUS, DECODE_CPUS, SMALL_TASK_CPUS = 0.5, 0.25, 1.0
CPUS_A_WORKER = 8  # of a cluster without GPUs, or a node's if those have fewer, for each actor and what feeds it
MODEL_THREADS = 4  # of each model, however many CPUs there are beyond: results round by how the work is shared out
CONNECT_TIMEOUT_S = 10
SETTLE_S, POLL_S = 2.0, 0.05  # what tasks that have ended gave back is told a little later
FETCH_S = 60.0  # for one value to reach a task


# What a task ends with whose process or machine is gone. Ray would try it again with the CPUs asked for at first, which
# no node may have any more.
LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,  # of `fetch`
)
_WITH_A_MACHINE = (  # of LOST, what is not likely to be the doing of the work
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,
)
FULL = (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)


@dataclass(frozen=True)
class Pool:
    """Actors of one kind: how many, and what each takes."""

    min_workers: int
    """Without so many the work does not begin."""
    workers: int
    """That the cluster has room for now, or that are wished for."""
    max_workers: int | None
    """None: as many as there are GPUs for, whenever they come."""
    num_cpus: float
    num_gpus: float
    resources: dict[str, float]

    def options(self) -> dict[str, Any]:
        """What an actor takes, as arguments of Ray."""
        kept = {} if self.num_gpus else keeping_memory()
        return {
            "num_cpus": self.num_cpus,
            **({"num_gpus": self.num_gpus} if self.num_gpus else {}),
            **({"runtime_env": {"env_vars": kept}} if kept else {}),
            **({"resources": self.resources} if self.resources else {}),
        }


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
        if _no_space(error):
            raise UserError(_no_space(error)) from error
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


@contextmanager
def lost_blocks_allowed() -> Iterator[None]:
    """Data sets made in here go on without blocks that are lost; their maker looks for what is missing."""
    context = ray.data.DataContext.get_current()
    before, context.max_errored_blocks = context.max_errored_blocks, -1
    try:
        yield
    finally:
        context.max_errored_blocks = before


class LostBlocks(logging.Handler):
    """Counts, while data sets run in its `with` block, the blocks that they lose and to what; only Ray's log tells."""

    # by name: importing the module, and with it ray.data, costs every process 0.4 s
    _LOG = logging.getLogger("ray.data._internal.execution.streaming_executor_state")

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.kinds: Counter[str] = Counter()
        self._no_space = ""

    def __enter__(self) -> LostBlocks:
        self._before = self._LOG.level, self._LOG.propagate
        self._LOG.propagate = False
        self._LOG.setLevel(logging.ERROR)
        self._LOG.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._LOG.removeHandler(self)
        level, self._LOG.propagate = self._before
        self._LOG.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            cause = getattr(error, "cause", None) or error
            self.kinds[type(cause).__name__] += 1
            self._no_space = self._no_space or _no_space(error)

    def check_space(self) -> None:
        """Raises UserError in one line if blocks were lost for want of space: others would be, one by one."""
        if self._no_space:
            raise UserError(self._no_space)


def _no_space(error: BaseException) -> str:
    """That space is wanting and where, if that is what `error` says; else ""."""
    if not isinstance(error, FULL) and not isinstance(getattr(error, "cause", None), FULL):
        return ""
    nodes = re.findall(
        r"\bip=([^,\s)]+)", str(error)
    )  # in what Ray says of tasks; the last failed by itself
    where = f"on node {nodes[-1]}" if nodes else "here"
    return (
        f"the memory of Ray's object store and the disk it spills to (that of Ray's own files) are full {where}; free "
        "space there and repeat the command"
    )


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], None]]:
    """Ends the process, even one stuck in C code, when the block takes longer; what is given starts the clock anew."""

    def begin() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True)

    begin()
    try:
        yield begin
    finally:
        faulthandler.cancel_dump_traceback_later()


class UnderWay:
    """Which items are being worked on and since when: workers tell, the watchdog asks. Pickles.

    They tell the cluster's own store of keys, because an actor would be a process more, and lost with its node. What
    was told is forgotten at the end of the `with` block, or with the cluster if the driver is killed.
    """

    _NAMESPACE, _LIMIT_S = b"pds_ray", 5.0

    def __init__(self) -> None:
        self._prefix = f"under_way/{uuid.uuid4().hex}/".encode()

    def __enter__(self) -> UnderWay:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ray.exceptions.RayError):  # a cluster that is gone has forgotten it
            _keys().internal_kv_del(self._prefix, True, self._NAMESPACE, self._LIMIT_S)

    def begin(self, name: str) -> None:
        """Work on `name` begins here and now."""
        told = json.dumps([time.time(), ray.get_runtime_context().get_node_id()[:8]]).encode()
        with suppress(ray.exceptions.RayError):  # it goes on untold
            _keys().internal_kv_put(
                self._prefix + name.encode(), told, True, self._NAMESPACE, self._LIMIT_S
            )

    def describe(self, ended: set[str]) -> str:
        """The three items begun first of those that have not `ended`, for a person. Clocks of nodes may differ."""
        now, begun = time.time(), []
        try:
            store = _keys()
            keys = store.internal_kv_keys(self._prefix, self._NAMESPACE, self._LIMIT_S)
            names = {key: key.removeprefix(self._prefix).decode() for key in keys}
            open_ = [key for key, name in names.items() if name not in ended]
            told = store.internal_kv_multi_get(open_, self._NAMESPACE, self._LIMIT_S)
        except ray.exceptions.RayError as error:
            return f"unknown ({type(error).__name__})"
        for key, value in told.items():
            since, node = json.loads(value)
            begun.append(
                (since, f"{names[key]} (for {max(0.0, now - since):.0f} s, on node {node})")
            )
        return ", ".join(text for _, text in sorted(begun)[:3]) or "none"


def _keys() -> Any:
    """The cluster's store of keys. Raises RaySystemError if it cannot be asked from here."""
    client = internal_kv.internal_kv_get_gcs_client()
    if client is None:  # not connected any more, or by ray://
        raise ray.exceptions.RaySystemError("no connection to the store of keys")
    return client


def pool(wish: Actors, on_gpu: bool = True) -> Pool:
    """Actors for a model: one a GPU if the cluster has any, else as many as half of its CPUs feed well.

    None takes more than half of the largest node's CPUs: more would fit on no node that reads as well. `on_gpu` is
    false for work that has no use for a GPU.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)) if on_gpu else 0, max(1, int(resources.get("CPU", 1)))
    largest = max(
        [1.0, *(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])]
    )
    by_cpus = max(1, int(cpus // min(CPUS_A_WORKER, largest)))
    each = wish.gpus if on_gpu else 0.0
    if each is None:
        count = wish.workers or gpus or by_cpus
        each = 1 / math.ceil(count / gpus) if gpus else 0.0
    else:  # GPUs that an autoscaler brings when they are asked for are not there yet
        count = wish.workers or (max(1, int(gpus / each)) if each else by_cpus)
    count = max(count, wish.min_workers)
    share = min(cpus / count, largest) / 2  # the other half reads and decodes
    num_cpus = min(1.0, share) if each or share < 1 else float(math.floor(share))
    # Ray Data starts no actor that there is no GPU for, so that the number of GPUs is limit enough
    limit = None if each and not wish.workers else count
    return Pool(wish.min_workers, count, limit, num_cpus, each, wish.resources)


def precision(wish: str, actors: Pool, on_gpu: str) -> str:
    """The precision that `auto` stands for: `on_gpu` where the actors have GPUs, else fp32."""
    if wish != "auto":
        return wish
    return on_gpu if actors.num_gpus else "fp32"


def actor_options(actors: Pool, threads: int = 1) -> dict[str, Any]:
    """The pool as arguments of `Dataset.map_batches`; that many `threads` of each actor call it at once."""
    return {
        "compute": ray.data.ActorPoolStrategy(
            min_size=actors.min_workers,
            max_size=actors.max_workers,
            initial_size=actors.workers,
            max_concurrent_calls_per_actor=threads,
            enable_true_multi_threading=threads > 1,
        ),
        "max_task_retries": TASK_RETRIES,
        **actors.options(),
    }


def map_blocks(
    dataset: ray.data.Dataset,
    worker: type,
    arguments: tuple[Any, ...],
    actors: Pool,
    threads: int = 1,
) -> ray.data.Dataset:
    """`dataset` with each block, whole, given to one of the actors `worker(*arguments)`, as an Arrow table."""
    # map_batches itself, which calls this, refuses whole blocks where actors have GPUs
    return dataset.map_batches_internal(
        worker,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        **actor_options(actors, threads),
    )


class Deaths:
    """How often work was lost: of itself up to TASK_RETRIES times, with its machine up to MACHINES_LOST times."""

    def __init__(self) -> None:
        self._own = self._machines = 0

    def survived(self, error: BaseException) -> bool:
        """Whether the work that ended with `error` may be tried again."""
        if isinstance(error, _WITH_A_MACHINE):
            self._machines += 1
        else:
            self._own += 1
        return self._own <= TASK_RETRIES and self._machines <= MACHINES_LOST

    def __str__(self) -> str:
        return f"processes lost: {self._own}, machines lost: {self._machines}"


def run_kmeans(
    function: Callable[..., Result], parts: Sequence[tuple[ray.ObjectRef, ...]], *args: Any
) -> Result:
    """Calls `function(parts, *args)` with all CPUs of one node for FAISS, or with a GPU where FAISS can use one.

    If the process or its machine is lost, or some of the parts, which it fetches, again on what the cluster then has,
    as often as `Deaths` allows.
    """
    deaths = Deaths()
    while True:
        try:
            return _run_kmeans(function, parts, *args)
        except LOST as error:
            if not deaths.survived(error):
                raise


def await_all(references: Sequence[ray.ObjectRef]) -> None:
    """Returns when all values are there, on whatever node: what was lost is made anew before CPUs are taken for it."""
    if references:
        ray.wait(list(references), num_returns=len(references), fetch_local=False)


def _run_kmeans(
    function: Callable[..., Result], parts: Sequence[tuple[ray.ObjectRef, ...]], *args: Any
) -> Result:
    await_all([reference for part in parts for reference in part])
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU", 0) >= 1 for node in nodes):
        # GPUs named here and not in .options(): Ray then ends the process with the task, and with it what it holds
        with_gpu = ray.remote(num_cpus=SMALL_TASK_CPUS, num_gpus=1, max_retries=0)
        if ray.get(with_gpu(_faiss_gpus).remote()):
            return ray.get(with_gpu(function).remote(parts, *args))
    cpus = _most_cpus()
    remote = ray.remote(with_faiss_threads).options(num_cpus=cpus, max_retries=0)
    return ray.get(remote.remote(cpus, function, parts, *args))


def load_model(load: Callable[..., Model], *args: Any) -> Model:
    """Gives torch MODEL_THREADS threads from here on, fewer if this process may use fewer cores; then `load(*args)`.

    With more than that, kernels wait for threads that have no core to run on: a ViT-B-32 takes tens of times as long.
    """
    with without_collections():
        import torch

        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        torch.set_num_threads(min(MODEL_THREADS, cores))
        return load(*args)


@contextmanager
def without_collections() -> Iterator[None]:
    """For large imports: what they make lives on, and looking through it for garbage again and again takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def start_model(actors: Pool, function: Callable[..., Any], *args: Any) -> ray.ObjectRef:
    """Starts `function`, which loads a model, where one of the actors would run."""
    return ray.remote(**{**actors.options(), "num_cpus": SMALL_TASK_CPUS})(function).remote(*args)


def stream(function: Callable[..., Iterator[Result]], *args: Any) -> Iterator[Result]:
    """What `function` yields, as it does, with all CPUs of one node to itself.

    If the process or its machine is lost, again on what the cluster then has, as often as `Deaths` allows: `function`
    must yield the same each time.
    """
    told, deaths = 0, Deaths()
    while True:
        remote = ray.remote(_yielded).options(
            num_cpus=_most_cpus(), num_returns="streaming", max_retries=0
        )
        try:
            for number, reference in enumerate(remote.remote(function, *args)):
                value = ray.get(
                    reference
                )  # also of those told before: one may say that the process is lost
                if number == told:
                    yield value
                    told += 1
            return
        except LOST as error:
            if not deaths.survived(error):
                raise


def _yielded(function: Callable[..., Iterator[Result]], *args: Any) -> Iterator[Result]:
    for value in function(*args):  # noqa: UP028 - Ray sends into its generators; not every iterator takes that
        yield value


def _most_cpus() -> int:
    """The CPUs that the node with most of them has free: on a shared cluster those of others may stay taken.

    Waits up to SETTLE_S for one as large as any to be free as a whole.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        free = ray._private.state.available_resources_per_node()  # no public call tells it
        alive = {
            node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]
        }
        most = max((free.get(node, {}).get("CPU", 0) for node in alive), default=0)
        if most >= max(alive.values(), default=0) or time.monotonic() >= deadline:
            return max(1, int(most))
        time.sleep(POLL_S)


def most_memory() -> float:
    """Bytes that Ray gives to tasks on the node that has most."""
    return max(
        (node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0
    )


def _faiss_gpus() -> int:
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


def with_faiss_threads(threads: int, function: Callable[..., Result], *args: Any) -> Result:
    """A reused worker keeps the thread count it began with: it is set anew."""
    import faiss

    faiss.omp_set_num_threads(threads)
    return function(*args)


def wait_for(reference: ray.ObjectRef, item: Any) -> Any:
    """The result of the task of `item`, once it is there; until then the watchdog knows what is waited for."""
    waiting_for(partial(str, item))
    try:
        return ray.get(reference)
    finally:
        waiting_for(None)


def fetch(reference: ray.ObjectRef) -> Any:
    """A value from the object stores, inside a task or an actor.

    One that was lost with its node is made anew by a task that may want the very CPUs that wait for it: after FETCH_S
    they are given back. Raises GetTimeoutError then.
    """
    return ray.get(reference, timeout=FETCH_S)


def map_in_order(
    function: Callable[..., Result], items: Iterable[Any], *shared: Any
) -> Iterator[Result]:
    """`function(item, *shared)` for each item on the cluster, results in the order of the items.

    `shared` is sent to each node once. Only a window of tasks is in flight, so that a slow consumer holds few results.
    """
    for item, reference in _started(function, items, shared, 1):
        yield wait_for(reference, item)


def map_to_store(
    function: Callable[..., tuple[Any, Any]], items: Iterable[Any], *shared: Any
) -> Iterator[tuple[ray.ObjectRef, ray.ObjectRef]]:
    """As `map_in_order`, of a function that returns two values, the second a small one: yields references to both.

    What they refer to stays in the object stores of the cluster, and is made anew if a node is lost.
    """
    for item, references in _started(function, items, shared, 2):
        wait_for(references[1], item)
        yield tuple(references)


def _started(
    function: Callable[..., Any], items: Iterable[Any], shared: Iterable[Any], results: int
) -> Iterator[Any]:
    """Each item with the reference to its result, or references if there are several; a window of them runs ahead."""
    window = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    references = [ray.put(value) for value in shared]
    remote = ray.remote(function).options(
        num_cpus=SMALL_TASK_CPUS, num_returns=results, max_retries=TASK_RETRIES
    )
    pending: deque[tuple[Any, Any]] = deque()
    coming = iter(items)
    while True:
        for item in islice(coming, window - len(pending)):
            pending.append((item, remote.remote(item, *references)))
        if not pending:
            return
        yield pending.popleft()
