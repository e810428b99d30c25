"""Pools of actors: how many, and what each takes.

Resources on purpose: readers, decoders and encoders ask for different amounts of CPU, so that Ray Data never fuses
them into one operator; on a machine without a GPU the encoder takes half of the CPUs and the rest feeds it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from pds_ray.config import Actors
from pds_ray.distributed import (
    TASK_RETRIES,
    keeping_memory,
)
from pds_ray.distributed.sizes import pool_size

READ_CPUS, DECODE_CPUS, SMALL_TASK_CPUS = 0.5, 0.25, 1.0

SETTLE_S, POLL_S = 2.0, 0.05  # what tasks that have ended gave back is told a little later


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


def pool(wish: Actors, on_gpu: bool = True) -> Pool:
    """Actors for a model: one a GPU if the cluster has any, else as many as half of its CPUs feed well.

    None takes more than half of the largest node's CPUs: more would fit on no node that reads as well. `on_gpu` is
    false for work that has no use for a GPU.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    largest = max(
        [1.0, *(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])]
    )
    count, each = pool_size(wish, gpus, cpus, largest, on_gpu)
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


def start_model(actors: Pool, function: Callable[..., Any], *args: Any) -> ray.ObjectRef:
    """Starts `function`, which loads a model, where one of the actors would run."""
    return ray.remote(**{**actors.options(), "num_cpus": SMALL_TASK_CPUS})(function).remote(*args)


def most_cpus() -> int:
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
