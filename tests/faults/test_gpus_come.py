"""A run that began with one GPU uses those that join, and asks for no others."""

from __future__ import annotations

import pytest

from tests.support.ray_script import output_of

pytestmark = [pytest.mark.ray, pytest.mark.long]
DRIVER = """
import json, os, time
import pyarrow as pa, ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from pds_ray.config import Actors, RayConfig
from pds_ray.distributed import pools, session

class Slow:
    def __call__(self, block):
        time.sleep(0.5)
        return pa.table({"process": [os.getpid()]})

store = {"object_store_memory": 200 << 20}
node = {"num_cpus": 2, "num_gpus": 1, **store}  # Ray takes our word for the GPU
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, **store})
cluster.add_node(**node)
session.start(RayConfig(address=cluster.address))
blocks = ray.data.range(120, override_num_blocks=120)
processes = []
mapped = pools.map_blocks(blocks, Slow, (), pools.pool(Actors(0, 1, None, {})))
for batch in mapped.iter_batches(batch_size=None):
    processes += batch["process"].tolist()
    if len(processes) == 10:
        cluster.add_node(**node)
    if len(processes) == 110:
        waiting = sum(actor.state == "PENDING_CREATION" for actor in list_actors(limit=1000))
print(json.dumps([len(processes), len(set(processes[:5])), len(set(processes)), waiting]))
session.stop()
cluster.shutdown()
"""


def test_gpus_that_come_are_used() -> None:
    assert output_of(DRIVER)[-1] == "[120, 1, 2, 0]"
