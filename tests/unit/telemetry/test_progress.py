"""Progress off a terminal: lines, not carriage returns, and always a last one."""

from __future__ import annotations

import threading
import time
from functools import partialmethod

import pytest
from tqdm import tqdm

from pds_ray.telemetry import progress
from pds_ray.telemetry.progress import progress_bar


def test_a_log_gets_one_whole_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("embed", 300, "images", done=100) as bar:
        for _ in range(4):
            bar.set_postfix_str("2 bad", refresh=False)
            bar.update(50)
    error = capsys.readouterr().err
    assert "\r" not in error
    lines = error.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("embed ")
    for text in ("100%", "300/300", "images/s", "2 bad"):
        assert text in lines[0]


@pytest.mark.parametrize(("per_pair_s", "rate"), [(3600, " s per pair]"), (1e-3, " pairs/s]")])
def test_a_slow_rate_is_written_as_a_time(per_pair_s: float, rate: str) -> None:
    with progress_bar("materialize", 10_000, "pairs") as bar:
        bar.update(5000)
        bar.start_t -= 5000 * per_pair_s
        assert str(bar).endswith(rate)


def test_bars_that_are_switched_off_everywhere_count_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TQDM_DISABLE=1 does, which tqdm reads when it is imported."""
    monkeypatch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    with progress_bar("embed", 3, "shards") as bar:
        bar.update(3)
        assert progress.current() is not None
        assert progress.current().done == 3
    assert "3/3" in capsys.readouterr().err


def test_an_error_passes_through() -> None:
    with pytest.raises(KeyError), progress_bar("x", 3, "shards"):
        raise KeyError("inside")


def test_the_watchdog_speaks_until_something_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "STALL_S", 0.2)
    asked = [threading.Event(), threading.Event()]
    with progress_bar("embed", 3, "shards") as bar:
        for number, event in enumerate(asked):  # the second answer follows the first line
            progress.waiting_for(lambda: event.set() or f"0004{number}, on node ab")  # noqa: B023
            assert event.wait(60)
        lines = capsys.readouterr().err.splitlines()
        bar.update()
    assert lines[0].startswith("embed: nothing finished for ")
    assert lines[0].endswith(" s; waiting for 00040, on node ab")


def test_quick_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for delay_s, lines in ((60.0, 0), (0.01, 1)):
        with progress_bar("check", 2, "images", delay_s=delay_s) as bar:
            time.sleep(0.02)
            bar.update(2)
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_last_line_comes_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pds_ray.telemetry.progress.LOG_INTERVAL_S", 0.0)
    with progress_bar("embed", 3, "images") as bar:
        for _ in range(3):
            bar.update(1)
    assert capsys.readouterr().err.count("3/3") == 1


def test_a_log_gets_a_line_for_slow_progress_and_none_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pds_ray.telemetry.progress.LOG_INTERVAL_S", 0.0)
    with progress_bar("embed", 200, "images") as bar:
        bar.update(0)  # before the first, a line tells what is waited for
        for done in (100, 0, 1, 0, 99):
            bar.update(done)
    counts = [line.split("|")[1].split()[0] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["0/200", "100/200", "101/200", "200/200"]


class Told:
    """Reports of one item of work, as the test sets them."""

    def __init__(self) -> None:
        self.done, self.what = 0, "the model to load"
        self.pace = self.readings = 0

    def read(self) -> None:
        self.done += self.pace
        self.readings += 1

    def ahead(self) -> int:
        return self.done

    def progress(self) -> object:
        return self.done, self.what

    def describe(self) -> str:
        return self.what


def test_a_bar_runs_ahead_of_the_results_and_never_counts_twice() -> None:
    told = Told()
    with progress_bar("embed", 100, "images", done=10) as bar:
        bar.set_postfix_str("1 of 4 shards", refresh=False)
        bar.follow(told)
        bar.look()
        assert bar.postfix == "waiting for the model to load"
        told.what = ""
        bar.look()
        assert bar.postfix == "waiting for a free worker"
        told.done, told.what = 7, "images to be encoded"
        bar.look()
        assert (bar.n, bar.postfix) == (17, "1 of 4 shards")
        told.done = 0  # its result arrives
        bar.update(30)
        assert (bar.n, bar.finished) == (40, 40)
        told.done = 5
        bar.look()
        assert bar.n == 45
    assert bar.n == 40, "work that never arrived stays on the bar"


def test_the_watchdog_names_what_workers_do_and_is_silent_while_they_get_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "STALL_S", 0.1)
    told = Told()
    told.pace = 1
    with progress_bar("embed", 3, "shards") as bar:
        bar.follow(told)
        while told.readings < 20:
            time.sleep(0.01)
        assert "nothing finished" not in capsys.readouterr().err
        told.pace, found = 0, ""
        while "waiting for the model to load" not in found:
            time.sleep(0.05)
            found += capsys.readouterr().err
        told.what = ""
        while "waiting for a free worker: none is at work" not in found:
            time.sleep(0.05)
            found += capsys.readouterr().err
