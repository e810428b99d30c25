"""What a run says: a person's lines, or objects that a machine can read."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from pds_ray.telemetry import log, progress


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_json", True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    yield
    assert progress.current() is None


def events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_person_reads_the_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with log.context(run="runs/x"):
        log.event("shard_committed", shard="00000", images=5)
        log.event("failed", "pds-ray: no source", "error", exit_code=2)
    assert capsys.readouterr().err == "pds-ray: no source\n"


@pytest.mark.usefixtures("as_json")
def test_a_machine_reads_objects_with_their_context(capsys: pytest.CaptureFixture[str]) -> None:
    with log.context(run="runs/x"):
        with log.context(stage="embed"):
            log.event("shard_failed", level="warning", shard="00001", reason="line\nbreak")
        log.event("done", "said\tso")
    log.event("after")
    first, second, third = events(capsys.readouterr().err)
    assert {**first, "time": ""} == {
        "time": "", "level": "warning", "event": "shard_failed", "run": "runs/x", "stage": "embed", "shard": "00001",
        "reason": "line\nbreak",
    }  # fmt: skip
    assert (second["run"], second.get("stage"), second["message"]) == ("runs/x", None, "said\tso")
    assert third.keys() == {"time", "level", "event"}
    assert first["time"].endswith("+00:00")


@pytest.mark.usefixtures("as_json", "quick")
def test_bars_become_events(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("embed", 300, "images", done=100) as bar:
        for _ in range(4):
            bar.set_postfix_str("2 bad", refresh=False)
            bar.update(50)
        state = progress.current()
    assert state is not None
    assert (state.label, state.unit, state.done, state.total, state.note) == (
        "embed",
        "images",
        300,
        300,
        "2 bad",
    )
    said = events(capsys.readouterr().err)
    assert all(event["event"] == "progress" and event["label"] == "embed" for event in said)
    done = [event["done"] for event in said]
    assert done == sorted(done)
    assert (done[-1], said[-1]["total"], said[-1]["eta_s"], said[-1]["note"]) == (
        300,
        300,
        0,
        "2 bad",
    )
    assert said[-1]["per_s"] > 0


def test_the_rate_is_of_this_sitting_and_the_rest_takes_its_time() -> None:
    import time

    with progress.progress_bar("embed", 1000, "images", done=900) as bar:
        before = progress.current()
        began = time.monotonic()
        time.sleep(0.2)
        bar.update(20)
        state, elapsed = progress.current(), time.monotonic() - began
    assert before is not None
    assert state is not None
    assert (before.per_s, before.eta_s) == (None, None)
    assert state.per_s == pytest.approx(20 / elapsed, rel=0.2)
    assert state.eta_s == pytest.approx(80 / state.per_s, rel=0.1, abs=0.1)
