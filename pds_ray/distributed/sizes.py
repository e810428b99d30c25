"""Sizes of blocks, tasks and pools. No Ray here: the Ray layer and the cost model share them."""

from __future__ import annotations

import math

from pds_ray.config import Actors

BLOCK_BYTES = 64 << 20  # Ray Data's blocks: the images of one are decoded and encoded together
CPUS_PER_WORKER = 8  # an actor without GPU and its readers; all of a node that has fewer
FILES_PER_TASK = 1_000  # hashed by one task: a few seconds of round trips to an object store
ENCODED_TOGETHER = 4_096  # finished images at least, by one task: it loads the encoder for them
TARS_AT_ONCE = 16  # one of 10,000 images waits on a machine's disk, a gigabyte, for its upload
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
