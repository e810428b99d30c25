"""Any number of CPUs and any grouping of shards gives the same bytes."""

from __future__ import annotations

import pytest

from tests.support.ray_script import output_of

pytestmark = [pytest.mark.ray, pytest.mark.long]

DRIVER = """
import hashlib
import tempfile
from pathlib import Path

import ray
from tqdm import tqdm

from pds_ray.config import ClusterConfig, PrototypesConfig, RunConfig
from pds_ray.distributed import cluster, match, nearest, nearest_captions, prototypes, prune, ranges
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import vectors
from pds_ray.store.storage import Folder
from tests.support.stage_run import do, stage_run
from tests.support.synthetic_store import make_store

here = Path(tempfile.mkdtemp())
store, _ = make_store(here / "store", [40, 1, 120, 39, 17, 60, 2, 80, 5, 31, 44], dim=16)
prototypes.match_ranges = match.table_ranges = lambda *_: 3
ranges.ADDED_TOGETHER = 2
for cpus, count in ((1, 11), (2, 4), (4, 1)):
    for module in (cluster, match, nearest, nearest_captions, prune):
        module.task_count = lambda shards, _, count=count: min(shards, count)
    prototypes.sum_task_count = lambda shards, *_, count=count: min(shards, count)
    ray.init("local", num_cpus=cpus, object_store_memory=200 << 20)
    digest = hashlib.sha256()
    for center in ("mean", "medoid"):
        config = RunConfig(
            pairs=13,
            cluster=ClusterConfig(iterations=5),
            prototypes=PrototypesConfig(center=center),
        )
        folder = RunFolder(Folder(str(here / f"run-{cpus}-{center}")))
        run = stage_run(store, folder, config, 16)
        counts = do(run, "prune", "cluster", "match", "prototypes")
        image = vectors(folder.prototypes(), "image_prototype")
        lists, finds = nearest_captions.nearest_captions(run, image, image, tqdm(disable=True))
        digest.update(repr(counts).encode())
        for array in (lists.cosine, lists.shard, lists.row, finds.image, finds.text):
            digest.update(array.tobytes())
        for path in sorted(Path(folder.folder.path).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    print(digest.hexdigest())
    ray.shutdown()
"""


def test_the_number_of_workers_changes_no_byte() -> None:
    """With means and medoids for prototypes, each shard a task, or all of them one."""
    digests = output_of(DRIVER)
    assert len(digests) == 3
    assert len(set(digests)) == 1
