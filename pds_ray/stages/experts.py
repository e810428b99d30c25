"""Experts: models trained on all images of a source, whose weights are kept after every epoch.

A training visits every image once per epoch, with one of its captions, drawn afresh. The published
code has a row per caption, so that its epochs are as many times longer as images have captions; but
then the captions of one image stand in one batch as each other's negatives (docs/methods.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pds_ray import catalog
from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import (
    ConfigError,
    ExpertsConfig,
    ProtocolConfig,
    ReadConfig,
    RunConfig,
    changed,
)
from pds_ray.encoders.base import EncoderInfo, TextEncoderInfo
from pds_ray.modalities.image import Preprocess
from pds_ray.sources.base import Shard, Source
from pds_ray.stages.trial import Build, feature_width
from pds_ray.store.expert_store import ExpertStore, expert_name
from pds_ray.store.flat import Layout, Snapshot, check_matchable
from pds_ray.store.manifest import fingerprint
from pds_ray.store.storage import Folder
from pds_ray.training import loop
from pds_ray.training.data import Pixels, TrainingPairs
from pds_ray.training.loop import seed_of
from pds_ray.training.lora import adapt
from pds_ray.training.retrieval import (
    RetrievalTraining,
    make_optimizer,
    train_two_towers,
)
from pds_ray.training.two_towers import TwoTowers
from pds_ray.training.workers import Workers

SCHEMA_VERSION = 1
FREE = ("store", "count", "epochs", "rank", "schedule", "cpus", "gpus")
"""Options that no snapshot depends on, or that `made_from` treats by themselves."""
FLOAT_BYTES = 4
STATES = 2
"""Snapshots that the state of an expert takes at most: its weights, and as many momenta."""
LONELY = 2  # an image needs another to differ from

Tell = Callable[[float], object]


@dataclass(frozen=True)
class WantedExperts:
    """The experts asked for, and all that they are made from."""

    source: Source
    shards: list[Shard]
    read: ReadConfig
    config: ExpertsConfig
    seed: int
    backbone: BackboneInfo
    encoder: EncoderInfo | TextEncoderInfo
    store: ExpertStore

    @property
    def names(self) -> list[str]:
        """The names of the experts, in order."""
        return [expert_name(number) for number in range(self.config.count)]

    @property
    def frozen(self) -> bool:
        """True if the backbone keeps its weights, so that its features stand for the images."""
        return self.config.train == "heads"

    @property
    def square(self) -> Preprocess:
        """The rule by which images become squares of the training size."""
        return Preprocess(self.config.image_size or self.backbone.image_size, resize_mode="squash")

    @property
    def pixels(self) -> Pixels:
        """The normalisation that the backbone was made for."""
        return Pixels(self.backbone.mean, self.backbone.std)

    @property
    def protocol(self) -> ProtocolConfig:
        """The training of an expert as a protocol of evaluations has it."""
        config = self.config
        return ProtocolConfig(
            train="backbone" if config.train == "lora" else config.train,
            augment=config.augment,
            optimizer="sgd",
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            schedule=config.schedule,
            epochs=config.epochs,
            batch_size=config.batch_size,
            captions_per_image="all",
        )

    def made_from(self) -> dict[str, Any]:
        """Return all that a snapshot depends on, as JSON values; count and epochs are no part.

        The number of epochs is one where the rates depend on it.
        """
        config = dataclasses.asdict(self.config)
        shards = [(shard.name, shard.size, shard.version) for shard in self.shards]
        return {
            "schema": SCHEMA_VERSION,
            "source": fingerprint(shards),
            "reading": changed(self.read),
            **{name: value for name, value in config.items() if name not in FREE},
            "backbone": self.backbone.identity,
            "text_encoder": self.encoder.identity,
            "image_size": self.square.size,
            "seed": self.seed,
            **({"rank": config["rank"]} if config["train"] == "lora" else {}),
            "schedule": config["schedule"],
            **({"epochs": config["epochs"]} if config["schedule"] != "constant" else {}),
        }

    def missing(self) -> dict[str, int]:
        """Return the experts that lack epochs, and how many."""
        there = {name: max(0, self.store.epochs(name)) for name in self.names}
        lacking = {name: self.config.epochs - epochs for name, epochs in there.items()}
        return {name: epochs for name, epochs in lacking.items() if epochs > 0}


def want_experts(
    config: RunConfig, source: Source, shards: list[Shard], place: Folder
) -> WantedExperts:
    """Return the experts that a configuration asks for, on some shards of its source.

    They are stored in `place` unless `experts.store` names a folder that runs share. Raises
    ConfigError in one line for an unknown backbone or text encoder, or missing weights.
    """
    wish = config.experts
    name = config.embed.encoder if wish.text_encoder == "auto" else wish.text_encoder
    return WantedExperts(
        source=source,
        shards=shards,
        read=config.read,
        config=wish,
        seed=wish.seed,
        backbone=catalog.describe_backbone(wish.backbone),
        encoder=catalog.describe_text_encoder(name),
        store=ExpertStore(Folder(wish.store) if wish.store else place),
    )


# ---- models


def build_backbone(experts: WantedExperts, number: int, build: Build) -> nn.Module:
    """Return the backbone that the number-th expert starts from; `build` makes it.

    Random weights are its own, unless all experts start alike or keep them: adapters of one base
    say nothing about another.
    """
    same = experts.config.train in ("heads", "lora") or experts.config.shared_start
    torch.manual_seed(seed_of(experts.seed, "expert backbone", "all" if same else number))
    return build(experts.backbone, experts.square.size)


def build_model(
    experts: WantedExperts, number: int, backbone: nn.Module | None, width: int
) -> TwoTowers:
    """Return the model that the number-th expert starts from.

    `width` is that of the backbone's features; without a backbone the model takes these features.
    Adapters are put on the backbone in place, and all experts start with the same. Raises
    ConfigError if it takes none.
    """
    if experts.config.train == "lora" and backbone is not None:
        adapt(backbone, experts.config.rank, experts.seed)
    start = "all" if experts.config.shared_start else number
    torch.manual_seed(seed_of(experts.seed, "expert heads", start))
    with_head = experts.config.train in ("all", "heads")
    model = TwoTowers(backbone, width, experts.encoder.dim, with_head)
    if experts.frozen and backbone is not None:
        backbone.requires_grad_(requires_grad=False)
    return model


def take_snapshot(layout: Layout, model: nn.Module) -> Snapshot:
    """Return a copy of the weights that are trained, float32 on the CPU.

    A copy: on a CPU `.detach().cpu()` would be the live weights, and all snapshots the last one.
    """
    flat = layout.flatten(model)
    return Snapshot(flat.theta.to("cpu", torch.float32), flat.phi.to("cpu", torch.float32))


def describe_model(experts: WantedExperts, build: Build) -> dict[str, Any]:
    """Build the model of the first expert; return its widths and the layout of its weights.

    Raises ConfigError for a backbone that takes no adapters where these are trained, and for one
    whose features depend on more than its parameters.
    """
    backbone = build_backbone(experts, 0, build)
    width = feature_width(backbone, experts.square.size)
    model = build_model(experts, 0, backbone, width)
    if not experts.frozen:
        check_matchable(backbone, experts.backbone.name)
    return {
        "width": width,
        "text_width": experts.encoder.dim,
        "layout": Layout.of(model).to_json(),
    }


def weights_of(about: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of trained weights of each branch, of what `describe_model` returned."""
    return dict(zip(("image", "text"), Layout.from_json(about["layout"]).sizes, strict=True))


