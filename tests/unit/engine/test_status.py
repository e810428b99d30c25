"""The state of a run as another machine sees it, which sees no ghosts."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from pds_ray.config import replace
from pds_ray.engine import run as engine
from pds_ray.engine.status import status
from pds_ray.methods.pds import PDS
from pds_ray.methods.selection import SELECTION
from pds_ray.recipes import recipe
from pds_ray.store import heartbeat, storage
from pds_ray.store.heartbeat import SILENT_S
from pds_ray.store.manifest import ManifestError, RunManifest
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder, StorageError
from pds_ray.telemetry.progress import progress_bar


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Folder(str(tmp_path)))


def book(
    run: RunFolder, done: tuple[str, ...], last: str = "", how: str = "", method: str = "pds"
) -> None:
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
        RunFolder.HEARTBEAT,
        {"host": "h", "pid": 1, "written": time.time() - age_s, "progress": None},
    )


@pytest.mark.parametrize(
    ("done", "last", "how", "age_s", "state", "stage"),
    [
        (PDS.names, "", "", None, "finished", None),
        (PDS.names, "", "", SILENT_S + 5, "finished", None),  # killed after its last word
        (PDS.names[:2], "cluster", "", 1.0, "running", "cluster"),
        (PDS.names[:2], "", "", 1.0, "running", "cluster"),  # between two stages
        (PDS.names[:2], "cluster", "", SILENT_S + 5, "silent", "cluster"),  # killed
        ((), "embed", "", None, "silent", "embed"),
        ((), "embed", "interrupted", None, "interrupted", "embed"),
        (PDS.names[:1], "prune", "failed", None, "failed", "prune"),
        (PDS.names[:1], "", "", None, "idle", "prune"),  # --only embed
        ((), "", "", None, "idle", "embed"),
    ],
)
def test_the_state(
    run: RunFolder,
    done: tuple[str, ...],
    last: str,
    how: str,
    age_s: float | None,
    state: str,
    stage: str | None,
) -> None:
    book(run, done, last, how)
    if age_s is not None:
        sign(run, age_s)
    found = status(run.folder.path)
    assert (found["state"], found["stage"]) == (state, stage)
    assert list(found["stages"]) == list(PDS.names)
    assert [name for name, how in found["stages"].items() if how == "done"] == list(done)


@pytest.mark.parametrize("accesses", range(8))
def test_a_run_that_ends_meanwhile_is_not_silent(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, accesses: int
) -> None:
    """It ends after some accesses of the folder, as a driver does: manifest, then heartbeat."""
    book(run, PDS.names[:-1], PDS.names[-1])
    sign(run, 1.0)
    left = accesses

    def then_end(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object) -> Any:
            nonlocal left
            if left == 0:
                left -= 1
                book(run, PDS.names)
                run.folder.delete(RunFolder.HEARTBEAT)
            left -= 1
            return method(*args)

        return call

    for name in ("exists", "read_bytes"):
        monkeypatch.setattr(Folder, name, then_end(getattr(Folder, name)))
    assert status(run.folder.path)["state"] in ("running", "finished")


@pytest.mark.parametrize(
    ("jump_s", "state"), [(-3600.0, "silent"), (-20.0, "running"), (3600.0, "silent")]
)
def test_a_clock_that_jumps_brings_no_dead_driver_to_life(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, jump_s: float, state: str
) -> None:
    """Set back by an hour, it would show one that was killed as running for that hour."""
    book(run, (), "embed")
    sign(run, 1.0)
    now = time.time
    monkeypatch.setattr("pds_ray.engine.status.time.time", lambda: now() + jump_s)
    assert status(run.folder.path)["state"] == state


@pytest.mark.parametrize(("label", "told"), [("embed", False), ("prune", True), ("list", True)])
def test_progress_of_a_stage_that_is_done_is_old(run: RunFolder, label: str, told: bool) -> None:
    """The manifest is written at once, the sign of life only now and then."""
    book(run, PDS.names[:1], "prune")
    progress = {
        "label": label,
        "unit": "images",
        "done": 3,
        "total": 4,
        "per_s": 1.0,
        "eta_s": 1.0,
        "note": "",
    }
    run.folder.write_json(
        RunFolder.HEARTBEAT, {"host": "h", "pid": 1, "written": time.time(), "progress": progress}
    )
    assert status(run.folder.path)["progress"] == (progress if told else None)


def test_other_methods_have_other_stages(run: RunFolder) -> None:
    book(run, SELECTION.names, method="herding")
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
        while (found := status(run.folder.path))["progress"] is None or found["progress"][
            "done"
        ] != 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        sign = heartbeat.read(run)
    assert (found["state"], found["progress"]["total"], found["progress"]["unit"]) == (
        "running",
        40,
        "images",
    )
    assert sign is not None
    assert sign["pid"] == os.getpid()
    assert heartbeat.read(run) is None, "it outlives the driver"


def test_it_goes_however_the_run_ends(run: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt), heartbeat.beating(run):
        raise KeyboardInterrupt
    assert heartbeat.read(run) is None


def test_the_folder_is_swept_before_it_holds_a_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is half written would go with what killed writers left."""
    left = tmp_path / "run" / "heartbeat.json.00000000.part"
    left.parent.mkdir()
    left.touch()

    def begin(_: RunFolder) -> None:
        assert not left.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "beating", begin)
    small = {
        "source": "scenes:20",
        "pairs": 2,
        "decode.decoder": "nearest",
        "out": str(left.parent),
    }
    with pytest.raises(KeyboardInterrupt):
        engine.distill(replace(recipe("demo"), small))


