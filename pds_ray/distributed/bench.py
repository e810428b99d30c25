"""CPU time that Ray takes in the driver, of which there is one, however large the cluster."""

from __future__ import annotations

import time
from typing import TypeVar

import pyarrow as pa
import ray

from pds_ray.config import Actors
from pds_ray.distributed import pools, tasks

Value = TypeVar("Value")


def _same(value: Value) -> Value:
    return value


class _Same:
    def __call__(self, block: pa.Table) -> pa.Table:
        return block


def task_seconds(count: int) -> float:
    """Return the seconds of the driver's CPU that `count` tasks of `map_in_order` take."""
    began = time.process_time()
    for _ in tasks.map_in_order(_same, range(count)):
        pass
    return time.process_time() - began


def block_seconds(blocks: int) -> float:
    """Return the seconds of the driver's CPU that blocks take on a path like that of embedding.

    Each block is three tasks.
    """
    read = ray.data.range(blocks, override_num_blocks=blocks).map_batches(
        _same, batch_size=None, batch_format="pyarrow", num_cpus=pools.DECODE_CPUS
    )
    dataset = pools.map_blocks(read, _Same, (), pools.pool(Actors(1, 1, None, {}), on_gpu=False))
    began = time.process_time()
    for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        pass
    return time.process_time() - began
