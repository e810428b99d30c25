"""The sample of a k-means that is lost with its node, before the fit or in it, is taken again."""

from __future__ import annotations

import pytest

from tests.support.ray_script import output_of

pytestmark = [pytest.mark.ray, pytest.mark.long]
DRIVER = """
import numpy as np
import ray
from ray.cluster_utils import Cluster
from pds_ray.config import RayConfig
from pds_ray.distributed import session, tasks
from pds_ray.distributed.sample import gathered

def sampled(number, rows):
    vectors = np.random.default_rng(number).standard_normal((rows, 8), np.float32)
    return vectors, np.full(rows, number, np.float32)

node = {"num_cpus": 2, "object_store_memory": 200 << 20}
head = {"num_cpus": 0, "object_store_memory": 200 << 20}
cluster = Cluster(initialize_head=True, head_node_args=head)
first = cluster.add_node(**node)
session.start(RayConfig(address=cluster.address))
parts = list(tasks.map_to_store(sampled, range(5), 40_000))  # beyond what Ray keeps in the driver
cluster.add_node(**node)
cluster.remove_node(first, allow_graceful=False)
vectors, weights = tasks.run_kmeans(gathered, parts)
expected = [sampled(number, 40_000)[0] for number in range(5)]
np.testing.assert_array_equal(vectors, np.concatenate(expected))
np.testing.assert_array_equal(weights, np.repeat(np.arange(5, dtype=np.float32), 40_000))
session.stop()
cluster.shutdown()
"""


def test_a_lost_sample_is_taken_again() -> None:
    output_of(DRIVER)


FIT = """
import numpy as np
from ray.cluster_utils import Cluster
from pds_ray.config import ClusterConfig, RayConfig
from pds_ray.distributed import lloyd, session, tasks
from pds_ray.distributed.in_flight import InFlight
from pds_ray.stages import cluster as core

def sampled(number, rows):
    vectors = np.random.default_rng(number).standard_normal((rows, 8), np.float32)
    return vectors, np.full(rows, number + 1, np.float32)

node = {"num_cpus": 2, "object_store_memory": 200 << 20}
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 << 20}
)
first = cluster.add_node(**node)
session.start(RayConfig(address=cluster.address))
parts = list(tasks.map_to_store(sampled, range(5), 40_000))  # beyond what Ray keeps in the driver
core.SEED_LIMIT = 0
lloyd.fit_tasks = lambda *_: 3

def lose(iterations):
    if iterations == 2:
        cluster.add_node(**node)
        cluster.remove_node(first, allow_graceful=False)

found = []
with InFlight() as in_flight:
    for iterated in (lambda _: None, lose):
        work = lloyd.share_out(parts, "image", 20, 8, in_flight)
        found.append(lloyd.fit(work, 0, ClusterConfig(iterations=4, tolerance=0), iterated))
undisturbed, disturbed = found
assert disturbed.centroids.tobytes() == undisturbed.centroids.tobytes()
assert disturbed.objective == undisturbed.objective
session.stop()
cluster.shutdown()
"""


def test_a_fit_over_all_nodes_outlives_a_node() -> None:
    """It ends with the bytes of one that lost none."""
    output_of(FIT)
