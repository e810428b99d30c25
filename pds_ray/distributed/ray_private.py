"""Every private or experimental hook of Ray: a new release of Ray is checked here.

No other module names `ray._private`, `ray.experimental` or anything `_internal`. Each hook has a
test in tests/distributed/test_ray_private.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ray
from ray.experimental import internal_kv
from ray.job_config import JobConfig

DATA_LOG = "ray.data._internal.execution.streaming_executor_state"
"""Name of the log in which Ray Data reports each block that it goes on without.

A name, because importing the module, and with it `ray.data`, costs every process 0.4 s.
"""

DATA_COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
"""Module of what tells a data set its share of the cluster."""

KEYS_NAMESPACE, KEYS_TIMEOUT_S = b"pds_ray", 5.0


class _WorkersPath(list[str]):
    """The folders that workers import from first: of those that Ray adds, this process's own.

    Ray always adds the current folder: workers would take a `random.py` beside the command for
    Python's.
    """

    def extend(self, folders: Iterable[str]) -> None:
        own = {os.path.abspath(folder) for folder in sys.path}
        super().extend(folder for folder in folders if folder in own)


def job_config() -> JobConfig:
    """Return what `ray.init` is told so that workers import from where this process does."""
    config: Any = JobConfig()
    config._py_driver_sys_path = _WorkersPath()
    return config


def session_folder() -> str:
    """Return the folder of the local node's files, where Ray spills objects by default."""
    node: Any = ray._private.worker._global_node
    return node.get_session_dir_path()


def free_resources() -> dict[str, dict[str, float]]:
    """Return node id -> the resources that are free there; no public call tells it node by node."""
    return ray._private.state.available_resources_per_node()


def map_whole_blocks(
    dataset: ray.data.Dataset, worker: type, arguments: tuple[Any, ...], **options: Any
) -> ray.data.Dataset:
    """Return `dataset` mapped block by block, as Arrow tables, by actors `worker(*arguments)`.

    `Dataset.map_batches`, which calls the same function, refuses whole blocks where actors have
    GPUs.
    """
    return dataset.map_batches_internal(
        worker, fn_constructor_args=arguments, batch_size=None, batch_format="pyarrow", **options
    )


@contextmanager
def share_of_cluster(share: float) -> Iterator[None]:
    """Let data sets that this process runs meanwhile take this share of every node.

    Ray Data itself gives each of several data sets whole CPUs and GPUs of a node alone: none of a
    node with fewer GPUs than there are data sets.
    """

    def reserved(_: object) -> dict[str, dict[str, float]]:
        return {
            node["NodeID"]: {name: share * amount for name, amount in node["Resources"].items()}
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].keys() & {"CPU", "GPU"}
        }

    coordinator: Any = import_module(DATA_COORDINATOR).DefaultAutoscalingCoordinator
    before = coordinator.get_reserved_resources
    coordinator.get_reserved_resources = reserved
    try:
        yield
    finally:
        coordinator.get_reserved_resources = before


def put_key(key: bytes, value: bytes) -> None:
    """Set a key of the cluster's key-value store.

    Raises RayError if the store cannot be reached, as do the three below.
    """
    _keys().internal_kv_put(key, value, True, KEYS_NAMESPACE, KEYS_TIMEOUT_S)


def list_keys(prefix: bytes) -> list[bytes]:
    """Return the keys that begin with `prefix`."""
    return _keys().internal_kv_keys(prefix, KEYS_NAMESPACE, KEYS_TIMEOUT_S)


def get_keys(keys: list[bytes]) -> dict[bytes, bytes]:
    """Return the values of those of `keys` that are set."""
    return _keys().internal_kv_multi_get(keys, KEYS_NAMESPACE, KEYS_TIMEOUT_S)


def delete_keys(prefix: bytes) -> None:
    """Delete the keys that begin with `prefix`."""
    _keys().internal_kv_del(prefix, True, KEYS_NAMESPACE, KEYS_TIMEOUT_S)


def _keys() -> Any:
    client = internal_kv.internal_kv_get_gcs_client()
    if client is None:  # not connected any more, or connected by ray://
        raise ray.exceptions.RaySystemError("no connection to the cluster's key-value store")
    return client
