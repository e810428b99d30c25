"""Sizes of blocks, tasks and pools. No Ray here: the Ray layer and the cost model share them."""

from __future__ import annotations

import math

from pds_ray.config import Actors

BLOCK_BYTES = 64 << 20  # Ray Data's blocks: the images of one are decoded and encoded together
# Of pixels for a GPU, which encodes them within seconds: fewer are fewer tasks to schedule.
GPU_BLOCK_BYTES = 256 << 20
SHARDS_PER_CPU = 4  # at least, for tasks that read and decode a whole shard to spread over CPUs
CPUS_PER_EXECUTION = 256  # read and decode as much as one process schedules
# Shards of one data set. At most: its process keeps a kilobyte per block until the data set ends.
# At least, if there are as many: the encoders of an execution load anew for each of its data sets.
SHARDS_TOGETHER, FEW_SHARDS = 8_000, 2_000
GROUPS_EACH = 4  # of an execution, so that all end at about the same time
CPUS_PER_WORKER = 8  # an actor without GPU and its readers; all of a node that has fewer
LOOKED_UP_TOGETHER = 256  # real images at least: each lookup reads the shards they are in
QUERIES_PER_SHARD = 10_000  # an answer is 12 bytes per query: more queries, more shards per answer


def pool_size(
    wish: Actors, gpus: int, cpus: float, node_cpus: float, on_gpu: bool = True
) -> tuple[int, float]:
    """Return the number of actors of a pool and the GPUs that each takes.

    One actor per GPU if the cluster has any, else as many as its CPUs feed well. `node_cpus` are
    those of the largest node. `on_gpu` is false for work that has no use for a GPU.
    """
    by_cpus = max(1, int(cpus // min(CPUS_PER_WORKER, node_cpus)))
    if not on_gpu:
        workers, gpus_each = wish.workers or by_cpus, 0.0
    elif wish.gpus is None:
        workers = wish.workers or gpus or by_cpus
        gpus_each = 1 / math.ceil(workers / gpus) if gpus else 0.0
    else:  # an autoscaler brings the GPUs that are asked for: there may be none yet
        gpus_each = wish.gpus
        workers = wish.workers or (max(1, int(gpus / gpus_each)) if gpus_each else by_cpus)
    return max(workers, wish.min_workers), gpus_each


def decoded_where_read(shards: int, cpus: float) -> bool:
    """Return whether one task reads and decodes a shard, on as many CPUs.

    Otherwise the blocks of a shard are decoded side by side, by tasks of their own.
    """
    return shards >= SHARDS_PER_CPU * cpus


def pixel_block_bytes(whole_shards: bool, on_gpu: bool) -> int:
    """Return the bytes of a block of decoded images.

    They are larger for GPUs only where tasks decode whole shards (`decoded_where_read`), little by
    little: other tasks hold all that they decode.
    """
    return GPU_BLOCK_BYTES if whole_shards and on_gpu else BLOCK_BYTES


def executions(wish: int, cpus: float, actors: int, shards: int) -> int:
    """Return the number of data sets that embed side by side; each has an actor and a shard.

    It is `wish`, if that is not 0, or else one per CPUS_PER_EXECUTION.
    """
    return max(1, min(wish or math.ceil(cpus / CPUS_PER_EXECUTION), actors, shards))


def groups_each(shards: int, executions: int) -> int:
    """Return the number of groups in which an execution is given its part of the shards."""
    share = shards / executions
    wanted = 1 if executions == 1 else min(GROUPS_EACH, int(share / FEW_SHARDS))
    return max(1, wanted, math.ceil(share / SHARDS_TOGETHER))
