"""Whitened coverage: real pairs that cover the whitened space of images and captions.

The formulas are in docs/methods.md, "Whitened coverage".
"""

from __future__ import annotations

from dataclasses import asdict

from pds_ray.methods.base import Method, Stage
from pds_ray.methods.pds import DECODE, EMBED, MATERIALIZE, PRUNE
from pds_ray.store.card import CardText

WHITEN = Stage(
    "whiten",
    run="pds_ray.distributed.whiten:whiten",
    depends_on=lambda run: asdict(run.config.whiten),
    files=lambda run: [run.folder.WHITENING],
    options=("whiten",),
    unit="pairs",
    counted="pairs",
    plan="pds_ray.planning.coverage:WHITEN",
)
COVER = Stage(
    "cover",
    run="pds_ray.distributed.cover:cover",
    depends_on=lambda run: [run.config.pairs, run.config.seed, asdict(run.config.cover)],
    files=lambda run: [run.folder.PROTOTYPES],
    options=("cover",),
    unit="pairs",
    counted="prototypes",
    card=(("images that could be chosen", "candidates"),),
    plan="pds_ray.planning.coverage:COVER",
)

COVERAGE_CARD = CardText(
    making="Made with pds_ray by choosing pairs of the source: the pairs of lowest image-caption "
    "cosine are dropped, CLIP embeddings\nof images and captions are whitened, and pairs are taken "
    "that together follow the mean of all and are near to all; no image is\nchosen twice. The "
    "prototypes are the pairs' own embeddings.",
    verb="chosen",
    tag="coreset",
    cosine_of="image and caption",
    limits="A small set leaves out most of its source",
    deviations={
        ("decode", "decoder", "unclip"): (
            "the images were decoded, each from the embedding of the chosen one, with its caption "
            "as prompt"
        ),
    },
)

COVERAGE = Method(
    (EMBED, PRUNE, WHITEN, COVER, DECODE, MATERIALIZE),
    COVERAGE_CARD,
    auto={"decode.decoder": "nearest"},
    chosen="whitened coverage: herding (Welling, 2009) in the product kernel, then greedy facility "
    "location (Nemhauser, Wolsey, Fisher, 1978), on whitened embeddings of image and caption",
)
