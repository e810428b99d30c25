"""Row 6: decoding with the built-in unCLIP."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import (
    ANSWER,
    BASELINE,
    OURS,
    Check,
    Found,
    Row,
    Runs,
    Task,
    at_least,
    median,
)

SAMPLERS = "samplers"
CANDIDATES = {  # name in diffusers -> steps
    "DDIMScheduler": (15, 10, 6),
    "DPMSolverMultistepScheduler": (12, 10, 8, 6),
    "UniPCMultistepScheduler": (10, 8, 6),
}
LEVELS = 1.0  # of 255: mean difference of images that are the same except for rounding


def _config(task: Task) -> Any:
    from pds_ray import catalog
    from pds_ray.config import replace
    from pds_ray.recipes import recipe

    size = {"source": "scenes:300", "pairs": 8, "decode.steps": 2} if task.quick else {"pairs": 200}
    files = {"out": str(task.data / "run"), "ray.object_store_gib": 0.5}
    config = replace(recipe("demo"), {**size, **files})
    return catalog.method(config.method).settled(config)


def prepare(task: Task) -> Found:
    """Make the prototypes of 10,000 scenes."""
    from pds_ray.engine.run import distill

    distill(_config(task), only=("embed", "prune", "cluster", "match", "prototypes"))
    return {}


def _load(task: Task) -> tuple[Any, Any, Any]:
    """Return configuration, prototypes and the loaded decoder, which has decoded once."""
    from pds_ray import catalog
    from pds_ray.store.run_folder import RunFolder
    from pds_ray.store.storage import Folder

    config = _config(task)
    prototypes = RunFolder(Folder(config.out)).prototypes()
    info = catalog.describe_decoder(config.decode, catalog.describe_encoder(config.embed))
    decoder: Any = catalog.load_decoder(info, config.decode, catalog.make_source(config.source))
    _decode(decoder, prototypes.slice(0, 1), config)
    return config, prototypes, decoder


def _decode(decoder: Any, prototypes: Any, config: Any) -> list[Any]:
    """Decode in the batches of the engine."""
    from pds_ray.stages.synthesize import chunks, make_batch, synthesize_chunk

    images: list[Any] = []
    for chunk in chunks(prototypes.num_rows, config.decode.batch_size):
        rows = prototypes.slice(chunk.start, len(chunk))
        batch = make_batch(rows, chunk, config.seed, config.decode)
        images += synthesize_chunk(decoder, batch, config.decode)
    return images


def _timed(decoder: Any, prototypes: Any, config: Any, out: Path) -> float:
    """Return the seconds of decoding; save the images."""
    began = time.perf_counter()
    images = _decode(decoder, prototypes, config)
    seconds = time.perf_counter() - began
    np.save(out, np.stack([np.asarray(image) for image in images]))
    return seconds


def theirs(task: Task) -> Found:
    """Decode one image per call, each with the generator that ours gives it.

    The work is the same as with the global generator.
    """
    import dataclasses

    config, prototypes, decoder = _load(task)
    one = dataclasses.replace(config, decode=dataclasses.replace(config.decode, batch_size=1))
    return {"seconds": _timed(decoder, prototypes, one, task.out / "images.npy")}


def ours(task: Task) -> Found:
    config, prototypes, decoder = _load(task)
    return {"seconds": _timed(decoder, prototypes, config, task.out / "images.npy")}


def samplers(task: Task) -> Found:
    """Decode in batches, with other samplers and fewer steps. The seconds are their sum."""
    import dataclasses

    import diffusers

    times = {}
    config, prototypes, decoder = _load(task)
    published = decoder.pipeline.scheduler.config
    for name, all_steps in CANDIDATES.items():
        for steps in all_steps[: 1 if task.quick else None]:
            decoder.pipeline.scheduler = getattr(diffusers, name).from_config(published)
            decoder.config = dataclasses.replace(config.decode, steps=2 if task.quick else steps)
            label = f"{name.removesuffix('Scheduler')}-{steps}"
            times[label] = _timed(decoder, prototypes, config, task.out / f"{label}.npy")
    return {"seconds": sum(times.values()), "times": times}


def after(task: Task) -> Found:
    """Measure the distance of batched images from single ones, and judge the samplers' sets.

    Samplers are judged from the fastest on, to the first whose set is good enough.
    """
    from PIL import Image

    from benchmarks.data import judge_sets, write_set
    from pds_ray.store.run_folder import RunFolder
    from pds_ray.store.storage import Folder

    single, batched = (
        np.load(task.out / f"{side}-0" / "images.npy").astype(int) for side in (BASELINE, OURS)
    )
    prototypes = RunFolder(Folder(_config(task).out)).prototypes()
    worth: dict[str, dict[str, float]] = {}

    def judge(label: str, images: Path) -> None:
        folder = task.out / "sets" / label
        write_set(folder, prototypes, [Image.fromarray(image) for image in np.load(images)])
        worth.update(
            judge_sets({label: folder}, task.out / "judged", task.quick, "small_conv,small_mixer")
        )
        print(
            f"row 6, {label}: r_mean {worth[label]['r_mean']:.1f} ± {worth[label]['std']:.1f}",
            file=sys.stderr,
        )

    judge(OURS, task.out / f"{OURS}-0" / "images.npy")
    folder = task.out / f"{SAMPLERS}-0"
    times = json.loads((folder / ANSWER).read_text())["times"]
    for label in sorted(times, key=times.__getitem__):
        judge(label, folder / f"{label}.npy")
        if _good(label, worth):
            break
    return {"levels": float(np.abs(single - batched).mean()), "worth": worth}


def _good(label: str, worth: dict[str, dict[str, float]]) -> bool:
    """Return True if a set was judged and is within a deviation of ours."""
    return label in worth and worth[label]["r_mean"] >= worth[OURS]["r_mean"] - worth[OURS]["std"]


def checks(runs: Runs, afterwards: Found) -> list[Check]:
    worth, levels = afterwards["worth"], afterwards["levels"]
    times = {
        label: median([{"seconds": one["times"][label]} for one in runs[SAMPLERS]])
        for label in runs[SAMPLERS][0]["times"]
    }
    fastest = next((label for label in times if _good(label, worth)), None)
    found = "none within it"
    if fastest:
        ours_x, theirs_x = (median(runs[side]) / times[fastest] for side in (OURS, BASELINE))
        r_mean = worth[fastest]["r_mean"]
        found = f"{fastest}: {ours_x:.2f}x ours, {theirs_x:.2f}x theirs, r_mean {r_mean:.1f}"
    within = (
        f"r_mean {worth[OURS]['r_mean']:.1f} ± {worth[OURS]['std']:.1f} at the steps of the demo"
    )
    return [
        at_least(runs, 4),
        Check("the same images", f"{levels:.2f} of 255 levels apart", levels < LEVELS),
        Check(f"the fastest sampler within a deviation ({within})", found, None),
        Check(
            "", json.dumps({label: round(one["r_mean"], 1) for label, one in worth.items()}), None
        ),
    ]


ROW = Row(
    6,
    "decoding 200 prototypes with the demo unCLIP, 20 steps",
    "authors' procedure: one image per call",
    {BASELINE: theirs, OURS: ours, SAMPLERS: samplers},
    checks,
    prepare,
    after,
    "Decoding alone, the model loaded and used once. r_mean: protocol standard, small_conv and "
    "small_mixer, 5 seeds; samplers are judged from the fastest on, to the first that is good "
    "enough.",
)
