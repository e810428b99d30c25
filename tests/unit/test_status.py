"""What another machine sees of a run, and that it sees no ghosts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pds_ray import heartbeat, pipeline
from pds_ray.artifacts import RunFolder
from pds_ray.config import replace
from pds_ray.manifest import ManifestError, RunManifest
from pds_ray.pipeline import SELECTION_STAGES, STAGES
from pds_ray.progress import progress_bar
from pds_ray.recipes import recipe
from pds_ray.status import SILENT_S, status
from pds_ray.storage import Folder, StorageError


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Folder(str(tmp_path)))


def book(run: RunFolder, done: tuple[str, ...], last: str = "", how: str = "", method: str = "pds") -> None:
    manifest = RunManifest(run)
    manifest.update(config={"method": method})
    for stage in done:
        manifest.start(stage, "x")
        manifest.stop(stage, "done", {})
    if last:
        manifest.start(last, "x")
        if how:
            manifest.stop(last, how)


def sign(run: RunFolder, age_s: float) -> None:
    run.folder.write_json(
        RunFolder.HEARTBEAT, {"host": "h", "pid": 1, "written": time.time() - age_s, "progress": None}
    )


@pytest.mark.parametrize(
    ("done", "last", "how", "age_s", "state", "stage"),
    [
        (STAGES, "", "", None, "finished", None),
        (STAGES, "", "", SILENT_S + 5, "finished", None),  # killed after its last word
        (STAGES[:2], "cluster", "", 1.0, "running", "cluster"),
        (STAGES[:2], "", "", 1.0, "running", "cluster"),  # between two stages
        (STAGES[:2], "cluster", "", SILENT_S + 5, "silent", "cluster"),  # killed
        ((), "embed", "", None, "silent", "embed"),
        ((), "embed", "interrupted", None, "interrupted", "embed"),
        (STAGES[:1], "prune", "failed", None, "failed", "prune"),
        (STAGES[:1], "", "", None, "idle", "prune"),  # --only embed
        ((), "", "", None, "idle", "embed"),
    ],
)
def test_the_state(
    run: RunFolder, done: tuple[str, ...], last: str, how: str, age_s: float | None, state: str, stage: str | None
) -> None:
    book(run, done, last, how)
    if age_s is not None:
        sign(run, age_s)
    found = status(run.folder.path)
    assert (found["state"], found["stage"]) == (state, stage)
    assert list(found["stages"]) == list(STAGES)
    assert [name for name, how in found["stages"].items() if how == "done"] == list(done)


@pytest.mark.parametrize("accesses", range(8))
def test_a_run_that_ends_meanwhile_is_not_silent(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, accesses: int
) -> None:
    """It ends after so many accesses of the folder, as a driver does: the manifest first, then its sign."""
    book(run, STAGES[:-1], STAGES[-1])
    sign(run, 1.0)
    left = accesses

    def then_end(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object) -> Any:
            nonlocal left
            if left == 0:
                left -= 1
                book(run, STAGES)
                run.folder.delete(RunFolder.HEARTBEAT)
            left -= 1
            return method(*args)

        return call

    for name in ("exists", "read_bytes"):
        monkeypatch.setattr(Folder, name, then_end(getattr(Folder, name)))
    assert status(run.folder.path)["state"] in ("running", "finished")


def test_other_methods_have_other_stages(run: RunFolder) -> None:
    book(run, SELECTION_STAGES, method="herding")
    assert status(run.folder.path)["state"] == "finished"


def test_no_run_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"is no run folder"):
        status(str(tmp_path))


def test_a_driver_leaves_how_far_it_is(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    book(run, (), "embed")
    with heartbeat.beating(run), progress_bar("embed", 40, "images") as bar:
        bar.update(10)
        deadline = time.monotonic() + 20
        while (found := status(run.folder.path))["progress"] is None or found["progress"]["done"] != 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        sign = heartbeat.read(run)
    assert (found["state"], found["progress"]["total"], found["progress"]["unit"]) == ("running", 40, "images")
    assert sign is not None
    assert sign["pid"] == os.getpid()
    assert heartbeat.read(run) is None, "it outlives the driver"


def test_it_goes_however_the_run_ends(run: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt), heartbeat.beating(run):
        raise KeyboardInterrupt
    assert heartbeat.read(run) is None


def test_the_folder_is_swept_before_it_holds_a_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is half written would go with what killed writers left."""
    left = tmp_path / "run" / "heartbeat.json.00000000.part"
    left.parent.mkdir()
    left.touch()

    def begin(_: RunFolder) -> None:
        assert not left.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "beating", begin)
    small = {"source": "scenes:20", "pairs": 2, "decode.decoder": "nearest", "out": str(left.parent)}
    with pytest.raises(KeyboardInterrupt):
        pipeline.distill(replace(recipe("demo"), small))


def test_a_run_goes_on_where_it_cannot_be_watched(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("the store is away")

    monkeypatch.setattr(Folder, "write_json", refuse)
    with heartbeat.beating(run):
        time.sleep(0.2)
    assert "cannot follow this run: the store is away" in capsys.readouterr().err


def test_status_is_json(run: RunFolder) -> None:
    book(run, STAGES)
    assert json.loads(json.dumps(status(run.folder.path)))["state"] == "finished"
