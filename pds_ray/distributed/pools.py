"""Pools of actors: how many, and what each takes.

Readers, decoders and encoders ask for different amounts of CPU on purpose, so that Ray Data never
fuses them into one operator; on a machine without a GPU the encoder takes half of the CPUs and the
rest feeds it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pds_ray.config import Actors
from pds_ray.distributed import TASK_RETRIES, malloc_env, ray_private
from pds_ray.distributed.sizes import PRODUCTS_PER_GPU, pool_size, products_per_gpu, task_places
from pds_ray.telemetry import log

READ_CPUS, DECODE_CPUS, SMALL_TASK_CPUS = 0.5, 0.25, 1.0

SETTLE_S, POLL_S = 2.0, 0.05  # Ray reports the CPUs of tasks that have ended as free a little later


@dataclass(frozen=True)
class Pool:
    """Actors of one kind: how many, and what each takes."""

    min_workers: int
    """The work does not begin with fewer."""
    workers: int
    """As many as the options ask for, or else as the cluster has room for now."""
    max_workers: int | None
    """None: as many as there are GPUs for, whenever they come."""
    num_cpus: float
    num_gpus: float
    resources: dict[str, float]

    def options(self) -> dict[str, Any]:
        """Return what an actor takes as arguments of Ray."""
        memory = {} if self.num_gpus else malloc_env()
        return {
            "num_cpus": self.num_cpus,
            **({"num_gpus": self.num_gpus} if self.num_gpus else {}),
            **({"runtime_env": {"env_vars": memory}} if memory else {}),
            **({"resources": self.resources} if self.resources else {}),
        }


def pool(wish: Actors, on_gpu: bool = True) -> Pool:
    """Return the actors for a model: one per GPU, or as many as half of the CPUs feed well.

    Each actor gets at most half of a node's CPUs; the rest is for readers. `on_gpu` is false for
    work that has no use for a GPU.
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


@dataclass(frozen=True)
class Share:
    """The part of a machine that each task of one kind takes: a CPU, and some of a GPU."""

    num_gpus: float = 0.0
    device: str = "cpu"
    """The place of its products, by torch's name: "cpu" or "cuda"."""

    @property
    def places(self) -> int:
        """The number of such tasks that the cluster can run at once."""
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 1), resources.get("GPU", 0)
        if not self.num_gpus:
            return task_places(cpus)
        return task_places(cpus, gpus, round(1 / self.num_gpus))


ONE_CPU = Share()


def products() -> Share:
    """Return what a task of matrix products takes: a share of a GPU if there are any, else a CPU.

    GPUs of Ray that torch cannot use count as none, as they do for models and k-means; a warning
    says so.
    """
    if most("GPU") < 1:
        return ONE_CPU
    # not in .options(): so the process, and its hold on the GPU, ends with the task
    look = ray.remote(num_cpus=SMALL_TASK_CPUS, num_gpus=1 / PRODUCTS_PER_GPU)(_gpu_memory)
    if memory := ray.get(look.remote()):
        return Share(1 / _together(memory), "cuda")
    _say_unused()
    return ONE_CPU


@functools.cache  # each pass over the shards asks for its share
def _say_unused() -> None:
    text = (
        "pds-ray: Ray has GPUs that PyTorch cannot use, so labels and nearest captions are found "
        "on CPUs; pds-ray doctor on a machine with a GPU says what it lacks"
    )
    log.event("gpus_unused", text, "warning")


def of_few(share: Share, tasks: int) -> Share:
    """Return a larger share for `tasks` tasks that are all at once: as few on a GPU as can be."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if not share.num_gpus or not gpus:
        return share
    return replace(share, num_gpus=max(share.num_gpus, 1 / math.ceil(tasks / gpus)))


def _together(memory: float) -> int:
    """Return how many tasks share a GPU of so many bytes: as many as each node has CPUs for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = (
        products_per_gpu(node.get("CPU", 0), node["GPU"], memory)
        for node in nodes
        if node.get("GPU")
    )
    return min(shares, default=PRODUCTS_PER_GPU)  # none: the node that had GPUs is just gone


