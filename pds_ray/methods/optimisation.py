"""Methods that improve a set by optimisation: one list of stages for every distiller.

The stages that make the start come before them (`methods.start`). The formulas are in
docs/optimisation.md.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pds_ray import catalog
from pds_ray.config import FREE_FIELDS
from pds_ray.methods.base import Method, Run, Stage
from pds_ray.methods.pds import MATERIALIZE
from pds_ray.store.card import CardText


def _experts(run: Run) -> list[Any]:
    """Return what experts depend on besides the source: options and models.

    Their weights themselves are listed in the file that the stage leaves.
    """
    wish = run.config.experts
    options = {f"experts.{name}": value for name, value in asdict(wish).items()}
    kept = {name: value for name, value in options.items() if name not in FREE_FIELDS}
    return [kept, *_models(run)]


def _models(run: Run) -> list[str]:
    """Return the identities of the backbone and of the text encoder of the experts."""
    wish = run.config.experts
    encoder = run.encoder.name if wish.text_encoder == "auto" else wish.text_encoder
    backbone = catalog.describe_backbone(wish.backbone)
    return [backbone.identity, catalog.describe_text_encoder(encoder).identity]


def _optimised(run: Run) -> list[Any]:
    config = run.config
    options = asdict(config.distill)
    del options["init"]  # the stages of the start depend on it
    return [config.method, config.seed, options, _validation(run)]


def _validation(run: Run) -> list[Any]:
    """Return the shards that choose the iteration; none where the last one is taken."""
    uri = run.source.validation
    if not run.config.distill.evaluate_every or not uri:
        return []
    shards = catalog.make_source(uri, run.config.read.files).shards()
    return [(shard.name, shard.size, shard.version) for shard in shards]


def _learned(run: Run) -> list[str]:
    folder, files = run.folder.of_learned(), run.folder.learning
    names = [files.START, files.RESULT, files.HISTORY, files.CAPTIONS]
    return [*names, *folder.image_files(folder.pair_count())]


EXPERTS = Stage(
    "experts",
    run="pds_ray.distributed.optimise:make_experts",
    depends_on=_experts,
    files=lambda run: [run.folder.EXPERTS],
    options=("experts",),
    unit="epochs",
    counted="trained",
    card=(("experts", "experts"), ("epochs of each expert", "epochs")),
    plan="pds_ray.planning.optimisation:EXPERTS",
)
OPTIMISE = Stage(
    "optimise",
    run="pds_ray.distributed.optimise:optimise",
    depends_on=_optimised,
    files=_learned,
    options=("distill",),
    unit="iterations",
    counted="iterations",
    card=(("iterations", "iterations"), ("iteration kept", "kept")),
    plan="pds_ray.planning.optimisation:OPTIMISE",
)

OPTIMISATION_CARD = CardText(
    making="Made with pds_ray by optimisation: the images and the text vectors of a set were "
    "changed by gradient descent until models\nthat train on it move as models do that were "
    "trained on the whole source.",
    verb="learned",
    tag="dataset-distillation",
    cosine_of="the prototypes of the start",
    limits="A learned set fits best the backbone and the text encoder that it was learned with",
)

OPTIMISATION = Method((EXPERTS, OPTIMISE, MATERIALIZE), OPTIMISATION_CARD)
