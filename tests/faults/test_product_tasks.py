"""Tasks of products where Ray is told of GPUs that are not there."""

from __future__ import annotations

import pytest

from tests.support.ray_script import output_of

pytestmark = pytest.mark.ray

DRIVER = """
import sys
import tempfile
from pathlib import Path

import ray

from pds_ray.config import ClusterConfig, RunConfig
from pds_ray.distributed import cluster, nearest, pools, tasks
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.stage_run import do, stage_run
from tests.support.synthetic_store import make_store

ray.init("local", num_cpus=2, num_gpus=1, object_store_memory=200 << 20)
here = Path(tempfile.mkdtemp())
store, _ = make_store(here / "store", [40, 1, 120, 39])
config = RunConfig(pairs=9, cluster=ClusterConfig(iterations=5))
stages = ("prune", "cluster", "match", "prototypes")
asked = []


def results(name):
    run = RunFolder(Folder(str(here / name)))
    counts = do(stage_run(store, run, config, 8), *stages)
    files = {
        path.relative_to(here / name).as_posix(): path.read_bytes()
        for path in (here / name).rglob("*")
        if path.is_file()
    }
    return counts, files


cluster.task_count = nearest.task_count = lambda shards, _: min(shards, 2)
print("seen as", pools.products())
on_cpus = results("cpus")

# as on a machine where torch has the GPU, but for the products themselves
pools.products = lambda: pools.Share(1 / 8, "cpu")
inner = tasks.map_in_order


def recorded(function, items, *shared, share=pools.ONE_CPU):
    def run(item, *rest):
        given = ray.get_runtime_context().get_assigned_resources()
        return function(item, *rest), given

    for found, given in inner(run, items, *shared, share=share):
        asked.append((function.__name__, given.get("CPU"), given.get("GPU")))
        yield found


tasks.map_in_order = recorded
assert results("gpus") == on_cpus, "the same bytes"
for line in sorted({f"{name}: {cpu:g} CPU, {gpu or 0:g} GPU" for name, cpu, gpu in asked}):
    print(line)
ray.shutdown()
"""


def test_tasks_of_products_share_the_gpus_and_answer_the_same() -> None:
    lines = output_of(DRIVER)
    assert lines[0] == "seen as Share(num_gpus=0.0, device='cpu')", "torch finds no GPU here"
    assert lines[1:] == [
        "_look_up: 1 CPU, 0 GPU",
        "_sum_cosines: 1 CPU, 0 GPU",
        "count_ties: 1 CPU, 0 GPU",
        "histogram: 1 CPU, 0 GPU",
        "label_shards: 1 CPU, 0.125 GPU",
        "search_shards: 1 CPU, 0.125 GPU",
        "write_masks: 1 CPU, 0 GPU",
    ]
