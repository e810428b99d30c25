"""The checks before a set is optimised, and the values that its options stand for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pds_ray import catalog
from pds_ray.config import ConfigError, DistillConfig, RunConfig
from pds_ray.config import replace as configure
from pds_ray.errors import without_secrets
from pds_ray.methods.base import Run
from pds_ray.store.manifest import fingerprint
from pds_ray.store.storage import Folder

if TYPE_CHECKING:
    from pds_ray.stages.experts import WantedExperts


def with_own_values(config: RunConfig) -> RunConfig:
    """Return the configuration with a distiller's own values where options leave them to it.

    An option that a distiller may set and has no value for is not read by it, and put at its
    default, so that nothing depends on it. A distiller that moves a part of the model alone has
    experts that train this part.
    """
    if config.method not in catalog.DISTILLERS:
        return config
    from pds_ray.distillers.base import may_set, settled

    distiller = catalog.distiller(config.method)
    plain, unread = DistillConfig(), may_set() - distiller.DEFAULTS.keys()
    read = dataclasses.replace(config.distill, **{name: getattr(plain, name) for name in unread})
    part = {} if distiller.TRAIN == "all" else {"experts.train": distiller.TRAIN}
    return configure(config, {"distill": settled(read, distiller.DEFAULTS), **part})


def check_optimisation(run: Run) -> None:
    """Raise ConfigError or ExpertStoreError in one line if a set cannot be optimised as asked for.

    Runs of other methods pass. Nothing long is done here.
    """
    config = run.config
    if config.method not in catalog.DISTILLERS:
        return
    if config.budget:
        raise ConfigError(
            f"--budget counts bytes of images and captions, and method {config.method} trains on "
            "pixels and text vectors that are no files of the kind; give --pairs"
        )
    if not config.start:
        _check_start(run)
    _check_epochs(config)
    _check_similarity(config.distill)
    _check_anchor(config.distill)
    _check_validation(run)
    _check_store(run)


def experts_key(run: Run) -> str:
    """Return a hash of all that the experts of a run are made from: runs of one key share them."""
    return fingerprint(_wanted(run).made_from())


def _check_store(run: Run) -> None:
    """Raise ExpertStoreError if the store holds experts made from anything else.

    Experts see the shards that are embedded, which may be fewer than the source has; of a store of
    the same source these are compared when it is known which they are.
    """
    wanted = _wanted(run)
    made_from, about = wanted.made_from(), wanted.store.about()
    if about.get("source") == without_secrets(run.source.uri):
        made_from["source"] = about["made_from"].get("source")
    wanted.store.check(made_from)


def _wanted(run: Run) -> WantedExperts:
    from pds_ray.stages.experts import want_experts

    return want_experts(run.config, run.source, run.shards, run.folder.experts)


def _check_start(run: Run) -> None:
    from pds_ray.stages.start import check_set

    init = run.config.distill.init
    if Folder(init).place == run.folder.folder.place:
        raise ConfigError(
            f"distill.init is {init!r}, the run folder itself; give the folder of another run"
        )
    check_set(run.config, run.encoder)


def _check_epochs(config: RunConfig) -> None:
    """Raise ConfigError if experts are trained for less than what is matched."""
    wish = config.distill
    last = wish.max_start - 1 + wish.expert_epochs
    if last > config.experts.epochs:
        raise ConfigError(
            f"the student starts after up to {wish.max_start - 1} epochs and its target is "
            f"{wish.expert_epochs} later, but experts have {config.experts.epochs} epochs; give "
            f"--experts.epochs {last}, or lower --distill.max-start"
        )


def _check_similarity(wish: DistillConfig) -> None:
    """Raise ConfigError if a similarity is to be learned that the loss does not depend on."""
    if wish.loss == "info_nce" and wish.similarity in ("full", "low_rank"):
        raise ConfigError(
            f"--distill.similarity {wish.similarity} learns nothing with --distill.loss info_nce, "
            "which takes no similarity; give --distill.loss wbce, soft_wbce or ence"
        )


def _check_anchor(wish: DistillConfig) -> None:
    """Raise ConfigError if steps down the anchor alone lead ever farther from the start.

    A step of momentum m and rate r down eta |X - X0|^2 converges for 2 r eta < 2 (1 + m).
    """
    if wish.image_rate * wish.anchor >= 1 + wish.momentum:
        most = (1 + wish.momentum) / wish.image_rate
        raise ConfigError(
            f"--distill.anchor {wish.anchor:g} throws pixels past the start, ever farther, at "
            f"--distill.image-rate {wish.image_rate:g}; give an anchor far below {most:.2g}, or a "
            "lower rate"
        )


def _check_validation(run: Run) -> None:
    if run.config.distill.evaluate_every and not run.source.validation:
        raise ConfigError(
            f"no validation split is known for {run.config.source}, which --distill.evaluate-every "
            "needs; give 0, and the last iteration is kept"
        )
