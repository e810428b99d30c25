"""Stores that never answer: said, given up, and left at once by Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from pds_ray.sources.base import SourceError
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.store import calls, http
from pds_ray.store.calls import UNLIMITED, StorageError, side_by_side, with_retries
from pds_ray.store.storage import Folder
from tests.support.web_server import silent


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "ANSWER_S", 0.3)
    monkeypatch.setattr(calls, "PATIENCE_S", 0.2)
    monkeypatch.setattr(calls, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr(calls, "_said", {})
    monkeypatch.setattr(http, "SILENCE_S", 0.25)


def test_a_wait_is_said_once_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    never = threading.Event()
    for name in "ab":
        with pytest.raises(StorageError, match=rf"fails at s3://b/{name} \(no answer for 0 s\)"):
            with_retries(never.wait, f"s3://KEY:SECRET@b/{name}", 0.3)
    never.set()
    assert capsys.readouterr().err == "pds-ray: waiting for s3://b/a (0 s)\n"


def test_a_call_without_a_limit_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert with_retries(lambda: time.sleep(0.4) or "done", "s3://b/x", UNLIMITED) == "done"
    assert "waiting for s3://b/x" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["http://127.0.0.1:{}/x.tar", "ftp://127.0.0.1:{}/x.tar"])
def test_a_server_that_never_speaks_is_named(uri: str) -> None:
    with silent() as port, pytest.raises(SourceError) as caught:
        WebDatasetSource(uri.format(port)).shards()
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "no answer" in str(caught.value)


def test_an_object_store_that_never_speaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with silent() as port:
        folder = Folder(f"s3://b/x?endpoint_override=127.0.0.1:{port}&scheme=http")
        with pytest.raises(
            StorageError, match=r"fails at s3://b/x\S+ \(no answer for 0 s\); check"
        ):
            folder.exists("y")
        with pytest.raises(SourceError, match=r"fails at s3://b/ \(no answer for 0 s\); check"):
            WebDatasetSource(folder.full("*.tar")).shards()


INTERRUPTED = """
import sys, threading
from pds_ray.store import calls
calls.SAY_AFTER_S = 0.0
never = threading.Event()
try:
    list(calls.side_by_side(lambda n: calls.with_retries(never.wait, "s3://b/x"), [1, 2]))
except KeyboardInterrupt:
    print("left", flush=True)
"""


def test_an_interrupt_ends_a_wait_and_the_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "waiting for s3://b/x" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("left\n", 0)


def test_results_come_in_order_from_threads_that_hold_nobody() -> None:
    assert list(side_by_side(lambda n: n * n, range(100))) == [n * n for n in range(100)]
    never = threading.Event()
    results = side_by_side(lambda n: n or never.wait(), [1, 0])
    assert next(results) == 1
    results.close()
    never.set()


def test_an_error_comes_when_no_call_is_under_way() -> None:
    ended: list[int] = []

    def call(n: int) -> None:
        if n == 0:
            raise OSError("the first")
        time.sleep(0.05)
        ended.append(n)

    with pytest.raises(OSError, match="the first"):
        list(side_by_side(call, range(4)))
    assert sorted(ended) == [1, 2, 3]
