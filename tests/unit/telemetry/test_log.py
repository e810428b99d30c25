"""Events of a run: lines for a person, or objects that a machine can read."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from pds_ray.telemetry import log, progress
from pds_ray.telemetry.state import start_thread


@pytest.fixture
def as_json() -> Iterator[None]:
    with log.as_json():
        yield


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
        "time": "",
        "level": "warning",
        "event": "shard_failed",
        "run": "runs/x",
        "stage": "embed",
        "shard": "00001",
        "reason": "line\nbreak",
    }
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


def test_the_rate_is_of_this_session_and_gives_the_time_to_go() -> None:
    with progress.progress_bar("embed", 1_000_000, "images", done=900_000) as bar:
        before = progress.current()
        bar.start_t -= 1000  # as if it had been open for so long
        bar.update(20_000)
        state = progress.current()
    assert before is not None
    assert state is not None
    assert (before.per_s, before.eta_s) == (None, None)
    assert state.per_s == pytest.approx(20, rel=0.1)
    assert state.eta_s == pytest.approx(80_000 / state.per_s, abs=0.1)


def test_two_runs_of_one_process_do_not_mix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a thread: its own fields, form, bar and watchdog; its own threads share them."""
    monkeypatch.setattr(progress, "STALL_S", 0.01)
    together, seen, errors = threading.Barrier(2, timeout=60), {}, []

    def run(name: str, as_json: bool) -> None:
        try:
            asked, beaten, asks = threading.Event(), threading.Event(), []

            def describe() -> str:
                asks.append(name)
                if len(asks) == 2:  # so the line with the first answer is written
                    asked.set()
                return f"shard of {name}"

            def beat() -> None:
                asked.wait(60)
                log.event("beat", f"beat of {name}")
                seen[name] = progress.current()
                beaten.set()

            with log.as_json(as_json), log.context(run=name):
                start_thread(beat)  # before there is a bar, as the heartbeat is
                together.wait()
                with progress.progress_bar(name, 10, "images") as bar:
                    together.wait()
                    bar.update(len(name))
                    progress.waiting_for(describe)
                    assert asked.wait(60)
                    assert beaten.wait(60)
                    together.wait()
                assert progress.current() is None
                log.event("ended", f"end of {name}")
        except BaseException as error:
            errors.append(error)
            raise

    runs = [threading.Thread(target=run, args=args) for args in (("one", True), ("other", False))]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert errors == []
    assert {name: (state.label, state.done) for name, state in seen.items()} == {
        "one": ("one", 3),
        "other": ("other", 5),
    }
    lines = capsys.readouterr().err.splitlines()
    objects = [json.loads(line) for line in lines if line.startswith("{")]
    texts = [line for line in lines if not line.startswith("{")]
    assert {each["run"] for each in objects} == {"one"}
    assert {"beat", "ended", "progress", "stalled"} == {each["event"] for each in objects}
    stalled = {each["waiting_for"] for each in objects if each["event"] == "stalled"}
    assert stalled <= {"shard of one", "its first result"}
    assert any(line.endswith("; waiting for shard of other") for line in texts)
    assert not any("one" in line for line in texts)
    assert {"beat of other", "end of other"} <= set(texts)


@pytest.mark.usefixtures("as_json")
def test_a_bar_that_another_thread_displays_is_an_event(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As tqdm's own thread displays bars that are seldom updated."""
    with log.context(run="runs/x"), progress.progress_bar("embed", 3, "images") as bar:
        other = threading.Thread(target=bar.refresh)
        other.start()
        other.join()
        (event,) = events(capsys.readouterr().err)
    assert (event["event"], event["run"], event["label"]) == ("progress", "runs/x", "embed")
