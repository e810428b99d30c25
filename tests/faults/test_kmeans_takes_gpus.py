"""A k-means takes all GPUs of one machine, or what others leave of them."""

from __future__ import annotations

import pytest

from tests.support.ray_script import output_of

pytestmark = [pytest.mark.ray, pytest.mark.long]
DRIVER = """
import json
import ray
from ray.cluster_utils import Cluster
from pds_ray.config import RayConfig
from pds_ray.distributed import session, tasks

tasks._faiss_gpus = lambda: 1  # as where FAISS sees those that Ray is told of
store = {"object_store_memory": 200 << 20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **store})
cluster.add_node(num_cpus=2, num_gpus=3, **store)
cluster.add_node(num_cpus=2, num_gpus=2, **store)
session.start(RayConfig(address=cluster.address))
given = lambda _: ray.get_runtime_context().get_assigned_resources()["GPU"]
found = [tasks.kmeans_places(), tasks.run_kmeans(given, [])]

@ray.remote(num_cpus=0, num_gpus=3)
class Other:
    def here(self):
        pass

other = Other.remote()
ray.get(other.here.remote())
found.append(tasks.run_kmeans(given, []))
print(json.dumps(found))
session.stop()
cluster.shutdown()
"""


def test_a_k_means_takes_the_gpus_of_a_machine() -> None:
    assert output_of(DRIVER)[-1] == "[1, 3.0, 2.0]"
