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
FILES_PER_TASK = 1_000  # hashed by one task: a few seconds of round trips to an object store
ENCODED_TOGETHER = 4_096  # finished images at least, by one task: it loads the encoder for them
TARS_AT_ONCE = 16  # one of 10,000 images waits on a machine's disk, a gigabyte, for its upload
LOOKED_UP_TOGETHER = 256  # real images at least: each lookup reads the shards they are in
PRODUCTS_PER_GPU = 8
"""Tasks that share a GPU for their products, at most.

Each reads on one core what the GPU multiplies in a fraction of that time, and clouds sell about
eight cores with a GPU.
"""
PRODUCT_BYTES = 2.5e9
"""Of a GPU's memory, for such a task: CUDA itself, a product of half a GiB and its masks, and what
is searched for, of both modalities, 1 GB at 100,000 vectors of width 768."""

# Work of one task: the driver's part of it, about a millisecond, is then less than a thousandth,
# and what a lost task had done is soon done again
TASK_S, LONG_TASK_S = 5.0, 30.0
SCHEDULED_S = 1e-3  # of the driver, by one task
TASKS_AT_LEAST = 1_000  # where there is work for them: enough for some hundreds of cores
TASK_AT_LEAST_S = 0.25  # Ray takes some milliseconds of CPU for a task, on the machine that has it
MANY_TASKS = 10_000  # take ten seconds of the driver: rather than more, tasks are longer
SUMS_BYTES = 1 << 30  # at most, of what is summed in one task
RANGE_BYTES = 256 << 20  # of sums of matches, or of cells, which are added up side by side
FIT_RANGE_BYTES = 64 << 20  # of sums of a k-means, smaller: its next iteration waits for them
TABLE_RANGES = 32  # at most, of a contingency table: each task answers with as many parts
CELL_BYTES = 16  # of a contingency table, as tasks add it up
ADDED_TOGETHER = 16  # neighbouring answers, in one task per range
# Rates for the number of tasks, which no result depends on: seconds to open a file, rows
# that a core reads in a second, of a few columns and with vectors, FLOP of one task
FILE_S = 0.02
COLUMN_ROWS_S, VECTOR_ROWS_S = 1e6, 200e3
FLOP_S = {"cpu": 50e9, "cuda": 10e12}


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


def task_count(shards: int, shard_s: float) -> int:
    """Return the number of tasks for shards that take `shard_s` seconds each.

    A task has work of about TASK_S: less, down to TASK_AT_LEAST_S, where that makes fewer than
    TASKS_AT_LEAST, up to LONG_TASK_S where it makes more than MANY_TASKS.
    """
    work_s = shards * shard_s
    enough = min(TASKS_AT_LEAST, math.ceil(work_s / TASK_AT_LEAST_S))
    short, long = (math.ceil(work_s / seconds) for seconds in (TASK_S, LONG_TASK_S))
    return max(1, min(shards, max(enough, min(short, max(MANY_TASKS, long)))))


def column_seconds(rows: float) -> float:
    """Return about how long a task takes for a file of a shard of which it reads few columns."""
    return FILE_S + rows / COLUMN_ROWS_S


def product_seconds(rows: float, others: int, dim: int, device: str) -> float:
    """Return about how long a task takes for the products of a shard's vectors with others.

    float32 [rows, dim] by [others, dim], on `device` "cpu" or "cuda".
    """
    return 2 * FILE_S + rows / VECTOR_ROWS_S + 2 * rows * others * dim / FLOP_S[device]


def sum_task_count(shards: int, rows: float, members: float, matches: int, dim: int) -> int:
    """Return the number of tasks that sum vectors of matches, SUMS_BYTES each at most.

    `rows` are those of a shard, `members` those of its pairs that are of any of the matches. A task
    has two float64 vectors for each match that its pairs are of, which are most if all matches are
    as frequent.
    """
    by_time = task_count(shards, product_seconds(rows, 0, dim, "cpu"))
    share = SUMS_BYTES / (2 * 8 * dim * max(1, matches))
    if share >= 1 or not members:
        return by_time
    together = max(1, int(-math.log1p(-share) * matches / members))
    return max(by_time, math.ceil(shards / together))


def match_ranges(matches: int, dim: int) -> int:
    """Return the number of ranges of matches, with sums of RANGE_BYTES each at most."""
    return max(1, math.ceil(2 * 8 * dim * matches / RANGE_BYTES))


def table_ranges(pairs: int, clusters: int) -> int:
    """Return the number of ranges of image clusters in which a contingency table is added up.

    They have RANGE_BYTES each at most, even if no two pairs are of one cell, but for TABLE_RANGES.
    """
    cells = min(pairs, clusters**2)
    return max(1, min(clusters, TABLE_RANGES, math.ceil(CELL_BYTES * cells / RANGE_BYTES)))


def additions_at_once(cpus: float) -> int:
    """Return the number of tasks per range that add up at once: of answers as many as CPUs."""
    return max(1, int(cpus / ADDED_TOGETHER))


def additions(answers: int) -> int:
    """Return the number of tasks for each range in which a tree adds up answers."""
    found = 0
    while answers > 1:
        answers = math.ceil(answers / ADDED_TOGETHER)
        found += answers
    return found


def fit_tasks(rows: float, clusters: int, width: int, places: int, device: str) -> int:
    """Return the number of tasks of an iteration of k-means: one per place, or fewer.

    n tasks take T / n side by side, and the driver n * SCHEDULED_S one after the other, with those
    that add their sums up. The first is longer up to n = sqrt(T / SCHEDULED_S).
    """
    seconds = rows / VECTOR_ROWS_S + 2 * rows * clusters * width / FLOP_S[device]
    each = SCHEDULED_S * (1 + cluster_ranges(clusters, width) / ADDED_TOGETHER)
    return max(1, min(places, int(math.sqrt(seconds / each))))


def cluster_ranges(clusters: int, width: int) -> int:
    """Return the number of ranges of clusters, with sums of FIT_RANGE_BYTES each at most."""
    return max(1, math.ceil(8 * width * clusters / FIT_RANGE_BYTES))


def task_places(cpus: float, gpus: float = 0, per_gpu: int = PRODUCTS_PER_GPU) -> int:
    """Return how many tasks run at once: one per CPU, of those that share GPUs `per_gpu` each."""
    return max(1, int(min(cpus, per_gpu * gpus) if gpus else cpus))


def products_per_gpu(cpus: float, gpus: float, memory: float) -> int:
    """Return how many tasks share each GPU of a node, whose GPUs have `memory` bytes.

    They are so few that the memory holds PRODUCT_BYTES for each, and that all of its GPUs have
    some: Ray fills one after the other.
    """
    return max(1, min(PRODUCTS_PER_GPU, int(cpus / gpus), int(memory / PRODUCT_BYTES)))


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
