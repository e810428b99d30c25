"""An optimisation for a report: images before and after, ratios of its branches, similarity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from pyarrow import ArrowException

from pds_ray.errors import cause
from pds_ray.report.images import data_uri
from pds_ray.report.run import OpenRun
from pds_ray.report.values import Json, rounded
from pds_ray.store.distilled_set import DistilledSetError
from pds_ray.store.learned import Learned, LearnedError, LearnedFor, LearningFiles

IMAGE_LIMIT = 100
"""Pairs whose images are shown before and after."""
SIMILARITY_LIMIT = 100
"""Pairs whose similarity is shown."""
POINTS = 2_000
"""Iterations that a chart shows."""
SHOWN_AT_MOST = 0.999
"""Share of the differences that the amplified ones show in full."""
BRANCHES = ("image", "text")
SCORE = "score"
"""The column of validations, null where an iteration has none."""
UNREADABLE = (LearnedError, DistilledSetError, OSError, ArrowException, LookupError, ValueError)


def gather_learned(run: OpenRun, step: Callable[[], object]) -> tuple[Json | None, list[str]]:
    """Return the learned parts of a run's set with what they began as, and notes.

    None if the set has none; parts of it are None or empty where the run has no file for them.
    """
    distilled = run.distilled
    if distilled is None or distilled.learned is None:
        return None, []
    learned, files = distilled.learned, run.folder.learning
    notes: list[str] = []
    start, before = None, None
    try:
        after = distilled.learned_images()
        if files.folder.exists(files.START):
            start, before = _fitting(files, learned)
        history = _history(files)
    except UNREADABLE as error:
        return None, [f"How the set was learned cannot be shown ({cause(error)})."]
    images, factor = _images(before, after, learned.about)
    step()
    if before is None:
        notes.append("The set that was improved is not there: no images of before.")
    return {
        "about": {name: getattr(learned.about, name) for name in ("distiller", "backbone", "loss")},
        "parts": list(learned.parts),
        "pairs": len(learned.text),
        "images": images,
        "factor": rounded(factor),
        "history": history,
        "similarity": _similarities(start, learned),
    }, notes


def _fitting(files: LearningFiles, learned: Learned) -> tuple[Learned, np.ndarray]:
    """Return the set that was improved. Raises LearnedError if it is of another size."""
    start, images = files.start()
    if start.about.image_size != learned.about.image_size or len(images) < len(learned.text):
        raise LearnedError(f"its {files.START} is of another size")
    return start, images


def _images(
    before: np.ndarray | None, after: np.ndarray, about: LearnedFor
) -> tuple[list[Json], float]:
    """Return the first images before and after as data URIs, and by what differences are scaled.

    Differences are amplified alike, so that they can be compared: grey is none.
    """
    shown = _pixels(after[:IMAGE_LIMIT], about)
    if before is None:
        return [{"pair": pair, "result": _uri(image)} for pair, image in enumerate(shown)], 0.0
    start = _pixels(before[: len(shown)], about)
    moved = shown - start
    largest = float(np.quantile(np.abs(moved), SHOWN_AT_MOST))
    factor = 0.5 / largest if largest > 0 else 1.0
    return [
        {
            "pair": pair,
            "start": _uri(start[pair]),
            "result": _uri(shown[pair]),
            "difference": _uri(0.5 + factor * moved[pair]),
        }
        for pair in range(len(shown))
    ], factor


def _pixels(images: np.ndarray, about: LearnedFor) -> np.ndarray:
    """Return normalised images [n, 3, S, S] as pixels, of which most are in 0 to 1."""
    mean, std = (np.array(value, np.float32).reshape(3, 1, 1) for value in (about.mean, about.std))
    return images * std + mean


def _uri(pixels: np.ndarray) -> str:
    """Return pixels [3, S, S], cut to 0..1, as a data URI."""
    values = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return data_uri(Image.fromarray(values.transpose(1, 2, 0)))


def _history(files: LearningFiles) -> Json | None:
    """Return the losses over the iterations; None if nothing is known.

    They are at most POINTS iterations, and those that were validated.
    """
    if not files.folder.exists(files.HISTORY):
        return None
    table = files.history()
    every = max(1, -(-table.num_rows // POINTS))
    kept = np.arange(table.num_rows) % every == 0
    if SCORE in table.column_names:
        kept |= table.column(SCORE).is_valid().to_numpy()
    shown = table.filter(kept).to_pydict()
    iterations = shown.pop("iteration")
    columns = {name: [rounded(value) for value in values] for name, values in shown.items()}
    return {
        "iteration": iterations,
        "iterations": table.num_rows,
        "ratios": {name: columns[name] for name in BRANCHES if name in columns},
        "others": {name: value for name, value in columns.items() if name not in BRANCHES},
    }


def _similarities(start: Learned | None, learned: Learned) -> Json:
    """Return the similarity after, and before, of the first pairs; empty if none was learned."""
    if learned.similarity is None:
        return {}
    count = min(len(learned.text), SIMILARITY_LIMIT)
    before = np.eye(count) if start is None or start.similarity is None else start.similarity
    return {
        name: np.asarray(matrix[:count, :count], float).round(4).tolist()
        for name, matrix in (("before", before), ("after", learned.similarity))
    }
