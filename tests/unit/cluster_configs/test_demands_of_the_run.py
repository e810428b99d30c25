"""The demands of run.yaml, and the nodes that Ray's autoscaler starts for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pds_ray.config import RunConfig, flatten, replace
from tests.support.cluster_files import CLUSTERS, load, node_types, ray_cluster

CLUSTER_NAMES = ("kuberay", "aws", "gcp")
RAY: dict[str, Any] = load(CLUSTERS / "run.yaml")["ray"]


def amounts(text: str) -> dict[str, float]:
    return {name: float(amount) for name, amount in (part.split("=") for part in text.split(","))}


DEMANDS = {
    "read": {"CPU": 0.5, **amounts(RAY["read_resources"])},
    "embed": {"CPU": 1.0, "GPU": float(RAY["embed_gpus"]), **amounts(RAY["embed_resources"])},
    "decode": {"CPU": 1.0, "GPU": float(RAY["decode_gpus"]), **amounts(RAY["decode_resources"])},
}
"""Resources of one task or actor."""


def started(
    types: dict[str, Any], demand: dict[str, float], count: int
) -> tuple[dict[str, int], int]:
    """Return the nodes that the autoscaler starts on an empty cluster, by kind.

    Beside them, how many demands no kind can meet.
    """
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    kinds = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=kind["max_workers"],
            priority=kind.get("priority", 0),
            resources=kind["resources"],
        )
        for name, kind in types.items()
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=kinds,
        max_num_nodes=sum(kind.max_worker_nodes for kind in kinds.values()) + 1,
        resource_requests=ResourceRequestUtil.group_by_count(
            [ResourceRequestUtil.make(demand)] * count
        ),
    )
    reply = ResourceDemandScheduler().schedule(request)
    launched = {launch.instance_type: launch.count for launch in reply.to_launch}
    return launched, len(reply.infeasible_resource_requests)


def test_the_run_is_a_configuration() -> None:
    config = replace(RunConfig(), flatten(load(CLUSTERS / "run.yaml")))
    assert config.out.startswith("s3://")
    assert config.ray.embed_gpus == 1


@pytest.mark.parametrize("cluster", CLUSTER_NAMES)
def test_readers_get_cpu_nodes(cluster: str) -> None:
    assert started(node_types(cluster), DEMANDS["read"], 20) == ({"cpu": 1}, 0)


@pytest.mark.parametrize("stage", ["embed", "decode"])
@pytest.mark.parametrize("cluster", CLUSTER_NAMES)
def test_models_get_gpu_nodes_on_spot_first(cluster: str, stage: str) -> None:
    types = node_types(cluster)
    most = RAY[f"{stage}_workers"]
    assert started(types, DEMANDS[stage], most) == ({"gpu-spot": most}, 0)
    spot = types["gpu-spot"]["max_workers"]
    assert started(types, DEMANDS[stage], spot + 2) == ({"gpu-spot": spot, "gpu": 2}, 0)


@pytest.mark.parametrize("resource", ["read", "embed", "decode"])
@pytest.mark.parametrize("cluster", CLUSTER_NAMES)
def test_without_the_resource_on_offer_nothing_starts(cluster: str, resource: str) -> None:
    types = copy.deepcopy(node_types(cluster))
    for kind in types.values():
        kind["resources"].pop(resource, None)
    assert started(types, DEMANDS[resource], 1) == ({}, 1)


def test_the_sample_of_the_k_means_fits_beside_any_object_store() -> None:
    """The k-means runs where it gets a GPU, or else where most CPUs are."""
    budget = load(CLUSTERS / "run.yaml")["cluster"]["memory_gib"] * 2**30
    types = node_types("kuberay")
    for group in ray_cluster()["spec"]["workerGroupSpecs"]:
        store = int(group["rayStartParams"]["object-store-memory"])
        assert budget + store < 0.9 * types[group["groupName"]]["resources"]["memory"]
