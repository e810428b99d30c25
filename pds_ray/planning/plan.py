"""Cost model: estimates time, hardware, bytes and money per stage. Pure arithmetic, without Ray.

    seconds of a phase = max(over resources: sum of work / rate / number of units,
                             over demands:   work / rate / units that can share it)

A stage takes its start plus its phases, so never less than any resource needs for its work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pds_ray import catalog
from pds_ray.config import RunConfig, replace, settled
from pds_ray.engine.optimisation import with_own_values
from pds_ray.errors import ConfigError
from pds_ray.methods.base import Stage
from pds_ray.planning.choose import choose_figures, encoder_shape
from pds_ray.planning.figures import SCHEMA_VERSION, Case, Estimate, Measured, assumptions
from pds_ray.planning.phases import Inputs, Phase, StageModel
from pds_ray.planning.workload import Cluster, Workload

RESOURCES = {
    "core": "CPU",
    "GPU": "GPU",
    "node": "network",
    "driver": "driver",
    "connection": "round trips",
}


@dataclass(frozen=True)
class StagePlan:
    """Time, hardware, bytes and money of one stage."""

    name: str
    seconds: float
    bottleneck: str
    gpu_hours: float
    """Hours of GPUs at work; those that wait count in the cost alone."""
    core_hours: float
    disk_bytes: float
    """Bytes written, to stay."""
    traffic_bytes: float
    """Bytes over the network."""
    store_bytes: float
    """Bytes in Ray's object store, in the whole cluster."""
    driver_bytes: float
    """Bytes of memory on the driver."""
    usd: float | None
    """None where a price is not known."""
    start: Estimate
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class Plan:
    """Time, hardware, bytes and money of a run."""

    workload: Workload
    cluster: Cluster
    stages: tuple[StagePlan, ...]
    start: Estimate
    """Start of Ray, before the first stage."""
    seconds: float
    seconds_worst: float
    seconds_best: float
    usd: float | None
    """Price of the machines, idle ones included."""
    storage_usd_month: float
    egress_usd: float
    """Cost if the source lies in another region; part of no other figure."""
    prices: str
    """Their origin."""


def make_plan(
    config: RunConfig,
    work: Workload,
    cluster: Cluster,
    measured: Measured | None,
    prices: Mapping[str, Any],
) -> Plan:
    """Estimate a run of a method whose stages all have a row in the cost model.

    Raises ConfigError in one line for a run that is impossible or depends on unknown figures.
    """
    method = catalog.method(config.method, config.budget, config.distill.init)
    config = with_own_values(method.settled(settled(config)))
    method_stages = method.stages
    _check_models(config.method, method_stages)
    if config.pairs > work.images:
        raise ConfigError(
            f"{config.pairs:,} pairs asked for, but there are only {work.images:,} images; "
            "lower --pairs"
        )
    _check_gpus(config, cluster)
    figures = choose_figures(config, cluster, measured)
    if not config.pairs:  # what fits in the budget is known only when the images have been seen
        pairs = config.budget_bytes / figures["saved_pair"].value
        kept = (1 - config.prune.ratio) * work.images
        config = replace(config, {"pairs": max(1, int(min(pairs, kept)))})
    dim, size = encoder_shape(config, measured)

    def stages(case: Case) -> Iterator[StagePlan]:
        at_case = {name: figure.at(case) for name, figure in figures.items()}
        inputs = Inputs(config, work, cluster, at_case, dim, size)
        for stage in method_stages:
            yield _plan_stage(stage.name, _model(stage), inputs, prices)

    def total(case: Case) -> float:
        return figures["start"].at(case).value + sum(stage.seconds for stage in stages(case))

    planned, seconds = tuple(stages("value")), total("value")
    terabytes = sum(stage.disk_bytes for stage in planned) / 1e12
    return Plan(
        workload=work,
        cluster=cluster,
        stages=planned,
        start=figures["start"],
        seconds=seconds,
        seconds_worst=total("worst"),
        seconds_best=total("best"),
        usd=cost(seconds, cluster, prices),
        storage_usd_month=terabytes * prices["storage_tb_month"],
        egress_usd=work.bytes / 1e12 * prices["egress_tb"],
        prices=prices["from"],
    )


