"""Experts on the cluster: shards are prepared by tasks, experts train side by side, one task each.

A task that is lost with its process or machine starts again; an expert goes on from its last epoch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import ray
import torch
from torch import nn

from pds_ray import catalog
from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError, RayConfig
from pds_ray.distributed import TASK_RETRIES, places, pools, process, session, tasks
from pds_ray.distributed.in_flight import InFlight
from pds_ray.encoders.base import EncoderInfo, TextEncoder, TextEncoderInfo
from pds_ray.errors import UserError, without_secrets
from pds_ray.sources.base import Shard, SourceError
from pds_ray.stages import expert_data
from pds_ray.stages import experts as core
from pds_ray.stages.experts import WantedExperts
from pds_ray.store.expert_store import expert_name
from pds_ray.telemetry.progress import QUIET_S, Bar, progress_bar
from pds_ray.training.two_towers import TwoTowers
from pds_ray.training.workers import Workers

POLL_S = 1.0


def build_backbone(info: BackboneInfo, image_size: int) -> nn.Module:
    with process.without_collections():
        return catalog.build_backbone(info, image_size)


@dataclass(frozen=True)
class Place:
    """CPUs and GPUs of a task."""

    num_cpus: float
    num_gpus: float

    def start(self, function: Callable[..., Any], *args: Any) -> ray.ObjectRef:
        """Start `function(*args)` there; whoever waits for it tries again what is lost."""
        task = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=0)(function)
        return task.remote(*args)


def ensure_experts(experts: WantedExperts, limits: RayConfig) -> dict[str, Any]:
    """Make the experts, or epochs of them, that the store lacks; return counts of all.

    Where anything is lacking, it needs a session, and holds the store's lock. Raises UserError in
    one line for what the user can fix: experts made from anything else, files that are lost, a disk
    too small, a training that diverged.
    """
    began, store = time.monotonic(), experts.store
    store.check(experts.made_from())
    lacking = experts.missing()
    if lacking:
        store.folder.create()
        with store.folder.lock(), session.unwrapped_errors():
            store.folder.sweep()
            _make(experts, limits)
    store.require(experts.config.count, experts.config.epochs)
    return {**_counts(experts), "trained": sum(lacking.values()), "seconds": _since(began)}


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)


def _counts(experts: WantedExperts) -> dict[str, Any]:
    about = experts.store.about()
    ready = experts.store.committed(experts.store.data)
    markers = [ready[shard.name] for shard in experts.shards]
    bad: Counter[str] = sum((Counter(marker["bad"]) for marker in markers), Counter())
    weights = core.weights_of(about)
    last = [losses[-1] for losses in core.losses(experts)]
    snapshots = len(experts.names) * (experts.config.epochs + 1)
    return {
        "experts": len(experts.names),
        "epochs": experts.config.epochs,
        "images": sum(marker["images"] for marker in markers),
        "captions": sum(marker["captions"] for marker in markers),
        "bad": dict(bad),
        "weights": weights,
        "snapshot_bytes": snapshots * core.FLOAT_BYTES * sum(weights.values()),
        "mean_loss": sum(last) / len(last),
    }


def _make(experts: WantedExperts, limits: RayConfig) -> None:
    place, store = expert_place(experts), experts.store
    about = store.about()
    if not about:
        about = ray.get(place.start(core.describe_model, experts, build_backbone))
    _require_space(experts, about)
    if not store.about():
        store.begin(experts.made_from(), {**about, "source": without_secrets(experts.source.uri)})
    _prepare(experts, limits)
    if experts.frozen:
        _embed(experts, place)
    _train(experts, place)


def expert_place(experts: WantedExperts) -> Place:
    """Return what an expert takes: its CPUs, and a GPU where there are any.

    Raises ConfigError if no node has so many.
    """
    cpus, gpus = experts.config.cpus, experts.config.gpus
    if gpus is None:
        gpus = min(1.0, pools.most("GPU"))
    for kind, wish in (("CPU", cpus), ("GPU", gpus)):
        if wish > (most := pools.most(kind)):
            raise ConfigError(
                f"an expert is to have {wish:g} {kind}s, and the largest node has {most:g}; lower "
                f"--experts.{kind.lower()}s"
            )
    return Place(cpus, gpus)


def _require_space(experts: WantedExperts, about: dict[str, Any]) -> None:
    """Raise ConfigError if the disk of the store has no room for all that is lacking."""
    images = expert_data.estimate_images(experts.source, experts.shards)
    needed, free = core.needed_bytes(experts, about, images), experts.store.free_bytes()
    if free is not None and needed > free:
        weights = sum(core.weights_of(about).values())
        raise ConfigError(
            f"{experts.config.count} experts of {experts.config.epochs} epochs and {weights:,} "
            f"weights, and about {images:,} images, need {needed / 2**30:,.2f} GiB more; "
            f"{experts.store.folder.shown} has {free / 2**30:,.2f} GiB: lower --experts.count or "
            "--experts.epochs, or give another --experts.store"
        )


# ---- images and captions


def _prepare(experts: WantedExperts, limits: RayConfig) -> None:
    """Prepare the shards that the store lacks, each by a task."""
    ready = experts.store.committed(experts.store.data)
    todo = [shard for shard in experts.shards if shard.name not in ready]
    if not todo:
        return
    actors, seconds = pools.pool(limits.embed_actors), limits.sample_timeout_s
    task = ray.remote(_prepare_shard).options(
        **{**actors.options(), "num_cpus": pools.SMALL_TASK_CPUS, "max_retries": TASK_RETRIES}
    )
    with InFlight() as in_flight, progress_bar("prepare", len(todo), "shards") as bar:
        bar.follow(in_flight.reports())
        given = ray.put(experts)
        pending = [task.remote(given, shard, seconds, in_flight) for shard in todo]
        for shard, reference in zip(todo, pending, strict=True):
            _await_shard(experts, shard, reference, seconds)
            bar.update()


def _await_shard(
    experts: WantedExperts, shard: Shard, reference: ray.ObjectRef, seconds: float
) -> None:
    try:
        tasks.wait_for(reference, f"shard {shard.name}")
    except tasks.LOST as error:
        raise SourceError(
            f"an image of shard {shard.name} of {experts.source.uri} ends the process that decodes "
            f"it, takes too much memory or more than {seconds:g} s (--ray.sample-timeout-s), or "
            "its machine was lost; experts would miss the shard"
        ) from error


def _prepare_shard(
    experts: WantedExperts, shard: Shard, seconds: float, in_flight: InFlight
) -> dict[str, Any]:
    places.require_shared(experts.store.folder, "--experts.store")
    with in_flight.doing(f"the images and captions of shard {shard.name}"):
        limit = partial(process.time_limit, seconds)
        return expert_data.prepare_shard(
            experts, shard, partial(_text_encoder, experts.encoder), limit
        )


@lru_cache(maxsize=1)
def _text_encoder(info: EncoderInfo | TextEncoderInfo) -> TextEncoder:
    """Return the text encoder, loaded once per process."""
    return process.load_model(catalog.load_text_encoder, info, "fp32")


def _embed(experts: WantedExperts, place: Place) -> None:
    """Compute the features that the frozen backbone has of all images, in one task."""
    ready = experts.store.committed(experts.store.features)
    todo = [shard.name for shard in experts.shards if shard.name not in ready]
    if not todo:
        return
    with (
        InFlight() as in_flight,
        progress_bar("features", len(todo), "shards", delay_s=QUIET_S) as bar,
    ):
        bar.follow(in_flight.reports())
        tasks.retried(partial(place.start, _embed_shards, experts, todo, in_flight))
        bar.update(len(todo))


def _embed_shards(experts: WantedExperts, shards: list[str], in_flight: InFlight) -> None:
    workers = _this_worker(experts)
    with in_flight.doing("the features of the frozen backbone", "features") as doing:
        backbone = core.build_backbone(experts, 0, build_backbone).to(workers.device)
        done = experts.store.committed(experts.store.features)
        for number, shard in enumerate(shards):
            if shard not in done:
                expert_data.embed_shard(experts, shard, backbone, workers)
            doing.reach(number + 1)


# ---- training


def _train(experts: WantedExperts, place: Place) -> None:
    """Train the experts that lack epochs, as many at once as there is room for."""
    lacking = experts.missing()
    todo = [number for number, name in enumerate(experts.names) if name in lacking]
    done = experts.config.count * experts.config.epochs - sum(lacking.values())
    finished: set[str] = set()
    total = experts.config.count * experts.config.epochs
    with InFlight() as in_flight, progress_bar("experts", total, "epochs", done) as bar:
        bar.follow(in_flight.reports(finished.__contains__))
        given = ray.put(experts)
        start = {n: partial(place.start, _train_expert, given, n, in_flight) for n in todo}
        _run_all(start, lacking, finished, bar)


def _run_all(
    start: Mapping[int, Callable[[], ray.ObjectRef]],
    lacking: Mapping[str, int],
    finished: set[str],
    bar: Bar,
) -> None:
    """Run the training of experts side by side; one that is lost goes on from its last epoch."""
    pending = {begin(): (number, tasks.RetryBudget()) for number, begin in start.items()}
    try:
        while pending:
            ready, _ = ray.wait(list(pending), timeout=POLL_S)
            for reference in ready:
                number, budget = pending.pop(reference)
                try:
                    ray.get(reference)
                except tasks.LOST as error:
                    if not budget.spend(error):
                        raise
                    pending[start[number]()] = (number, budget)
                else:
                    finished.add(expert_name(number))
                    bar.update(lacking[expert_name(number)])
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _train_expert(experts: WantedExperts, number: int, in_flight: InFlight) -> None:
    places.require_shared(experts.store.folder, "--experts.store")
    name, workers = expert_name(number), _this_worker(experts)
    before = max(0, experts.store.epochs(name))
    with in_flight.doing(f"the images of expert {name}", name) as doing:
        pairs = expert_data.load_pairs(experts)
        model = new_model(experts, number, pairs.images.shape[1]).to(workers.device)

        def tell(epochs: float) -> None:
            doing.now(f"the training of expert {name}")
            doing.reach(epochs - before)

        try:
            core.train_expert(experts, number, model, pairs, workers, tell)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"expert {name} does not fit on the GPU; lower --experts.batch_size, or "
                "--experts.image_size in another --experts.store"
            ) from error


def new_model(experts: WantedExperts, number: int, features: int) -> TwoTowers:
    """Return the model that an expert starts from; of frozen backbones only the heads."""
    if experts.frozen:
        return core.build_model(experts, number, None, features)
    backbone = core.build_backbone(experts, number, build_backbone)
    width = experts.store.about()["width"]
    return core.build_model(experts, number, backbone, width)


def _this_worker(experts: WantedExperts) -> Workers:
    """Return the device of this task, and give torch the CPUs that the task asked for."""
    torch.set_num_threads(experts.config.cpus)  # convolutions round by the number of threads
    return Workers(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