def needed_bytes(experts: WantedExperts, about: Mapping[str, Any], images: int) -> int:
    """Return the bytes that are still to be written for some images and the missing snapshots.

    N experts of M epochs and P weights take N (M + 1) P 4 bytes, and each its state.
    """
    snapshot = FLOAT_BYTES * sum(weights_of(about).values())
    lacking = experts.missing()
    begun = sum(experts.store.epochs(name) >= 0 for name in lacking)
    snapshots = sum(lacking.values()) + (1 + STATES) * (len(lacking) - begun)
    of_image = 3 * experts.square.size**2
    if experts.frozen:
        of_image += FLOAT_BYTES * about["width"]
    ready = sum(marker["images"] for marker in experts.store.committed(experts.store.data).values())
    return snapshots * snapshot + of_image * max(0, images - ready)


# ---- training


def train_expert(
    experts: WantedExperts,
    number: int,
    model: TwoTowers,
    pairs: TrainingPairs,
    workers: Workers,
    tell: Tell = lambda _epochs: None,
) -> None:
    """Train the number-th expert from where it was left to its last epoch.

    `model` is what `build_model` returned, on the worker's device. Interrupted at any instant and
    called again, it leaves the same bytes. `tell` is called before each step with the epochs done.
    Raises ConfigError if the loss or a weight is not finite: the snapshots before that stay.
    """
    name, store = expert_name(number), experts.store
    layout = Layout.of(model)
    optimizer = _optimizer(experts, model, layout)
    snapshots = _restore(store.state(name), model, optimizer)

    def keep(epoch: int, loss: float | None) -> None:
        snapshot = take_snapshot(layout, model)
        if loss is not None:
            _require_finite(name, epoch, snapshot, loss)
        sha256 = store.save_snapshot(name, epoch, layout, snapshot)
        snapshots.append({"epoch": epoch, "sha256": sha256, "loss": loss})
        # the state comes before the manifest, and both after the snapshot: what any of them says is
        # there; and the state alone decides where a training goes on
        store.save_state(name, loop.save_state(model, optimizer, {"snapshots": snapshots}))
        store.save_snapshots(name, snapshots)

    if snapshots:
        store.save_snapshots(name, snapshots)
    else:
        keep(0, None)
    seed = seed_of(experts.seed, "expert", number)
    training = RetrievalTraining(pairs, experts.pixels, experts.protocol, seed, workers)
    epochs = range(len(snapshots) - 1, experts.config.epochs)
    train_two_towers(
        model, optimizer, training, epochs, lambda e, loss: keep(e + 1, float(loss)), tell
    )


