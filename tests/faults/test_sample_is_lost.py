"""The sample of a k-means that dies with its node before the fit is taken anew."""

from __future__ import annotations

import pytest

from tests.support.ray_script import output_of

pytestmark = pytest.mark.ray
DRIVER = """
import numpy as np
import ray
from ray.cluster_utils import Cluster
from pds_ray.config import RayConfig
from pds_ray.distributed import session, tasks
from pds_ray.distributed.cluster import _gathered

def sampled(number, rows):
    vectors = np.random.default_rng(number).standard_normal((rows, 8), np.float32)
    return vectors, np.full(rows, number, np.float32)

node = {"num_cpus": 2, "object_store_memory": 200 << 20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 << 20})
first = cluster.add_node(**node)
session.start(RayConfig(address=cluster.address))
parts = list(tasks.map_to_store(sampled, range(5), 40_000))  # beyond what Ray keeps in the driver
cluster.add_node(**node)
cluster.remove_node(first, allow_graceful=False)
vectors, weights = tasks.run_kmeans(_gathered, parts)
expected = [np.random.default_rng(number).standard_normal((40_000, 8), np.float32) for number in range(5)]
np.testing.assert_array_equal(vectors, np.concatenate(expected))
np.testing.assert_array_equal(weights, np.repeat(np.arange(5, dtype=np.float32), 40_000))
session.stop()
cluster.shutdown()
"""


@pytest.mark.long
def test_a_sample_is_taken_anew() -> None:
    output_of(DRIVER)
