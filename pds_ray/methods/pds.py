"""Prototype-guided Data Synthesis (Choi, Mo, Chae, ICLR 2026) as a list of stages.

The formulas are in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pds_ray.config import ReadConfig, changed
from pds_ray.methods.base import Method, Run, Stage
from pds_ray.store.card import CardText
from pds_ray.store.schemas import STORE_SCHEMA_VERSION

NOT_OF_IMAGES = ("model", "revision", "batch_size")
"""Options of decoding that no image depends on: the decoder's identity covers its weights."""
LATER_OF_IMAGES = (
    "candidates",
    "noise_levels",
    "image_weight",
    "text_weight",
    "real_fallback",
    "real_margin",
)
"""Options of decoding that came later and count where they are not at their default.

So earlier images stand.
"""


def _embeddings(run: Run) -> list[Any]:
    preprocess = run.encoder.preprocess
    return [
        STORE_SCHEMA_VERSION,
        [(shard.name, shard.size, shard.version) for shard in run.shards],
        _reading(run.config.read),
        run.encoder.identity,
        [preprocess.size, preprocess.interpolation, preprocess.resize_mode, preprocess.fill],
        run.config.embed.precision,
        run.config.embed.store_dtype,
    ]


def _reading(read: ReadConfig) -> dict[str, Any]:
    """Return the options of reading that embeddings depend on.

    Those that came later count where they are not at their default: so earlier stores stand.
    """
    first = {"captions": read.captions, "max_pixels": read.max_pixels, "min_side": read.min_side}
    return {**first, **changed(read)}


def _clusters(run: Run) -> list[Any]:
    config = run.config
    # above 100,000 clusters earlier versions fitted two levels: their labels must not be continued
    flat = ["flat"] if config.pairs > 100_000 else []
    options = asdict(config.cluster)
    if config.cluster.solver == "faiss":  # earlier versions had nothing else
        del options["solver"]
    return [config.pairs, config.seed, options, *flat]


def _images(run: Run) -> list[Any]:
    options = asdict(run.config.decode)
    at_default = set(LATER_OF_IMAGES).difference(changed(run.config.decode))
    for name in (*NOT_OF_IMAGES, *at_default):
        del options[name]
    if options["format"] in ("auto", "png"):  # earlier versions wrote nothing else
        del options["format"], options["quality"]
    return [run.config.seed, options, run.decoder.identity]


def judged(run: Run) -> bool:
    """Return whether images are scored before one per pair is kept.

    A decoder that looks real images up has one per pair.
    """
    return run.config.decode.judged and run.decoder.dim is not None


def _image_files(run: Run) -> list[str]:
    pairs = run.folder.pair_count()
    images = run.folder.image_files(pairs)
    return [*images, *run.folder.choice_files(pairs)] if judged(run) else images


def _captions(run: Run) -> dict[str, Any]:
    return {"nearest_to": run.config.caption.nearest_to, **changed(run.config.caption)}


