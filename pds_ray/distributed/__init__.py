"""The Ray layer; and Ray's limits, all in one place: each setting with the reason for it.

`session.start` puts DRIVER, NODES and TRAIN into the environment as RAY_NAME, where Ray reads them,
unless a variable is set already, and `session.stop` takes them out again; importing the package
sets nothing. Those of NODES are read by the processes of each node: on a cluster they are in force
if whoever started it set them. run.json records what is in force in a run (TRAIN is for
evaluations).
"""

from __future__ import annotations

import os
from typing import Any

from pds_ray.distributed.sizes import BLOCK_BYTES

# Retries of work whose process died; Ray would try a sample that kills its actor for ever.
TASK_RETRIES = 3
# Machines that one piece of work may lose besides: spot machines go whatever it does.
MACHINES_LOST = 10
GLIBC = (2, 36)  # the first whose malloc was seen to take what `malloc_env` sets

Limits = dict[str, tuple[str, str]]
"""Name without RAY_ -> value and reason."""

DRIVER: Limits = {
    "task_oom_retries": (
        "3",
        "a task that eats its machine's memory is killed and tried again, by default for ever",
    ),
}
NODES: Limits = {
    "memory_usage_threshold": (
        "0.95",
        "beyond this share Ray ends the newest task, before the kernel ends anything",
    ),
    "memory_monitor_refresh_ms": (
        "250",
        "an image that unpacks to gigabytes does so within a second",
    ),
    "idle_worker_killing_time_threshold_ms": (
        "60000",
        "after 1 s, the default, the next stage may have to import everything again",
    ),
    "health_check_period_ms": (
        "3000",
        "a machine that dies is noticed soon, and its shards are read elsewhere",
    ),
    "health_check_timeout_ms": ("10000", "a node that is only busy answers within this time"),
    "health_check_failure_threshold": (
        "5",
        "or at one of so many checks: a node taken for dead loses all it holds",
    ),
}
TRAIN: Limits = {
    "TRAIN_HEALTH_CHECK_INTERVAL_S": (
        "0.2",
        "the end of a trial queue is noticed at the next look; by default they are 2 s apart",
    ),
    "TRAIN_ENABLE_PREEMPTION_WATCHER": (
        "0",
        "one extra process per queue; checkpoints are periodic, so pre-emption notices are not "
        "needed",
    ),
    "TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": (
        "600",
        "a worker that is silent for so long is taken for dead",
    ),
    "TRAIN_WORKER_GROUP_START_TIMEOUT_S": (
        "60",
        "a trial queue that finds no room for its workers in this time asks again",
    ),
}
DATA: dict[str, tuple[Any, str]] = {
    "target_max_block_size": (
        BLOCK_BYTES,
        "images of one block are decoded and encoded together",
    ),
    "execution_no_progress_timeout_s": (
        6 * 3600,
        "waiting hours for spot GPUs is no failure; by default 30 minutes are",
    ),
    "max_consecutive_actor_init_deaths": (
        5,
        "by default one machine lost while a model loads ends the job",
    ),
    "max_errored_blocks": (
        0,
        "bad samples are rows; an exception is a bug. Embedding sets it to -1",
    ),
}
"""Attributes of Ray Data's context."""


def environment(*tables: Limits) -> dict[str, str]:
    """Return limits as environment variables."""
    return {f"RAY_{name}": value for table in tables for name, (value, _) in table.items()}


def malloc_env() -> dict[str, str]:
    """Return the environment in which a process keeps freed memory for the next batch.

    It is for models on CPUs. Otherwise the kernel takes the pages and clears them for each batch,
    which is as large as the one before: a quarter of the time of a ViT-B-32. Empty unless the C
    library is known to take such values: an older glibc refuses one of them and is slower than with
    none.
    """
    try:
        library, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):  # Windows, macOS
        return {}
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < GLIBC:
        return {}
    return {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    }