def _gpu_memory() -> int:
    """Return the bytes of this process's GPU; 0 if torch can use none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(0).total_memory


def parts(actors: Pool, count: int) -> list[Pool]:
    """Return a pool as `count` pools, each of one actor at least, together as large."""
    return [
        replace(
            actors,
            min_workers=max(1, actors.min_workers // count),
            workers=workers,
            max_workers=workers,
        )
        for workers in (
            max(1, actors.workers // count + (part < actors.workers % count))
            for part in range(count)
        )
    ]


def precision(wish: str, actors: Pool, on_gpu: str) -> str:
    """Return the precision that `auto` stands for: `on_gpu` if actors have GPUs, else fp32."""
    if wish != "auto":
        return wish
    return on_gpu if actors.num_gpus else "fp32"


def actor_options(actors: Pool, threads: int = 1) -> dict[str, Any]:
    """Return the pool as arguments of `Dataset.map_batches`.

    `threads` threads of each actor call the worker at once.
    """
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
    """Return `dataset` mapped block by block, as Arrow tables, by actors `worker(*arguments)`."""
    options = actor_options(actors, threads)
    return ray_private.map_whole_blocks(dataset, worker, arguments, **options)


def place(number: int) -> NodeAffinitySchedulingStrategy:
    """Return the place of the process of that number, one of several that take no CPUs.

    They are spread over the nodes that have CPUs: a head often has none to spare.
    """
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
    with_cpus = [node for node in alive if node["Resources"].get("CPU", 0) > 0]
    nodes = [node["NodeID"] for node in with_cpus or alive]  # the others may be back soon
    return NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=True)


def start_model(actors: Pool, function: Callable[..., Any], *args: Any) -> ray.ObjectRef:
    """Start `function`, which loads a model, where one of the actors would run."""
    return ray.remote(**{**actors.options(), "num_cpus": SMALL_TASK_CPUS})(function).remote(*args)


def most_cpus() -> int:
    """Return the largest number of CPUs that is free on one node, at least 1."""
    return max(1, most_free("CPU"))


def most_free(resource: str) -> int:
    """Return the largest number of a resource, such as CPU or GPU, that is free on one node.

    On a shared cluster some may stay taken by others. Waits up to SETTLE_S for a node as large as
    any to be free as a whole.
    """
    return _settled(resource, 1)[0]


def places_as_free(resource: str) -> int:
    """Return the number of nodes that have as much of a resource free as any; 1 if none has any.

    Waits up to SETTLE_S for all nodes as large as any to be free as a whole.
    """
    free = _settled(resource)
    return free.count(free[0]) if free[0] else 1


def _settled(resource: str, nodes: int | None = None) -> list[int]:
    """Return the whole units of a resource that are free on each node, the most first.

    Waits up to SETTLE_S for so many of the nodes that are as large as any to be free as a whole;
    None: for all of them.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        free = ray_private.free_resources()
        sizes = {
            node["NodeID"]: node["Resources"].get(resource, 0)
            for node in ray.nodes()
            if node["Alive"]
        }
        found = [free.get(node, {}).get(resource, 0) for node in sizes] or [0]
        largest = max(sizes.values(), default=0)
        whole, wanted = sum(each >= largest for each in found), list(sizes.values()).count(largest)
        if whole >= (wanted if nodes is None else nodes) or time.monotonic() >= deadline:
            return sorted(map(int, found), reverse=True)
        time.sleep(POLL_S)


def most(resource: str) -> float:
    """Return how much Ray has of a resource, such as CPU, on the node that has most."""
    return max(
        (node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0
    )


def most_memory() -> float:
    """Return the bytes that Ray gives to tasks on the node that has most."""
    return most("memory")