EMBED = Stage(
    "embed",
    run="pds_ray.distributed.embed:embed",
    depends_on=_embeddings,
    files=None,
    options=("read", "embed"),
    unit="images",
    counted="timed",
    card=(
        ("images embedded", "images"),
        ("pairs embedded", "pairs"),
        ("bad samples", "bad"),
        ("shards not read", "failed_shards"),
    ),
    plan="pds_ray.planning.phases:EMBED",
)
PRUNE = Stage(
    "prune",
    run="pds_ray.distributed.prune:prune",
    depends_on=lambda run: asdict(run.config.prune),
    files=lambda run: run.folder.keep_files(run.shard_names),
    options=("prune",),
    unit="pairs",
    counted="pairs",
    card=(("pairs pruned", "dropped"),),
    plan="pds_ray.planning.phases:PRUNE",
)
CLUSTER = Stage(
    "cluster",
    run="pds_ray.distributed.cluster:cluster",
    depends_on=_clusters,
    files=lambda run: run.folder.cluster_files(run.config.cluster.spaces, run.shard_names),
    options=("cluster",),
    plan="pds_ray.planning.phases:CLUSTER",
)
MATCH = Stage(
    "match",
    run="pds_ray.distributed.match:match",
    depends_on=lambda run: asdict(run.config.match),
    files=lambda run: [run.folder.COUPLES],
    options=("match",),
    unit="matches",
    counted="couples",
    card=(("pairs in matched clusters", "shared_pairs"), ("empty matches", "pairless")),
    plan="pds_ray.planning.phases:MATCH",
)
PROTOTYPES = Stage(
    "prototypes",
    run="pds_ray.distributed.prototypes:make_prototypes",
    # a list where all are at their default, as it was before there were options
    depends_on=lambda run: changed(run.config.prototypes) or [],
    files=lambda run: [run.folder.PROTOTYPES],
    options=("prototypes",),
    unit="prototypes",
    counted="prototypes",
    plan="pds_ray.planning.phases:PROTOTYPES",
)
DECODE = Stage(
    "decode",
    run="pds_ray.distributed.synthesize:synthesize",
    depends_on=_images,
    files=_image_files,
    options=("decode",),
    unit="images",
    counted="made",
    card=(("distilled pairs", "images"),),
    plan="pds_ray.planning.phases:DECODE",
)
CAPTION = Stage(
    "caption",
    run="pds_ray.distributed.caption:caption",
    depends_on=_captions,
    files=lambda run: [run.folder.CAPTIONS],
    options=("caption",),
    unit="pairs",
    counted="pairs",
    plan="pds_ray.planning.phases:CAPTION",
)
MATERIALIZE = Stage(
    "materialize",
    run="pds_ray.distributed.materialize:materialize",
    # nothing where there are no extras, which came later: so earlier sets stand
    depends_on=lambda run: [run.config.extras.used] if run.config.extras.used else [],
    files=lambda run: [run.folder.SET_MANIFEST],  # which holds the hashes of the rest of the set
    options=("extras",),
    unit="pairs",
    counted="pairs",
    plan="pds_ray.planning.phases:MATERIALIZE",
)

PDS_CARD = CardText(
    making="Made with pds_ray by Prototype-guided Data Synthesis (Choi, Mo, Chae, ICLR 2026): "
    "CLIP embeddings of\nimages and captions are clustered apart, clusters are matched by the "
    "pairs they share, the shared pairs are averaged to\nprototypes, and each prototype is decoded "
    "to an image with the nearest caption as prompt.",
    verb="distilled",
    tag="dataset-distillation",
    cosine_of="the prototypes",
    limits="A distilled set keeps what is frequent and loses what is rare",
    deviations={
        ("cluster", "modality", "joint"): (
            "one k-means on both embeddings of a pair took the place of two and of the matching"
        ),
        ("cluster", "modality", "image"): (
            "one k-means on the images took the place of two and of the matching"
        ),
        ("cluster", "modality", "text"): (
            "one k-means on the captions took the place of two and of the matching"
        ),
        ("match", "filter", False): (
            "whole clusters were averaged, not only the pairs that matched ones share"
        ),
        ("decode", "condition", "caption"): "images were decoded from the captions alone",
        ("caption", "nearest_to", "picture"): (
            "a caption is the real one nearest to the finished image"
        ),
        ("caption", "nearest_to", "both"): (
            "a caption is the real one nearest to the finished image and the text prototype "
            "together"
        ),
        ("caption", "round_trip", True): (
            "a caption whose nearest image is another pair's was passed over where possible"
        ),
        ("prototypes", "center", "medoid"): (
            "a prototype is the real pair nearest to the average of the shared pairs"
        ),
    },
)

PDS = Method((EMBED, PRUNE, CLUSTER, MATCH, PROTOTYPES, DECODE, CAPTION, MATERIALIZE), PDS_CARD)
