"""Tasks of products on nodes whose GPUs are not of one size, some of them taken or gone."""

from __future__ import annotations

import pytest

from tests.support.ray_script import output_of

pytestmark = [pytest.mark.ray, pytest.mark.long]
DRIVER = """
import os
import tempfile
import threading
import time
import ray
from ray.cluster_utils import Cluster
from pds_ray.config import RayConfig
from pds_ray.distributed import pools, session

began = os.path.join(tempfile.mkdtemp(), "began")
slow = False

def memory():  # in bytes, as torch would tell it
    found = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    here = found[ray.get_runtime_context().get_node_id()]
    if slow and "small" in here:
        open(began, "w").close()
        time.sleep(60)
    return int(80e9) if "large" in here else int(16e9) if "small" in here else 0

pools._gpu_memory = memory
node = {"num_cpus": 8, "num_gpus": 1, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "num_gpus": 0})
large = cluster.add_node(**node, resources={"large": 1})
small = cluster.add_node(**node, resources={"small": 1})
session.start(RayConfig(address=cluster.address))
for _ in range(3):
    print("both:", pools.products())

@ray.remote(num_cpus=0, num_gpus=1)
class Other:
    def here(self):
        pass

for name in ("large", "small"):
    other = Other.options(resources={name: 1}).remote()
    ray.get(other.here.remote())
    pools.LOOK_S = 3.0
    print(f"{name} taken:", pools.products())
    ray.kill(other)
pools.LOOK_S = 300.0

def lose():
    while not os.path.exists(began):
        time.sleep(0.1)
    cluster.remove_node(small, allow_graceful=False)

slow = True
losing = threading.Thread(target=lose, daemon=True)
losing.start()
print("small lost:", pools.products())
losing.join(60)
slow = False
cluster.add_node(**node)
print("one unusable:", pools.products())
session.stop()
cluster.shutdown()
"""


def test_tasks_fit_the_smallest_gpu_that_they_may_have() -> None:
    lines = [line for line in output_of(DRIVER) if ": Share" in line]
    eighth, sixth = (f"Share(num_gpus={1 / count}, device='cuda')" for count in (8, 6))
    assert lines == [
        *[f"both: {sixth}"] * 3,
        f"large taken: {sixth}",
        f"small taken: {eighth}",
        f"small lost: {eighth}",
        "one unusable: Share(num_gpus=0.0, device='cpu')",
    ]