def _restore(
    state: bytes, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Bring model and optimizer to a state and return its snapshots.

    Without a state, with a damaged one, or one of another model, there are none.
    """
    snapshots = (loop.read_progress(state) or {}).get("snapshots")
    return snapshots if snapshots and loop.load_state(state, model, optimizer) else []


def _optimizer(experts: WantedExperts, model: nn.Module, layout: Layout) -> torch.optim.Optimizer:
    weights, text_rate = dict(model.named_parameters()), experts.config.text_learning_rate
    image, text = ([weights[e.name] for e in branch] for branch in (layout.image, layout.text))
    groups: list[dict[str, Any]] = [{"params": image}, {"params": text, "lr": text_rate}]
    return make_optimizer(groups, experts.protocol)


def _require_finite(name: str, epoch: int, snapshot: Snapshot, loss: float) -> None:
    weights = (snapshot.theta, snapshot.phi)
    if not math.isfinite(loss) or not all(bool(flat.isfinite().all()) for flat in weights):
        raise ConfigError(
            f"expert {name} diverged in epoch {epoch}: its loss or a weight is not finite; lower "
            "--experts.learning_rate or --experts.text_learning_rate, in another --experts.store"
        )


def losses(experts: WantedExperts) -> Iterator[list[float]]:
    """Yield the losses of the last step of each epoch, of one expert after the other."""
    for name in experts.names:
        snapshots = experts.store.snapshots(name)[1 : experts.config.epochs + 1]
        yield [snapshot["loss"] for snapshot in snapshots]
