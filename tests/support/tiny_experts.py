"""Experts of a few hundred weights on a few scenes, with a text encoder made up."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ExpertsConfig, ReadConfig
from pds_ray.encoders.base import TextEncoderInfo
from pds_ray.sources.scenes import ScenesSource
from pds_ray.stages import expert_data
from pds_ray.stages import experts as core
from pds_ray.stages.experts import WantedExperts
from pds_ray.store.expert_store import ExpertStore
from pds_ray.store.storage import Folder
from pds_ray.training.workers import Workers
from tests.support.tiny_training import FEATURES, PIXELS, SIDE, TEXT_WIDTH, TinyBackbone

BRIEF = ExpertsConfig(count=2, epochs=3, batch_size=8, momentum=0.9)


class MadeUpEncoder:
    """Captions to vectors that a hash of the text gives."""

    dim = TEXT_WIDTH

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        def vector(caption: str) -> np.ndarray:
            seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big")
            return np.random.default_rng(seed).normal(size=self.dim)

        return np.stack(list(map(vector, captions))).astype(np.float32)


def wanted(path: Path, source: str = "scenes:20:0:0:8", **changes: Any) -> WantedExperts:
    """Return experts of the tiny backbone on the shards of a source, stored at `path`."""
    scenes = ScenesSource(source)
    return WantedExperts(
        source=scenes,
        shards=scenes.shards(),
        read=ReadConfig(),
        config=replace(BRIEF, **changes),
        seed=3,
        backbone=BackboneInfo("tiny", "tiny 1", SIDE, PIXELS.mean, PIXELS.std, pretrained=False),
        encoder=TextEncoderInfo("made-up", TEXT_WIDTH, "made-up", "made-up 1", ()),
        store=ExpertStore(Folder(str(path))),
    )


def build(_info: BackboneInfo, _image_size: int) -> nn.Module:
    return TinyBackbone()


def begin(experts: WantedExperts) -> None:
    """Write the manifest, and prepare all shards, one after the other."""
    experts.store.begin(experts.made_from(), core.describe_model(experts, build))
    backbone = core.build_backbone(experts, 0, build)
    for shard in experts.shards:
        expert_data.prepare_shard(experts, shard, MadeUpEncoder)
        if experts.frozen:
            expert_data.embed_shard(experts, shard.name, backbone, Workers())


def train(experts: WantedExperts, number: int, tell: core.Tell = lambda _: None) -> None:
    """Train one expert in this process."""
    torch.set_num_threads(1)
    backbone = None if experts.frozen else core.build_backbone(experts, number, build)
    model = core.build_model(experts, number, backbone, FEATURES)
    core.train_expert(experts, number, model, expert_data.load_pairs(experts), Workers(), tell)


def files(experts: WantedExperts, name: str) -> dict[str, bytes]:
    """Return the snapshots and the manifest of an expert.

    A process that is killed while it writes leaves its temporary file, which nothing reads.
    """
    folder = Path(experts.store.expert(name).path)
    names = (path for path in folder.iterdir() if path.name != "state.safetensors")
    return {path.name: path.read_bytes() for path in sorted(names) if path.suffix != ".part"}
