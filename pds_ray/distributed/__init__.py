"""Where things run; and here Ray's limits, all in one place: what is set on purpose, and why.

run.json tells what is in force in a run (TRAIN is for evaluations). Ray reads DRIVER, NODES and TRAIN from the
environment, as RAY_NAME, hence what is set here when the package is imported; a user may have set other values there.
Those of NODES are read by the processes of each node: a cluster has them from whoever started it.
"""

from __future__ import annotations

import os
from typing import Any

from pds_ray.distributed.sizes import BLOCK_BYTES

TASK_RETRIES = (
    3  # of work whose process or machine died; Ray would try a sample that kills its actor for ever
)
MACHINES_LOST = (
    10  # that one piece of work survives besides: spot machines are taken away whatever they do
)
GLIBC = (2, 36)  # the first whose malloc was seen to take what `keeping_memory` sets

DRIVER: dict[str, tuple[str, str]] = {
    "task_oom_retries": (
        "3",
        "a task that eats its machine's memory is killed and tried again, by default for ever",
    ),
}
NODES: dict[str, tuple[str, str]] = {
    "memory_usage_threshold": (
        "0.95",
        "beyond this share Ray ends the newest task, before the kernel ends anything",
    ),
    "memory_monitor_refresh_ms": (
        "250",
        "a picture that unpacks to gigabytes does so within a second",
    ),
    "idle_worker_killing_time_threshold_ms": (
        "60000",
        "after 1 s, the default, the next stage may import anew",
    ),
    "health_check_period_ms": (
        "3000",
        "a machine that dies is noticed soon, and its shards read elsewhere",
    ),
    "health_check_timeout_ms": ("10000", "one that is only busy answers within this"),
    "health_check_failure_threshold": (
        "5",
        "or at one of so many times: a node taken for dead loses all it holds",
    ),
}
TRAIN: dict[str, tuple[str, str]] = {
    "TRAIN_HEALTH_CHECK_INTERVAL_S": (
        "0.2",
        "the end of a row of trials is noticed at the next look; by default of 2 s",
    ),
    "TRAIN_ENABLE_PREEMPTION_WATCHER": (
        "0",
        "a process more a row of trials, whose states are saved by the clock, not at a notice",
    ),
    "TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": (
        "600",
        "a worker that is silent for so long is taken for dead",
    ),
    "TRAIN_WORKER_GROUP_START_TIMEOUT_S": (
        "60",
        "without room for its workers in this time a row of trials asks anew",
    ),
}
DATA: dict[str, tuple[Any, str]] = {
    "target_max_block_size": (
        BLOCK_BYTES,
        "pictures of one block are decoded and encoded together",
    ),
    "execution_no_progress_timeout_s": (
        6 * 3600,
        "waiting hours for spot GPUs is no failure; by default 30 minutes",
    ),
    "max_consecutive_actor_init_deaths": (
        5,
        "by default one machine lost while a model loads ends the job",
    ),
    "max_errored_blocks": (
        0,
        "faults of data are rows; an exception is a fault of ours. Embedding sets it to -1",
    ),
}
"""Attributes of Ray Data's context."""

for _name, (_value, _) in {**DRIVER, **NODES, **TRAIN}.items():
    os.environ.setdefault(f"RAY_{_name}", _value)


def keeping_memory() -> dict[str, str]:
    """The environment in which a model on CPUs keeps what it gives back for its next batch, which is as large.

    Else the kernel takes the pages and clears them anew each time: a quarter of the time of a ViT-B-32. Empty but with
    a C library that is known to take such values: a former glibc refuses one of them and is slower than with none.
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
