"""Configurations, clusters and rates for tests of the cost model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pds_ray import catalog
from pds_ray.config import RunConfig
from pds_ray.config import replace as configure
from pds_ray.planning.figures import NEEDED, Estimate, Measured
from pds_ray.planning.phases import Demand
from pds_ray.planning.plan import Plan, StagePlan, make_plan
from pds_ray.planning.workload import Cluster, make_cluster, web_workload
from pds_ray.recipes import recipe

PRICES = {
    "from": "test",
    "gpu_hour": {"H100": 2.0, "A100": 1.0, "L4": 0.5},
    "core_hour": 0.1,
    "storage_tb_month": 10.0,
    "egress_tb": 50.0,
}


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in changes.items()}


def _settled(config: RunConfig) -> RunConfig:
    return catalog.method(config.method).settled(config)


def web(**changes: Any) -> RunConfig:
    """Return a run on web data: 100,000 pairs with ViT-L-14, with changes as `embed__encoder`."""
    base = {"embed.encoder": "ViT-L-14", "pairs": 100_000}
    return _settled(configure(recipe("web_scale"), base | _dotted(changes)))


def forecast(
    pairs_in: int = 400_000_000, gpus: str = "64xH100", cpus: int | None = None, **changes: Any
) -> Plan:
    """Return the plan of `web(**changes)`, with assumed rates."""
    work = web_workload(pairs_in, 1, 24_000)
    return make_plan(web(**changes), work, make_cluster(gpus, cpus, None), None, PRICES)


def stage(plan: Plan, name: str) -> StagePlan:
    return next(found for found in plan.stages if found.name == name)


def demand(plan: Plan, name: str, what: str) -> Demand:
    return next(d for phase in stage(plan, name).phases for d in phase if d.what == what)


def rate(value: float, per: str = "core", unit: str = "images") -> Estimate:
    return Estimate(value, value / 2, value * 2, unit, per, "made up")


def machine(per: str = "core", gpus: tuple[str, ...] = ()) -> Measured:
    """Return rates measured on two cores with the demo models; models run on cores or GPUs."""
    figures = {
        "encode_images": rate(400, per),
        "encode_images@256": rate(500, per),
        "encode_captions": rate(2000, per, "captions"),
        "commit": rate(50_000, unit="pairs"),
        "draw": rate(8, per),
        "fit": rate(3e10, unit="FLOP"),
        "blocks": rate(1e9, "driver", "tasks"),
        "start": Estimate(5, 7, 4, "s", "run", "made up"),
        "start_embed": Estimate(9, 12, 8, "s", "run", "made up"),
    }
    sources = {
        "jpeg": {"read": rate(1), "preprocess": rate(1)},
        "scenes:10": {"read": rate(4000), "preprocess": rate(5000)},
    }
    return Measured(
        "2026-01-02", "a CPU", 2, gpus, "demo", 128, 64, "auto for demo", 40, sources, figures
    )


MACHINE, MACHINE_HERE = machine(), Cluster(0, "", 2, 2)


def machine_config(**changes: Any) -> RunConfig:
    """Return a run of the demo recipe on 20,000 scenes, with changes as `embed__encoder`."""
    base = {"source": "scenes:20000", "decode.batch_size": 16}
    return _settled(configure(recipe("demo"), base | _dotted(changes)))


def entry(value: object = 2.0) -> dict[str, object]:
    """Return an entry of a file of rates."""
    return {
        "value": value, "worst": 1.0, "best": 3.0, "unit": "images", "per": "core", "repeats": 3,
    }  # fmt: skip


def rates_file(path: Path, **changes: Any) -> Path:
    """Write a file of rates as `pds-ray bench` does, with other values of its keys."""
    data = {
        "schema": 1,
        "date": "2026-01-02",
        "machine": {"cpu": "a CPU", "cpus": 4, "gpus": []},
        "encoder": {"name": "demo", "dim": 128, "size": 64},
        "decoder": {"name": "auto for demo", "passes": 40},
        "sources": {"jpeg": {"read": entry(), "preprocess": entry()}},
        "figures": {**dict.fromkeys(NEEDED, entry()), **changes.pop("figures", {})},
    }
    path.write_text(json.dumps(data | changes))
    return path