def _check_models(method: str, stages: Sequence[Stage]) -> None:
    """Raise ConfigError if a stage has no cost model."""
    missing = [stage.name for stage in stages if not stage.plan]
    if missing:
        raise ConfigError(
            f"method is {method!r}; its stage {missing[0]} has no cost model, so it cannot be "
            "planned"
        )


def _model(stage: Stage) -> StageModel:
    """Import the cost model that a stage names."""
    module, _, name = stage.plan.partition(":")
    return getattr(import_module(module), name)


def _check_gpus(config: RunConfig, cluster: Cluster) -> None:
    """Raise ConfigError where actors would wait for ever, or use CPUs beside idle GPUs."""
    asked = {"embed": config.ray.embed_gpus}
    if config.decode.decoder == "unclip":
        asked["decode"] = config.ray.decode_gpus
    for stage, gpus in asked.items():
        if gpus == 0 and cluster.gpus:
            raise ConfigError(
                f"ray.{stage}_gpus is 0: a stage on CPUs beside GPUs cannot be planned; "
                "leave it out"
            )
        if gpus is not None and gpus > cluster.gpus:
            raise ConfigError(
                f"ray.{stage}_gpus is {gpus:g}, of {cluster.gpus} GPUs; "
                "give --gpus for at least one actor"
            )


def _plan_stage(
    name: str, model: StageModel, inputs: Inputs, prices: Mapping[str, Any]
) -> StagePlan:
    """Return the estimate of one stage by its model, at the prices given."""
    every_phase = tuple(filter(None, model.phases(inputs)))
    start = inputs.figures[f"start_{name}"]
    spans = [(start.value, "start"), *(phase_seconds(each, inputs.cluster) for each in every_phase)]
    seconds = sum(span for span, _ in spans)
    demands = [demand for phase in every_phase for demand in phase]

    def hours(per: str) -> float:
        return sum(demand.unit_seconds for demand in demands if demand.rate.per == per) / 3600

    return StagePlan(
        name=name,
        seconds=seconds,
        bottleneck=max(spans, key=lambda span: span[0])[1],
        gpu_hours=hours("GPU"),
        core_hours=hours("core"),
        disk_bytes=model.disk_bytes(inputs),
        traffic_bytes=sum(demand.work for demand in demands if demand.rate.per == "node"),
        store_bytes=model.store_bytes(inputs),
        driver_bytes=inputs.figures["driver"].value + model.driver_bytes(inputs),
        usd=cost(seconds, inputs.cluster, prices),
        start=start,
        phases=every_phase,
    )


def phase_seconds(phase: Phase, cluster: Cluster) -> tuple[float, str]:
    """Return the duration of a phase and its bottleneck.

    That is the busiest resource with the greatest demand on it, or a demand that few units share.
    """
    busy = dict.fromkeys((demand.rate.per for demand in phase), 0.0)
    for demand in phase:
        busy[demand.rate.per] += demand.unit_seconds / cluster.units(demand.rate.per)
    spans = [
        (seconds, per, max((d for d in phase if d.rate.per == per), key=lambda d: d.unit_seconds))
        for per, seconds in busy.items()
    ]
    spans += [(d.unit_seconds / d.at_most, d.rate.per, d) for d in phase if d.at_most is not None]
    seconds, per, demand = max(spans, key=lambda span: span[0])
    return seconds, f"{RESOURCES[per]}: {demand.what}"


def cost(seconds: float, cluster: Cluster, prices: Mapping[str, Any]) -> float | None:
    """Return the price in USD of the cluster for a duration; None if its GPUs have no price."""
    if cluster.gpus and cluster.gpu not in prices["gpu_hour"]:
        return None
    extra = max(0, cluster.cpus - cluster.gpus * assumptions()["machines"]["cores_per_gpu"])
    gpus = cluster.gpus * prices["gpu_hour"][cluster.gpu] if cluster.gpus else 0.0
    return seconds / 3600 * (gpus + extra * prices["core_hour"])


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain JSON values."""
    return {"schema": SCHEMA_VERSION, **dataclasses.asdict(plan)}
