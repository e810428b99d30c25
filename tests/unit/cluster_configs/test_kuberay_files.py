"""The files for KubeRay: against its fields, the schemas of Kubernetes, and KubeRay's and Ray's own rules."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.support.cluster_files import (
    KUBERAY,
    load,
    load_text,
    ray_cluster,
    ray_job,
    start_options,
)

KUBERNETES = "1.35"
SCHEMA = load(Path(__file__).parent / "kuberay_schema.yaml")


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any]:
    return resource["spec"].get("rayClusterSpec", resource["spec"])


def check(resource: dict[str, Any]) -> None:
    """Raises an error of jsonschema for what KubeRay or Kubernetes would refuse."""
    jsonschema.validate(resource, SCHEMA)
    for group in groups(cluster_spec(resource)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("resource", [ray_cluster(), ray_job()], ids=["cluster", "job"])
def test_the_files_are_what_kuberay_and_kubernetes_take(resource: dict[str, Any]) -> None:
    check(resource)


def worker(resource: dict[str, Any]) -> dict[str, Any]:
    return cluster_spec(resource)["workerGroupSpecs"][1]


def container(resource: dict[str, Any]) -> dict[str, Any]:
    return worker(resource)["template"]["spec"]["containers"][0]


BREAKAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "field of the cluster": lambda r: cluster_spec(r).update(workerGroups=[]),
    "autoscaler version": lambda r: cluster_spec(r)["autoscalerOptions"].update(version="v3"),
    "field of a group": lambda r: worker(r).update(maxreplicas=3),
    "no upper bound": lambda r: worker(r).pop("maxReplicas"),
    "number for a string": lambda r: worker(r)["rayStartParams"].update({"object-store-memory": 8}),
    "number for a resource": lambda r: worker(r)["resources"].update(embed=1),
    "field of a pod": lambda r: worker(r)["template"]["spec"].update(nodeSelectors={}),
    "field of a container": lambda r: container(r).update(envfrom=[]),
    "probe": lambda r: container(r)["livenessProbe"].update(httpget={}),
    "volume": lambda r: worker(r)["template"]["spec"]["volumes"][0]["emptyDir"].update(size="9Gi"),
    "toleration": lambda r: worker(r)["template"]["spec"].update(tolerations={"key": "a"}),
    "no containers": lambda r: worker(r)["template"]["spec"].pop("containers"),
    "name of the cluster": lambda r: r["metadata"].update(name="PDS_ray"),
}


@pytest.mark.parametrize("what", BREAKAGES)
@pytest.mark.parametrize("resource", [ray_cluster(), ray_job()], ids=["cluster", "job"])
def test_broken_copies_are_refused(resource: dict[str, Any], what: str) -> None:
    broken = copy.deepcopy(resource)
    BREAKAGES[what](broken)
    with pytest.raises(jsonschema.ValidationError):
        check(broken)


def test_a_misspelt_field_of_the_job_is_refused() -> None:
    broken = ray_job()
    broken["spec"]["backofflimit"] = 3
    with pytest.raises(jsonschema.ValidationError):
        check(broken)


def breaches(spec: dict[str, Any]) -> list[str]:
    """Rules that KubeRay 1.7 checks in its operator, and ours about pods, that a cluster breaks."""
    found = []
    version = tuple(map(int, spec["rayVersion"].split(".")))
    if (
        spec["authOptions"]["mode"] != "token"
        or version < (2, 52)
        or not spec["authOptions"].get("secretName")
    ):
        found.append("no token")
    for group in groups(spec):
        name, start, pod = (
            group.get("groupName", "head"),
            group["rayStartParams"],
            group["template"]["spec"],
        )
        ray = pod["containers"][0]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        paths = {mount["mountPath"]: mount["name"] for mount in ray["volumeMounts"]}
        rules = {
            "pods are reused": pod["restartPolicy"] == "Never",
            "sizes twice": not (
                group.get("resources")
                and start.keys() & {"num-cpus", "num-gpus", "memory", "resources"}
            ),
            "unknown option of ray start": start.keys() <= start_options(),
            "bounds": group.get("minReplicas", 0) <= group.get("maxReplicas", 1),
            "limits differ from requests": ray["resources"]["limits"]
            == ray["resources"]["requests"],
            "no limits": {"cpu", "memory", "ephemeral-storage"}
            <= ray["resources"]["limits"].keys(),
            "no shm": volumes.get(paths.get("/dev/shm", ""), {}).get("emptyDir", {}).get("medium")
            == "Memory",
            "no spilling": start.get("object-spilling-directory") in paths.keys() - {"/dev/shm"},
            "mount without volume": set(paths.values()) <= volumes.keys(),
            "root": pod["securityContext"].get("runAsNonRoot") is True,
            "no probes": {"livenessProbe", "readinessProbe"} <= ray.keys(),
            "no credentials": {"secretRef": {"name": "pds-ray-store"}} in ray.get("envFrom", []),
            "no pool": "pds-ray/pool" in pod["nodeSelector"],
            "secret in the file": not any("value" in variable for variable in ray.get("env", [])),
        }
        if "/dev/shm" in paths and rules["no shm"]:
            size = volumes[paths["/dev/shm"]]["emptyDir"]["sizeLimit"]
            rules["object store larger than shm"] = int(start["object-store-memory"]) < bytes_of(
                size
            )
            rules["shm larger than memory"] = 2 * bytes_of(size) < bytes_of(
                ray["resources"]["limits"].get("memory", "0Gi")
            )
        if "nvidia.com/gpu" in ray["resources"]["limits"]:
            tolerated = {toleration["key"] for toleration in pod.get("tolerations", [])}
            rules["GPU nodes not tolerated"] = "nvidia.com/gpu" in tolerated
            spot = "spot" in pod["nodeSelector"]["pds-ray/pool"]
            rules["spot nodes not tolerated"] = not spot or "pds-ray/spot" in tolerated
            rules["spot without drain"] = not spot or "drain-node" in str(ray.get("lifecycle"))
        found += [f"{name}: {rule}" for rule, kept in rules.items() if not kept]
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("head: takes tasks")
    return found


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


def test_the_cluster_keeps_the_rules() -> None:
    assert breaches(ray_cluster()["spec"]) == []


LAPSES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no token": lambda s: s.update(rayVersion="2.51.0"),
    "head: takes tasks": lambda s: s["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
    "cpu: pods are reused": lambda s: s["workerGroupSpecs"][0]["template"]["spec"].update(
        restartPolicy="Always"
    ),
    "cpu: sizes twice": lambda s: s["workerGroupSpecs"][0]["rayStartParams"].update(
        {"num-cpus": "3"}
    ),
    "cpu: unknown option of ray start": lambda s: s["workerGroupSpecs"][0]["rayStartParams"].update(
        {"cpus": "3"}
    ),
    "gpu: bounds": lambda s: s["workerGroupSpecs"][1].update(minReplicas=9),
    "gpu: GPU nodes not tolerated": lambda s: s["workerGroupSpecs"][1]["template"]["spec"].pop(
        "tolerations"
    ),
    "gpu-spot: spot nodes not tolerated": lambda s: s["workerGroupSpecs"][2]["template"]["spec"][
        "tolerations"
    ].pop(),
    "gpu-spot: no spilling": lambda s: s["workerGroupSpecs"][2]["rayStartParams"].pop(
        "object-spilling-directory"
    ),
    "cpu: no shm": lambda s: s["workerGroupSpecs"][0]["template"]["spec"]["volumes"][0][
        "emptyDir"
    ].pop("medium"),
    "cpu: object store larger than shm": lambda s: s["workerGroupSpecs"][0][
        "rayStartParams"
    ].update({"object-store-memory": str(20 * 2**30)}),
    "gpu: no limits": lambda s: [
        s["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"][side].pop(
            "memory"
        )
        for side in ("limits", "requests")
    ],
}


@pytest.mark.parametrize("what", LAPSES)
def test_a_cluster_that_breaks_a_rule_is_found_out(what: str) -> None:
    spec = ray_cluster()["spec"]
    LAPSES[what](spec)
    assert what in breaches(spec)


def test_the_job_ends_its_cluster_and_tries_again() -> None:
    spec = ray_job()["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] >= 3
    config = re.fullmatch(
        r"python \S+/jobs/distill\.py --config (\S+)/run\.yaml", spec["entrypoint"]
    )
    assert config
    mounts = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    assert config[1] in {mount["mountPath"] for mount in mounts}


def test_kustomize_makes_the_job_and_nothing_else() -> None:
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("no kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERAY)], capture_output=True, text=True, check=True
    )
    assert load_text(done.stdout) == ray_job()


def test_the_kustomization_takes_the_whole_spec_of_the_cluster() -> None:
    """What `ray_job` does in its stead where there is no kubectl."""
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
