"""The files of cluster_configs/ for tests: strict YAML, pins, node types by Ray's autoscaler.

`python -m tests.support.cluster_files FOLDER` writes the pods of the KubeRay cluster there, for
kubernetes-validate, which does not know KubeRay's own resources.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "cluster_configs"
KUBERAY = CLUSTERS / "kuberay"
LAUNCHER_FILES = (CLUSTERS / "aws" / "aws.yaml", CLUSTERS / "gcp" / "gcp.yaml")


class StrictLoader(yaml.SafeLoader):
    """Refuses a duplicate key, of which YAML's own loader keeps the last."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [
        loader.construct_object(key)
        for key, _ in node.value
        if key.tag != "tag:yaml.org,2002:merge"
    ]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"duplicate keys {sorted(twice)}", node.start_mark
        )
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_text(text: str) -> Any:
    """Return the one document of a YAML text, aliases as copies.

    Raises yaml.YAMLError, for duplicate keys and tabs too.
    """
    if "\t" in text:
        raise yaml.YAMLError("a tab")
    return json.loads(json.dumps(yaml.load(text, Loader=StrictLoader)))


def load(path: Path) -> Any:
    """Return the one document of a YAML file, strictly."""
    return load_text(path.read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    """Return package -> version of constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, flags=re.MULTILINE))


def texts() -> Iterator[tuple[Path, str]]:
    """Yield every file of cluster_configs/ with its text."""
    for path in sorted(CLUSTERS.rglob("*")):
        if path.is_file():
            yield path, path.read_text(encoding="utf-8")


def ray_cluster() -> dict[str, Any]:
    """Return raycluster.yaml as the autoscaler gets it, in a namespace."""
    cluster = load(KUBERAY / "raycluster.yaml")
    cluster["metadata"]["namespace"] = "default"
    return cluster


def ray_job() -> dict[str, Any]:
    """Return rayjob.yaml as kustomization.yaml makes it."""
    job = load(KUBERAY / "rayjob.yaml")
    job["spec"]["rayClusterSpec"] = load(KUBERAY / "raycluster.yaml")["spec"]
    return job


def node_types(cluster: str) -> dict[str, Any]:
    """Return the node types of "kuberay", "aws" or "gcp", as Ray's autoscaler reads them.

    Name -> resources, workers, priority.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )
    from ray.autoscaler._private.util import prepare_config

    if cluster == "kuberay":
        return _derive_autoscaling_config_from_ray_cr(ray_cluster())["available_node_types"]
    return prepare_config(load(CLUSTERS / cluster / f"{cluster}.yaml"))["available_node_types"]


def start_options() -> set[str]:
    """Return the options of `ray start`, without dashes in front."""
    from ray.scripts.scripts import start

    return {name.removeprefix("--") for option in start.params for name in option.opts}


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the head and the groups of workers of a KubeRay cluster."""
    return [{"groupName": "head", **spec["headGroupSpec"]}, *spec["workerGroupSpecs"]]


def write_pods(folder: Path) -> None:
    """Write a Pod for each group of the KubeRay cluster, as YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    for group in groups(ray_cluster()["spec"]):
        name = group["groupName"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **group["template"]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(pod), encoding="utf-8")


def dashboard() -> dict[str, Any]:
    """Return the Grafana dashboard."""
    return json.loads((CLUSTERS / "grafana" / "pds_ray.json").read_text(encoding="utf-8"))


def metrics_of(board: dict[str, Any]) -> set[str]:
    """Return the metrics that the panels and variables of a dashboard ask for."""
    return set(re.findall(r"\bray_\w+", json.dumps([board["panels"], board["templating"]])))


if __name__ == "__main__":
    write_pods(Path(sys.argv[1]))
