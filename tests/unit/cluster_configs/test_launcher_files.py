"""The files for Ray's cluster launcher: by Ray's own checks, and by rules of its documentation."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support.cluster_files import LAUNCHER_FILES, load, pins, start_options


@pytest.fixture(params=LAUNCHER_FILES, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return a file with Ray's defaults, which raises what Ray raises for a wrong one."""
    prepared = prepare_config(load(request.param))
    validate_config(prepared)
    return prepared


def workers(config: dict[str, Any]) -> list[dict[str, Any]]:
    types = config["available_node_types"]
    return [kind for name, kind in types.items() if name != config["head_node_type"]]


def is_spot(kind: dict[str, Any]) -> bool:
    node = kind["node_config"]
    market = node.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


def test_the_head_is_on_demand_and_takes_no_tasks(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert not is_spot(head)


def test_spot_nodes_come_before_gpus_on_demand(config: dict[str, Any]) -> None:
    kinds = workers(config)
    assert any(is_spot(kind) for kind in kinds)
    assert any(kind["resources"].get("GPU") and not is_spot(kind) for kind in kinds)
    assert all(is_spot(kind) == (kind.get("priority", 0) > 0) for kind in kinds)
    assert sum(kind["max_workers"] for kind in kinds) == config["max_workers"]


def test_containers_have_shared_memory_the_token_and_the_gpu(config: dict[str, Any]) -> None:
    assert "--shm-size" in str(config["docker"]["head_run_options"])
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "~/.ray/auth_token" in config["file_mounts"]
    for kind in workers(config):
        assert "--shm-size" in str(kind["docker"])
        assert ("--gpus=all" in str(kind["docker"])) == bool(kind["resources"].get("GPU"))


def test_ray_is_started_with_options_that_it_has(config: dict[str, Any]) -> None:
    for side in ("head", "worker"):
        (start,) = (part for part in config[f"{side}_start_ray_commands"] if "ray start" in part)
        options = set(re.findall(r"--([\w-]+)", start))
        assert "object-spilling-directory" in options
        assert options <= start_options()
        if side == "head":
            assert "--dashboard-host=127.0.0.1" in start, "the dashboard is open"


def test_no_other_ray_and_nothing_unpinned_is_installed(config: dict[str, Any]) -> None:
    assert config["setup_commands"] == []
    commands = config["head_setup_commands"] + config["worker_setup_commands"]
    packages = [
        word
        for command in commands
        if "pip install" in command
        for word in command.partition("pip install")[2].split()
        if not word.startswith("-")
    ]
    assert packages
    for package in packages:
        name, _, version = package.partition("==")
        assert re.fullmatch(r"[\w.]+", version), f"{package} is not pinned"
        assert pins().get(name, version) == version, f"{package} is pinned otherwise"
