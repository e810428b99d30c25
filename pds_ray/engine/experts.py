"""`pds-ray experts`: the checks before experts are trained, and the training of those that lack."""

from __future__ import annotations

from typing import Any

from pds_ray import catalog
from pds_ray.config import ConfigError, RunConfig, replace
from pds_ray.distributed.lifetime import session_kept
from pds_ray.engine.plan import NO_SOURCE, check_enough
from pds_ray.stages.expert_data import estimate_images
from pds_ray.stages.experts import (
    LONELY,
    WantedExperts,
    describe_model,
    needed_bytes,
    want_experts,
    weights_of,
)
from pds_ray.store.storage import Folder


def make_experts(config: RunConfig) -> WantedExperts:
    """Check source, backbone, text encoder and store, and return the experts asked for.

    Nothing long starts here. Raises ConfigError, SourceError or ExpertStoreError in one line.
    """
    if not config.source:
        raise ConfigError(NO_SOURCE)
    if not config.experts.store:
        raise ConfigError("no place for the experts: give --store FOLDER")
    source = catalog.make_source(config.source, config.read)
    shards = source.shards()
    wanted = want_experts(config, source, shards, Folder(config.experts.store))
    wanted.store.check(wanted.made_from())
    check_enough(source, shards, replace(config, {"pairs": LONELY}))
    return wanted


def forecast(config: RunConfig) -> tuple[WantedExperts, dict[str, int]]:
    """Return the experts asked for, checked, and what is to be done: counts and bytes.

    The model is built here, so its weights must be on this machine.
    """
    wanted = make_experts(config)
    about = wanted.store.about() or describe_model(wanted, catalog.build_backbone)
    images = estimate_images(wanted.source, wanted.shards)
    return wanted, {
        "images": images,
        "weights": sum(weights_of(about).values()),
        "bytes": needed_bytes(wanted, about, images),
        "epochs": sum(wanted.missing().values()),
    }


@session_kept()
def experts(config: RunConfig) -> dict[str, Any]:
    """Train the experts that `experts.store` lacks; return counts of all.

    Interrupted at any instant and called again, it goes on and ends with the same bytes. More
    experts, or more epochs where the rates do not depend on their number, extend the store. Raises
    UserError in one line for what the user can fix.
    """
    wanted = make_experts(config)
    from pds_ray.distributed import session
    from pds_ray.distributed.experts import ensure_experts

    if wanted.missing():
        session.start(config.ray, wanted.store.folder.shown)
    return ensure_experts(wanted, config.ray)
