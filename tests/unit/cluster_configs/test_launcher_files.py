"""The files for Ray's cluster launcher: by Ray's own checks, and by what its schema leaves open."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support.cluster_files import LAUNCHER_FILES, load, pins, start_options


def check(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with Ray's defaults. Raises what Ray raises for a wrong one."""
    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.fixture(params=LAUNCHER_FILES, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    path: Path = request.param
    return load(path)


def test_ray_takes_the_file(config: dict[str, Any]) -> None:
    check(config)


BREAKAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "misspelt key": lambda c: c.update(idle_timeout_minute=5),
    "misspelt key of a node type": lambda c: c["available_node_types"]["gpu"].update(max_worker=3),
    "unknown head": lambda c: c.update(head_node_type="gpu-head"),
    "no head": lambda c: c.pop("head_node_type"),
    "share of a resource": lambda c: c["available_node_types"]["gpu"]["resources"].update(
        embed=0.5
    ),
    "no resources": lambda c: c["available_node_types"]["gpu"].pop("resources"),
    "no provider": lambda c: c["provider"].pop("type"),
    "command that is no text": lambda c: c.update(head_start_ray_commands=[{"ray": "stop"}]),
    "more workers at least than at most": lambda c: c.update(max_workers=0),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_ray_refuses_broken_copies(config: dict[str, Any], what: str) -> None:
    BREAKAGES[what](config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        check(config)


def is_spot(node: dict[str, Any]) -> bool:
    market = node.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


def breaches(config: dict[str, Any]) -> list[str]:
    """What a prepared configuration does wrong that Ray's schema has no opinion on."""
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    workers = {name: kind for name, kind in types.items() if kind is not head}
    starts = [
        next(part for part in config[f"{side}_start_ray_commands"] if "ray start" in part)
        for side in ("head", "worker")
    ]
    options = [re.findall(r"--([\w-]+)", start) for start in starts]
    installed = [
        part
        for part in config["head_setup_commands"] + config["worker_setup_commands"]
        if "pip" in part
    ]
    wanted = [
        package for part in installed for package in part.split() if not package.startswith("-")
    ][2:]
    rules = {
        "head takes tasks": head["resources"] == {"CPU": 0},
        "head on spot": not is_spot(head["node_config"]),
        "no spot": any(is_spot(kind["node_config"]) for kind in workers.values()),
        "no GPU on demand": any(
            kind["resources"].get("GPU") and not is_spot(kind["node_config"])
            for kind in workers.values()
        ),
        "spot not before on-demand": all(
            is_spot(kind["node_config"]) == (kind.get("priority", 0) > 0)
            for kind in workers.values()
        ),
        "workers at most": sum(kind["max_workers"] for kind in workers.values())
        == config["max_workers"],
        "no spilling": all("object-spilling-directory" in given for given in options),
        "no shm": all("--shm-size" in str(kind["docker"]) for kind in workers.values())
        and "--shm-size" in str(config["docker"]["head_run_options"]),
        "unknown option of ray start": all(set(given) <= start_options() for given in options),
        "no token": "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
        and "~/.ray/auth_token" in config["file_mounts"],
        "dashboard open": "--dashboard-host=127.0.0.1" in starts[0],
        "GPU not given": all(
            ("--gpus=all" in str(kind["docker"])) == bool(kind["resources"].get("GPU"))
            for kind in workers.values()
        ),
        "another Ray": not config["setup_commands"],
        "package not pinned": bool(wanted)
        and all(re.fullmatch(r"[\w-]+==[\w.]+", package) for package in wanted),
        "package pinned otherwise": all(
            pins().get(name, version) == version
            for name, version in (package.split("==") for package in wanted)
        )
        if all("==" in package for package in wanted)
        else True,
    }
    return [rule for rule, kept in rules.items() if not kept]


def test_the_file_keeps_the_rules(config: dict[str, Any]) -> None:
    assert breaches(check(config)) == []


LAPSES: dict[str, Callable[[dict[str, Any]], object]] = {
    "head takes tasks": lambda c: c["available_node_types"]["head"].update(resources={"CPU": 4}),
    "head on spot": lambda c: c["available_node_types"]["head"].update(
        node_config=c["available_node_types"]["gpu-spot"]["node_config"]
    ),
    "no spot": lambda c: c["available_node_types"].pop("gpu-spot"),
    "no GPU on demand": lambda c: c["available_node_types"].pop("gpu"),
    "spot not before on-demand": lambda c: c["available_node_types"]["gpu-spot"].update(priority=0),
    "workers at most": lambda c: c.update(max_workers=9),
    "no spilling": lambda c: c.update(
        worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]
    ),
    "no shm": lambda c: c["available_node_types"]["cpu"].update(docker={"worker_run_options": []}),
    "unknown option of ray start": lambda c: c["head_start_ray_commands"].insert(
        0, "ray start --hed"
    ),
    "no token": lambda c: c.update(file_mounts={}),
    "dashboard open": lambda c: c["head_start_ray_commands"].insert(
        0, "ray start --dashboard-host=0.0.0.0"
    ),
    "GPU not given": lambda c: c["available_node_types"]["gpu"].update(
        docker={"worker_run_options": ["--shm-size=9g"]}
    ),
    "another Ray": lambda c: c.pop("setup_commands"),
    "package not pinned": lambda c: c.update(head_setup_commands=["pip install --user boto3"]),
    "package pinned otherwise": lambda c: c.update(
        head_setup_commands=["pip install --user boto3==1.0.0"]
    ),
}


@pytest.mark.parametrize("what", LAPSES)
def test_a_file_that_breaks_a_rule_is_found_out(config: dict[str, Any], what: str) -> None:
    LAPSES[what](config)
    assert what in breaches(prepare_config(config))