def test_a_run_goes_on_where_it_cannot_be_watched(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("the store is away")

    monkeypatch.setattr(Folder, "write_json", refuse)
    with heartbeat.beating(run):
        time.sleep(0.2)
    assert "cannot follow this run: the store is away" in capsys.readouterr().err


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder that takes the road of the object stores, where nothing waits for long."""
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "open_filesystem", lambda path: (bucket, path.removeprefix("s3://bucket/"))
    )
    for name, seconds in (
        ("BEAT_S", 0.05),
        ("SILENT_S", 1.0),
        ("FORGOTTEN_S", 4.0),
        ("SETTLE_S", 0.3),
    ):
        monkeypatch.setattr(heartbeat, name, seconds)
    (tmp_path / "run").mkdir()
    return RunFolder(Folder("s3://bucket/run"))


def elsewhere(run: RunFolder, age_s: float = 0.0, pid: int = 1) -> None:
    """Another driver's sign, there at once and whole, as an object store puts it."""
    other = {"host": "elsewhere", "pid": pid, "written": time.time() - age_s, "progress": None}
    bucket, path = storage.open_filesystem(run.folder.path)
    sign = Path(bucket.base_path, path, RunFolder.HEARTBEAT)
    part = sign.with_suffix(f".{time.monotonic_ns()}")
    part.write_text(json.dumps(other))
    part.replace(sign)


def test_a_driver_that_lives_keeps_another_out_of_a_store_without_locks(remote: RunFolder) -> None:
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.05):
            elsewhere(remote)

    elsewhere(remote)
    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(
            StorageError,
            match=r"another driver \(process 1 on elsewhere\) is at work in s3://bucket/run",
        ):
            heartbeat.beating(remote).__enter__()
    finally:
        ended.set()
        other.join()
    sign = heartbeat.read(remote)
    assert sign is not None
    assert sign["host"] == "elsewhere", "the refused one takes nothing away"


@pytest.mark.parametrize(
    ("age_s", "waits"), [(0.2, True), (2.0, True), (-2.0, True), (5.0, False), (-5.0, False)]
)
def test_one_that_was_killed_is_waited_for_and_then_forgotten(
    remote: RunFolder, capsys: pytest.CaptureFixture[str], age_s: float, waits: bool
) -> None:
    elsewhere(remote, age_s)
    with heartbeat.beating(remote):
        while (
            sign := heartbeat.read(remote)
        ) is None:  # what stands in for a store shows files half written
            time.sleep(0.01)
        assert sign["pid"] == os.getpid()
    assert ("waiting to see whether it is gone" in capsys.readouterr().err) == waits
    assert heartbeat.read(remote) is None


def in_a_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result()


@pytest.mark.parametrize("main", [True, False])
def test_a_driver_that_finds_another_alive_ends(remote: RunFolder, main: bool) -> None:
    """In its thread alone: the main thread of a program around it does not notice."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.02):
            elsewhere(remote)

    other = threading.Thread(target=live)

    def work() -> None:
        with heartbeat.beating(remote):
            other.start()
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:  # interrupt_main() does not end a sleep
                time.sleep(0.01)

    try:
        with pytest.raises(StorageError, match=r"another driver \(process 1 on elsewhere\) is at"):
            work() if main else in_a_thread(work)
    finally:
        ended.set()
        other.join()
        signal.signal(signal.SIGINT, before)
    sign = heartbeat.read(remote)
    assert sign is not None
    assert sign["host"] == "elsewhere"


def test_an_old_sign_ends_nobody(remote: RunFolder) -> None:
    with heartbeat.beating(remote):
        elsewhere(remote)
        time.sleep(0.3)


def test_of_two_that_begin_at_once_one_goes_on(
    remote: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen an empty folder; the other's sign comes last."""
    monkeypatch.setattr(heartbeat, "_wait_for_silence", lambda _: None)
    other = threading.Timer(0.1, elsewhere, (remote,))
    other.start()
    with pytest.raises(StorageError, match="another driver"):
        heartbeat.beating(remote).__enter__()
    other.join()


def test_a_process_that_has_the_number_of_a_dead_one_need_not_wait(remote: RunFolder) -> None:
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "written": time.time(),
        "progress": None,
    }
    remote.folder.write_json(RunFolder.HEARTBEAT, mine)
    heartbeat._wait_for_silence(remote)
    assert heartbeat.read(remote) == mine


def test_status_is_json(run: RunFolder) -> None:
    book(run, PDS.names)
    assert json.loads(json.dumps(status(run.folder.path)))["state"] == "finished"
