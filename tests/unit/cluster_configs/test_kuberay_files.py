"""The files for KubeRay against its fields and its rules.

`make lint-configs` checks their pods.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.cluster_files import KUBERAY, groups, load, ray_cluster, ray_job, start_options

SCHEMA = load(Path(__file__).parent / "kuberay_schema.yaml")
RESOURCES = pytest.mark.parametrize("resource", [ray_cluster(), ray_job()], ids=["cluster", "job"])
GROUPS = pytest.mark.parametrize(
    "group", groups(ray_cluster()["spec"]), ids=lambda group: group["groupName"]
)


@RESOURCES
def test_kuberay_knows_the_fields(resource: dict[str, Any]) -> None:
    jsonschema.validate(resource, SCHEMA)
    broken = copy.deepcopy(resource)
    broken["spec"]["backofflimit"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_cluster_asks_for_a_token_and_its_head_takes_no_tasks() -> None:
    spec = ray_cluster()["spec"]
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52)  # the first with tokens
    assert spec["authOptions"]["mode"] == "token"
    assert spec["authOptions"]["secretName"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@GROUPS
def test_a_group_keeps_the_rules_of_the_operator(group: dict[str, Any]) -> None:
    start = group["rayStartParams"]
    assert start.keys() <= start_options()
    assert group["template"]["spec"]["restartPolicy"] == "Never", "pods are reused"
    sizes = {"num-cpus", "num-gpus", "memory", "resources"}
    assert not (group.get("resources") and start.keys() & sizes), "sizes twice"
    assert group.get("minReplicas", 0) <= group.get("maxReplicas", 1)


@GROUPS
def test_a_pod_is_bounded_unprivileged_watched_and_knows_no_secret(group: dict[str, Any]) -> None:
    pod = group["template"]["spec"]
    ray = pod["containers"][0]
    limits = ray["resources"]["limits"]
    assert {"cpu", "memory", "ephemeral-storage"} <= limits.keys()
    assert limits == ray["resources"]["requests"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {"livenessProbe", "readinessProbe"} <= ray.keys()
    assert {"secretRef": {"name": "pds-ray-store"}} in ray["envFrom"]
    assert not any("value" in variable for variable in ray.get("env", []))
    assert "pds-ray/pool" in pod["nodeSelector"]


@GROUPS
def test_the_object_store_fits_into_shared_memory_and_spills_to_a_volume(
    group: dict[str, Any],
) -> None:
    pod, start = group["template"]["spec"], group["rayStartParams"]
    ray = pod["containers"][0]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in ray["volumeMounts"]}
    assert set(mounts.values()) <= volumes.keys()
    assert start["object-spilling-directory"] in mounts.keys() - {"/dev/shm"}
    shm = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shm["medium"] == "Memory"
    assert int(start["object-store-memory"]) < bytes_of(shm["sizeLimit"])
    assert 2 * bytes_of(shm["sizeLimit"]) < bytes_of(ray["resources"]["limits"]["memory"])


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


def test_gpu_pods_tolerate_their_nodes_and_spot_pods_drain() -> None:
    on_gpu = []
    for group in ray_cluster()["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        ray = pod["containers"][0]
        if "nvidia.com/gpu" not in ray["resources"]["limits"]:
            continue
        on_gpu.append(group["groupName"])
        tolerated = {toleration["key"] for toleration in pod["tolerations"]}
        assert "nvidia.com/gpu" in tolerated
        if "spot" in pod["nodeSelector"]["pds-ray/pool"]:
            assert "pds-ray/spot" in tolerated
            assert "drain-node" in str(ray["lifecycle"])
    assert on_gpu == ["gpu", "gpu-spot"]


def test_the_job_ends_its_cluster_and_tries_again() -> None:
    spec = ray_job()["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] >= 3
    config = re.fullmatch(
        r"python \S+/jobs/distill\.py --config (\S+)/run\.yaml", spec["entrypoint"]
    )
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert config[1] in {mount["mountPath"] for mount in head["volumeMounts"]}


def test_the_kustomization_takes_the_whole_spec_of_the_cluster() -> None:
    """As `ray_job` does."""
    kustomization = load(KUBERAY / "kustomization.yaml")
    (replacement,) = kustomization["replacements"]
    assert replacement["source"] == {
        "kind": "RayCluster",
        "name": ray_cluster()["metadata"]["name"],
        "fieldPath": "spec",
    }
    (target,) = replacement["targets"]
    assert target["select"] == {"kind": "RayJob", "name": ray_job()["metadata"]["name"]}
    assert target["fieldPaths"] == ["spec.rayClusterSpec"]
    for name in kustomization["resources"]:
        assert (KUBERAY / name).is_file()
