"""Methods that choose real pairs: one list of stages for every selector of `catalog.SELECTORS`."""

from __future__ import annotations

from dataclasses import asdict, replace

from pds_ray.methods.base import Method, Stage
from pds_ray.methods.pds import DECODE, EMBED, MATERIALIZE
from pds_ray.store.card import CardText

SAVED = ("decode.image_size", "decode.format", "decode.quality")
"""The options of decoding that real images have."""

SELECT = Stage(
    "select",
    run="pds_ray.distributed.select:select",
    depends_on=lambda run: [
        run.config.start,
        run.config.pairs,
        run.config.seed,
        asdict(run.config.select),
    ],
    files=lambda run: [run.folder.PROTOTYPES],
    options=("select",),
    unit="pairs",
    counted="prototypes",
    plan="pds_ray.planning.optimisation:SELECT",
)

SELECTION_CARD = CardText(
    making="Made with pds_ray by choosing pairs of the source: images and captions are real, and "
    "belong together; no\nimage is chosen twice. The prototypes are the pairs' own embeddings.",
    verb="chosen",
    tag="coreset",
    cosine_of="image and caption",
    limits="A small set leaves out most of its source",
    models=("encoder",),
)

SELECTION = Method(
    (EMBED, SELECT, replace(DECODE, options=SAVED), MATERIALIZE),
    SELECTION_CARD,
    settings={"decode.decoder": "nearest"},
)
