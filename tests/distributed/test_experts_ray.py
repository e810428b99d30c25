"""Experts on Ray are those that train one after the other, whatever happens to their processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from pds_ray import catalog
from pds_ray.config import RayConfig, RunConfig, replace
from pds_ray.distributed import experts as distributed
from pds_ray.distributed import session
from pds_ray.engine.experts import experts, make_experts
from pds_ray.errors import UserError
from pds_ray.stages import expert_data
from pds_ray.stages import experts as core
from pds_ray.store.expert_store import ExpertStore
from pds_ray.training.workers import Workers
from tests.support.tiny_experts import files

pytestmark = pytest.mark.ray


def config(store: Path, **changes: object) -> RunConfig:
    wanted = {
        "source": "scenes:60",
        "embed.encoder": "demo",
        "experts.store": str(store),
        "experts.count": 2,
        "experts.epochs": 2,
        "experts.image_size": 16,
        "experts.momentum": 0.9,
        "experts.batch_size": 16,
    }
    return replace(RunConfig(), {**wanted, **changes})


def test_two_side_by_side_are_those_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One of them is killed on the way, and goes on."""
    alone = make_experts(config(tmp_path / "alone"))
    encoder = catalog.load_text_encoder(alone.encoder, "fp32")
    torch.set_num_threads(1)
    about = core.describe_model(alone, catalog.build_backbone)
    alone.store.begin(alone.made_from(), about)
    for shard in alone.shards:
        expert_data.prepare_shard(alone, shard, lambda: encoder)
    pairs = expert_data.load_pairs(alone)
    for number in range(2):
        backbone = core.build_backbone(alone, number, catalog.build_backbone)
        model = core.build_model(alone, number, backbone, about["width"])
        core.train_expert(alone, number, model, pairs, Workers())

    wished = config(tmp_path / "ray")
    ended: list[int] = []
    killer = threading.Thread(target=kill_one, args=(tmp_path / "ray", ended), daemon=True)
    killer.start()
    counts = experts(wished)
    killer.join(timeout=5)
    assert len(ended) == 1
    assert counts["experts"] == 2
    assert counts["trained"] == 4
    assert counts["images"] == 60
    side_by_side = make_experts(wished)
    for name in side_by_side.names:
        assert files(side_by_side, name) == files(alone, name)

    def none_to_run(*_: object) -> None:
        raise AssertionError("there is nothing to do")

    monkeypatch.setattr(session, "start", none_to_run)
    monkeypatch.setattr(distributed, "_make", none_to_run)
    assert experts(wished)["trained"] == 0


def kill_one(store: Path, ended: list[int]) -> None:
    """Kill a process that trains as soon as the second expert has a snapshot; keep its number."""
    while not (store / "experts" / "001" / "000.safetensors").exists():
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "_train_expert" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            ended.append(process.pid)
            return


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ExpertStore, "free_bytes", lambda _: 1000)
    wished = config(tmp_path, **{"experts.count": 1000})
    with pytest.raises(
        UserError, match=r"1000 experts of 2 epochs .* need [\d.,]+ GiB more; .* ha"
    ):
        experts(wished)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("option", "most"), [("cpus", 2), ("gpus", 0)])
def test_more_than_a_node_has_is_refused(tmp_path: Path, option: str, most: int):
    wished = config(tmp_path, **{f"experts.{option}": 99})
    complaint = f"an expert is to have 99 {option[:-1].upper()}s, and the largest node has {most}"
    with pytest.raises(UserError, match=complaint):
        distributed.ensure_experts(make_experts(wished), RayConfig())
