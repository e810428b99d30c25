"""A core of a large contingency table outlives the node that has it, and the table."""

from __future__ import annotations

import pytest

from tests.support.ray_script import output_of

pytestmark = [pytest.mark.ray, pytest.mark.long]

DRIVER = """
import numpy as np
from ray.cluster_utils import Cluster
from scipy.optimize import linear_sum_assignment
from pds_ray.config import RayConfig
from pds_ray.distributed import match, session, tasks
from pds_ray.stages import assign
from pds_ray.stages import match as core

CLUSTERS = 300

def part_of(first, end):
    rng = np.random.default_rng(first)
    table = rng.poisson(1.0, (end - first, CLUSTERS))
    table[:, 0] += 90  # all would have the same one
    cells = np.flatnonzero(table)
    return cells + first * CLUSTERS, table.reshape(-1)[cells].astype(np.int64)

node = {"num_cpus": 2, "object_store_memory": 200 << 20}
head = {"num_cpus": 0, "object_store_memory": 200 << 20}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.add_node(**node)]
session.start(RayConfig(address=cluster.address))
bounds = [(0, 100), (100, 250), (250, CLUSTERS)]
assign.CORE_LIMIT = 4 * CLUSTERS
solve = assign._solve_core
solved = []

def lose(core):
    solved.append(core.cells)
    if len(solved) == 2:
        cluster.add_node(**node)
        cluster.remove_node(nodes[0], allow_graceful=False)
    return solve(core)

assign._solve_core = lose
parts = [tasks.in_store(part_of, *each) for each in bounds]
text_of, shared = match._assigned(match._fetched(parts, CLUSTERS), parts, "sparse")
table = np.zeros((CLUSTERS, CLUSTERS), np.int64)
for each in bounds:
    cells, counts = part_of(*each)
    table.reshape(-1)[cells] = counts
best = table[linear_sum_assignment(table, maximize=True)].sum()
assert sorted(text_of) == list(range(CLUSTERS))
assert shared.sum() == table[np.arange(CLUSTERS), text_of].sum() == best
print("solved", len(solved))
session.stop()
cluster.shutdown()
"""


def test_a_core_outlives_a_node() -> None:
    """Its ranges, and those of the table, are made again; the total is the best one."""
    *_, line = output_of(DRIVER)
    assert int(line.removeprefix("solved ")) > 2, "it must grow after the node is gone"
