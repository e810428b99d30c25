"""Counters: labels that Ray takes, and failures that stop nothing."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.distributed import metrics

NAME = "pds_ray_shards_committed_total"


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("/tmp/run", "/tmp/run"),
        ("s3://b/My run?region=x", "s3://b/My run?region=x"),
        ("/tmp/ü/run", "/tmp/%C3%BC/run"),
        ("/tmp/\udcff/run", "/tmp/%FF/run"),
        ("a\nb", "a%0Ab"),
        ("", ""),
    ],
)
def test_labels(value: str, label: str) -> None:
    assert metrics.label(value) == label


@given(st.text(st.characters(codec="utf-8"), max_size=400))
def test_any_label_is_short_ascii_and_can_be_read(value: str) -> None:
    label = metrics.label(value)
    assert label.isascii()
    assert len(label) <= metrics.MAX_LABEL
    if "%" not in value and len(label) < metrics.MAX_LABEL:
        assert unquote(label) == value


def test_of_a_long_label_the_end_stays() -> None:
    assert metrics.label("x" * 900 + "/run") == "x" * 251 + "/run"


def test_a_counter_that_fails_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counter:
        def inc(self, amount: float, tags: dict[str, str]) -> None:
            raise RuntimeError(f"no {amount} for {tags['run']}\nand more")

    monkeypatch.setattr(metrics, "_counter", lambda _: Counter())
    metrics._report.cache_clear()
    metrics.count_for("/tmp/ü")
    metrics.count(NAME, 1.0)
    metrics.count(NAME, 1.0)
    metrics.count(NAME, 0.0)
    line = "pds-ray: the metrics are not complete: RuntimeError: no 1.0 for /tmp/%C3%BC\n"
    assert capsys.readouterr().err == line
