"""The start of an optimisation: the set that is improved.

It is made by the stages of its own method, drawn as noise, or copied from a finished run (see
docs/optimisation.md, "The start").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pds_ray import catalog
from pds_ray.config import RunConfig
from pds_ray.errors import ConfigError
from pds_ray.methods.base import Method, Run, Stage
from pds_ray.methods.pds import EMBED, MATERIALIZE
from pds_ray.methods.selection import SELECTION
from pds_ray.store.distilled_set import CARD, load_distilled


def _files_of_set(run: Run) -> dict[str, Any]:
    """Return the hashes of the files of the set that is copied, but for its card."""
    files = load_distilled(run.config.distill.init).manifest["files"]
    return {name: file["sha256"] for name, file in files.items() if name != CARD}


def _copied(run: Run) -> list[str]:
    images = run.folder.image_files(run.folder.pair_count())
    return [run.folder.PROTOTYPES, *images]


def noise_side(config: RunConfig) -> int:
    """Return the side of the experts' images in pixels: noise of another would be smoothed."""
    wish = config.experts
    return wish.image_size or catalog.describe_backbone(wish.backbone).image_size


COPY = Stage(
    "start",
    run="pds_ray.distributed.start:copy_set",
    depends_on=_files_of_set,
    files=_copied,
    unit="pairs",
    counted="pairs",
    plan="pds_ray.planning.optimisation:START",
)
NOISE = Stage(
    "decode",
    run="pds_ray.distributed.start:draw_noise",
    depends_on=lambda run: ["noise", run.config.seed, noise_side(run.config)],
    files=lambda run: run.folder.image_files(run.folder.pair_count()),
    unit="images",
    counted="images",
    plan="pds_ray.planning.optimisation:START",
)
"""Gaussian pixels at the experts' side, in the place of decoding."""

FROM_RUN = Method((EMBED, COPY, MATERIALIZE), SELECTION.card, settings=SELECTION.settings)
FROM_NOISE = SELECTION.replaced(NOISE)


def start(init: str) -> Method:
    """Return the method whose set is the start, by `distill.init`.

    What is no name of a method is taken for the folder of a finished run. Raises ConfigError for a
    method that itself improves a start.
    """
    name = catalog.STARTS.get(init, init)
    if name in catalog.DISTILLERS:
        raise ConfigError(
            f"distill.init is {init!r}, a method that improves a start itself; give the folder of "
            "a finished run of it"
        )
    if init == "noise":
        return FROM_NOISE
    return catalog.method(name) if name in catalog.METHODS else FROM_RUN


def on_start(method: Method, init: str) -> Method:
    """Return a method that improves a set, with the stages that make the set before its own."""
    begun = start(init)
    before = tuple(stage for stage in begun.stages if stage.name != MATERIALIZE.name)
    card = replace(method.card, deviations=begun.card.deviations)
    stages, settings = (*before, *method.stages), {**begun.settings, **method.settings}
    return replace(method, stages=stages, card=card, settings=settings, auto=begun.auto)
