"""Bars move with every batch of a slow model, and say what is waited for until it is loaded."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pds_ray.config import RunConfig, replace
from pds_ray.distributed.embed import fill_store
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.telemetry import progress
from pds_ray.telemetry.state import start_thread
from tests.support import slow_encoder
from tests.support.poisoned import write_shard
from tests.support.stage_run import embedding_run

pytestmark = [pytest.mark.ray, pytest.mark.long]
SAMPLES = 96


def test_embedding_moves_with_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "STALL_S", 1.5)
    write_shard(tmp_path / "0.tar", {}, samples=SAMPLES)
    config = replace(RunConfig(), {"embed.batch_size": 16, "pairs": 1})
    source = WebDatasetSource(str(tmp_path / "0.tar"))
    run = embedding_run(tmp_path / "store", source, slow_encoder.describe(), config)
    seen: list[progress.State] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            if state := progress.current():
                seen.append(state)

    looking = start_thread(look)
    counts = fill_store(run)
    ended.set()
    looking.join()
    assert counts["images"] == SAMPLES
    done = [state.done for state in seen if state.label == "embed"]
    assert done == sorted(done), "the bar went back"
    assert len(set(done) - {0, SAMPLES}) >= 3, "the bar stood still until the block arrived"
    assert done[-1] == SAMPLES
    assert any("waiting for the encoder to load" in state.note for state in seen)
    stalls = [line for line in capsys.readouterr().err.splitlines() if "nothing finished" in line]
    assert any("waiting for the encoder to load" in line for line in stalls)
    assert not any("none (" in line or line.endswith("none") for line in stalls)
