"""Optimisation on the cluster: the experts that it needs, then one task that improves the start.

The task leaves a state now and then; one that is lost with its process or machine goes on from it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from pds_ray import catalog
from pds_ray.config import RunConfig
from pds_ray.distributed import limits, places, process, session, tasks
from pds_ray.distributed.experts import Place, build_backbone, ensure_experts, expert_place
from pds_ray.distributed.in_flight import Doing, InFlight
from pds_ray.methods.base import Counts, Run
from pds_ray.modalities.image import encode_image
from pds_ray.sources.base import Source
from pds_ray.stages import optimise as core
from pds_ray.stages import optimise_inputs as inputs
from pds_ray.stages.experts import WantedExperts, want_experts
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import StorageError
from pds_ray.telemetry.progress import progress_bar

SAVE_S = 30.0
"""Seconds of work that a lost task costs at most."""
ITEM = "iterations"


@dataclass(frozen=True)
class Job:
    """All that the task works on. Pickles."""

    config: RunConfig
    experts: WantedExperts
    folder: RunFolder
    captions: list[str]
    """Of the pairs of the start."""
    validation: Source | None
    """The held-out source that chooses the iteration; None where the last one is taken."""


def wanted_experts(run: Run) -> WantedExperts:
    """Return the experts of a run, on the shards that are embedded."""
    shards = [shard for shard in run.shards if shard.name in run.embedded]
    return want_experts(run.config, run.source, shards, run.folder.experts)


def make_experts(run: Run) -> Counts:
    """Train the experts that are lacking; write the hashes of all that are used."""
    wanted = wanted_experts(run)
    counts = ensure_experts(wanted, run.config.ray)
    last = wanted.config.epochs + 1
    used = {
        name: [snapshot["sha256"] for snapshot in wanted.store.snapshots(name)[:last]]
        for name in wanted.names
    }
    run.folder.save_experts({"made_from": wanted.made_from(), "snapshots": used})
    return counts


def optimise(run: Run) -> Counts:
    """Improve the start, in one task; return how often, how far, and which iteration is kept."""
    job = _job(run)
    total = run.config.distill.iterations
    with (
        InFlight() as in_flight,
        progress_bar("optimise", total, "iterations") as bar,
        session.unwrapped_errors(),
    ):
        bar.follow(in_flight.reports())
        place = _place(job.experts)
        counts = tasks.retried(partial(place.start, _improve, job, in_flight))
        bar.follow(None)
        bar.update(counts["iterations"])
    return counts


def _job(run: Run) -> Job:
    config, folder = run.config, run.folder
    chosen = folder.captions() if "caption" in run.method.names else folder.prototypes()
    captions = chosen.column("caption").to_pylist()
    held_out = run.source.validation if config.distill.evaluate_every else None
    validation = catalog.make_source(held_out, config.read.files) if held_out else None
    return Job(config, wanted_experts(run), folder, captions, validation)


def _place(experts: WantedExperts) -> Place:
    """Return what the task takes: the GPU of an expert, or the threads of a model."""
    place = expert_place(experts)
    return place if place.num_gpus else Place(min(process.MODEL_THREADS, limits.cpus()), 0)


def _improve(job: Job, in_flight: InFlight) -> Counts:
    """Improve the start and write all that comes of it."""
    places.require_shared(job.folder.folder, "--out")
    began, experts = time.monotonic(), job.experts
    with in_flight.doing("the text encoder to load", ITEM) as doing:
        encoder = process.load_model(catalog.load_text_encoder, experts.encoder, "fp32")
        doing.now("the start to be prepared")
        prepared = inputs.prepare(
            job.config, experts, job.folder, job.captions, encoder, build_backbone
        )
        validate = None
        if job.validation is not None:
            doing.now("the validation split to be read")
            validate = inputs.validation(job.config, experts, job.validation, encoder, build_backbone)
        found = core.optimise(
            prepared.problem,
            catalog.distiller(job.config.method),
            prepared.start,
            saved=_state(job.folder),
            save=_States(job.folder).save,
            save_every=1,
            validate=validate,
            step=partial(_told, doing),
        )
        doing.now("the nearest captions of the source")
        _write(job, prepared, found)
    _delete_state(job.folder)
    return {**_counts(found), "seconds_of_task": round(time.monotonic() - began, 3)}


def _told(doing: Doing, done: int) -> None:
    doing.now(f"iteration {done + 1:,}")
    doing.reach(done)


class _States:
    """The state of an optimisation under way, written when it is time to."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._last = folder, float("-inf")

    def save(self, state: bytes) -> None:
        if time.monotonic() - self._last >= SAVE_S:
            self._folder.folder.write_bytes(self._folder.OPTIMISATION, state)
            self._last = time.monotonic()
