"""Progress off a terminal: lines, not carriage returns, and always a last one."""

from __future__ import annotations

import pytest

from pds_ray.progress import progress_bar


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


def test_an_error_passes_through() -> None:
    with pytest.raises(KeyError), progress_bar("x", 3, "shards"):
        raise KeyError("inside")


def test_the_last_line_comes_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pds_ray.progress.LOG_INTERVAL_S", 0.0)
    with progress_bar("embed", 3, "images") as bar:
        for _ in range(3):
            bar.update(1)
    assert capsys.readouterr().err.count("3/3") == 1
