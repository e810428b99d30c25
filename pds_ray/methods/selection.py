"""Methods that choose real pairs: each of `catalog.SELECTORS` is the same list of stages with another selector."""

from __future__ import annotations

from dataclasses import asdict, replace

from pds_ray.methods.base import Method, Stage
from pds_ray.methods.pds import DECODE, EMBED, MATERIALIZE

IMAGES_TOGETHER = 256  # chosen images looked up at once: each lookup reads the shards they are in

SELECT = Stage(
    "select",
    run="pds_ray.distributed.select:select",
    depends_on=lambda run: [
        run.config.method,
        run.config.pairs,
        run.config.seed,
        asdict(run.config.select),
    ],
    files=lambda run: [run.folder.PROTOTYPES],
    options=("select",),
    unit="pairs",
    counted="prototypes",
)

SELECTION = Method(
    (EMBED, SELECT, replace(DECODE, options=("decode.image_size",)), MATERIALIZE),
    settings={"decode.decoder": "nearest", "decode.batch_size": IMAGES_TOGETHER},
)
