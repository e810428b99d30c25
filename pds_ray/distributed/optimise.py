"""Optimisation on the cluster: the experts that it needs, then one task that improves the start.

The task leaves a state now and then; one that is lost with its process or machine goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from pds_ray import catalog
from pds_ray.config import RunConfig
from pds_ray.distillers.base import Distiller, Problem, Step, Variables
from pds_ray.distributed import places, pools, process, session, tasks
from pds_ray.distributed.experts import Place, build_backbone, ensure_experts, expert_place
from pds_ray.distributed.in_flight import Doing, InFlight
from pds_ray.encoders.base import TextEncoder
from pds_ray.errors import UserError
from pds_ray.methods.base import Counts, Run
from pds_ray.modalities.image import encode_image
from pds_ray.sources.base import Source
from pds_ray.stages import optimise as core
from pds_ray.stages import optimise_inputs as inputs
from pds_ray.stages.experts import WantedExperts, want_experts
from pds_ray.stages.learned import nearest_captions
from pds_ray.store.distilled_set import load_distilled
from pds_ray.store.learned import Learned
from pds_ray.store.manifest import fingerprint
from pds_ray.store.run_folder import RunFolder
from pds_ray.telemetry.progress import progress_bar

SAVE_EVERY = 25
"""Iterations that a lost task costs at most."""
ITEM = "iterations"


@dataclass(frozen=True)
class Job:
    """All that the task works on. Pickles."""

    config: RunConfig
    experts: WantedExperts
    folder: RunFolder
    captions: list[str]
    """One per pair of the start."""
    validation: Source | None
    """The held-out source that chooses the iteration; None where the last one is taken."""
    begun: tuple[Learned, np.ndarray] | None = None
    """Learned parts of the set that is the start, and their images, if there are any."""


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
    """Improve the start in one task; return how often, how far, and which iteration is kept."""
    _keep_state_alike(run)
    job, total = _job(run), run.config.distill.iterations
    with (
        InFlight() as in_flight,
        progress_bar("optimise", total, "iterations") as bar,
        session.unwrapped_errors(),
    ):
        bar.follow(in_flight.reports())
        counts: Counts = tasks.retried(partial(_place(job.experts).start, _improve, job, in_flight))
        bar.follow(None)
        bar.update(counts["iterations"])
    run.folder.folder.delete(run.folder.OPTIMISATION)
    return counts


def _keep_state_alike(run: Run) -> None:
    """Delete the state of an optimisation of another configuration, start or experts."""
    before = run.method.stages[1 : run.method.names.index("optimise")]
    hashes = [run.folder.hashes(stage.name) for stage in before]
    wanted = fingerprint(run.fingerprints["optimise"], *hashes)
    if run.manifest.data.get("optimisation") != wanted:
        run.folder.folder.delete(run.folder.OPTIMISATION)
        run.folder.of_learned().images.delete_all()
        run.manifest.update(optimisation=wanted)


def _job(run: Run) -> Job:
    config, folder = run.config, run.folder
    chosen = folder.captions() if "caption" in run.method.names else folder.prototype_facts()
    captions = chosen.column("caption").to_pylist()
    held_out = run.source.validation if config.distill.evaluate_every else None
    validation = catalog.make_source(held_out, config.read.files) if held_out else None
    return Job(config, wanted_experts(run), folder, captions, validation, _begun(config))


def _begun(config: RunConfig) -> tuple[Learned, np.ndarray] | None:
    """Return what was learned already of a start that is a finished set."""
    start = None if config.start else load_distilled(config.distill.init)
    if start is None or start.learned is None:
        return None
    return start.learned, start.learned_images()


def _place(experts: WantedExperts) -> Place:
    """Return what the task takes: a GPU as an expert does, or the threads of a model."""
    place = expert_place(experts)
    return place if place.num_gpus else Place(min(process.MODEL_THREADS, pools.most("CPU")), 0)


def _improve(job: Job, in_flight: InFlight) -> Counts:
    """Improve the start and write all that comes of it. Raises UserError if a GPU is too small."""
    try:
        return _improved(job, in_flight)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the optimisation does not fit on the GPU; lower --distill.batch-size, or take "
            "--distill.gradient adjoint if it is unrolled"
        ) from error


def _improved(job: Job, in_flight: InFlight) -> Counts:
    places.require_shared(job.folder.folder, "--out")
    config, experts, folder = job.config, job.experts, job.folder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with in_flight.doing("the text encoder to load", ITEM) as doing:
        encoder = process.load_model(catalog.load_text_encoder, experts.encoder, "fp32")
        doing.now("the start to be prepared")
        prepared = inputs.prepare(
            config, experts, folder, job.captions, encoder, build_backbone, device, job.begun
        )
        doing.now("the validation split to be read")
        found = core.optimise(
            prepared.problem,
            _watched(catalog.distiller(config.method), doing),
            prepared.start,
            saved=_state(folder),
            save=partial(folder.folder.write_bytes, folder.OPTIMISATION),
            save_every=SAVE_EVERY,
            validate=_validation(job, prepared, encoder),
            step=doing.reach,
        )
        doing.now("the captions nearest to the text vectors")
        _write(job, prepared, found)
    return _counts(found)


def _watched(distiller: Distiller, doing: Doing) -> Distiller:
    """Return a distiller that reports each iteration with its losses, such as both ratios."""

    def step(problem: Problem, variables: Variables, iteration: int) -> Step:
        found = distiller.step(problem, variables, iteration)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in found.losses.items())
        doing.now(f"iteration {iteration + 1:,} ({losses})")
        return found

    parts = {"TRAIN": distiller.TRAIN, "DEFAULTS": distiller.DEFAULTS}
    return cast("Distiller", SimpleNamespace(**parts, variables=distiller.variables, step=step))


def _state(folder: RunFolder) -> bytes | None:
    """Return the state that an earlier task left, if one did."""
    there = folder.folder.exists(folder.OPTIMISATION)
    return folder.folder.read_bytes(folder.OPTIMISATION) if there else None


def _validation(job: Job, prepared: inputs.Prepared, encoder: TextEncoder) -> core.Validate | None:
    if job.validation is None:
        return None
    gallery = inputs.held_out(job.config, job.experts, job.validation, encoder)
    return inputs.validation(job.config, job.experts, gallery, prepared.about, build_backbone)


def _write(job: Job, prepared: inputs.Prepared, found: core.Optimised) -> None:
    """Write start and result, history, images for people, and the nearest captions."""
    folder, about = job.folder, prepared.about
    start = vars(prepared.start).items()
    tensors = {name: value.cpu() for name, value in start if value is not None}
    folder.learning.save_start(*inputs.learned(about, tensors))
    result, images = inputs.learned(about, found.tensors)
    pictures, decode = folder.of_learned(), job.config.decode
    # starts that are not decoded leave the format open
    format = "png" if decode.format == "auto" else decode.format
    for pair, pixels in enumerate(images):
        data = encode_image(inputs.as_image(pixels, about), format, decode.quality)
        pictures.images.write_bytes(pictures.image_name(pair), data)
    folder.learning.save_history(_history(found.history))
    folder.learning.save_captions(nearest_captions(result.text, _captions(job.experts)))
    folder.learning.save_result(result, images)


def _history(rows: list[dict[str, float]]) -> pa.Table:
    """Return a row per iteration, null where one has no such entry."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "iteration"))
    columns: dict[str, Any] = {
        "iteration": pa.array([int(row["iteration"]) for row in rows], pa.int64())
    }
    columns |= {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in names}
    return pa.table(columns)


def _captions(experts: WantedExperts) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield the captions of the source with their vectors, one shard after the other."""
    store = experts.store
    for shard in experts.shards:
        yield store.captions(shard.name), store.read(store.data, shard.name)["text"].numpy()


def _counts(found: core.Optimised) -> Counts:
    last, done = found.history[-1], int(found.history[-1]["iteration"])
    ratios = {f"{name}_ratio": last[name] for name in ("image", "text") if name in last}
    scores = [row["score"] for row in found.history if "score" in row]
    best = {"score_of_start": scores[0], "score": max(scores)} if scores else {}
    return {"iterations": done, "kept": found.iteration, **ratios, **best}
