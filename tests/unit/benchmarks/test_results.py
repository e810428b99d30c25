"""Results of rows as JSON and Markdown, and the breakdown of a run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__, results
from benchmarks.breakdown import AROUND, shares, table
from benchmarks.measure import BASELINE, OURS, Check, Row, at_least, factor


def measured(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "process_seconds": 9.0,
        "peak_gib": 1.0,
        "driver_peak_gib": 0.5,
        "worker_peak_gib": 0.25,
    }


def row(number: int = 7) -> Row:
    return Row(number, "a thing", "another", {}, lambda *_: [], lambda _: {}, notes="All of it.")


def outcome(number: int, seconds: float = 2.0) -> results.Result:
    runs = {
        BASELINE: [measured(20.0), measured(30.0), measured(22.0)],
        OURS: [{**measured(seconds), "extra": 1}] * 3,
    }
    checks = [at_least(runs, 10), Check("the same", "0 apart", True)]
    return results.result(
        row(number), runs, {"apart": 0.0}, checks, f"python -m benchmarks {number}", quick=False
    )


def test_factors_are_of_medians():
    runs = {
        BASELINE: [measured(20.0), measured(30.0), measured(90.0)],
        OURS: [measured(3.0), measured(1.0), measured(2.0)],
    }
    assert factor(runs) == 15
    assert at_least(runs, 15) == Check("15x faster", "15.00x", True)
    assert at_least(runs, 15.1).reached is False


def test_a_result_is_json_with_medians_and_spread():
    found = json.loads(json.dumps(outcome(7)))
    assert found["sides"][BASELINE]["seconds"] == {
        "median": 22,
        "min": 20,
        "max": 30,
        "all": [20, 30, 22],
    }
    assert found["sides"][OURS]["found"] == [{"extra": 1}] * 3
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["versions"]["numpy"] == np.__version__
    assert [check["reached"] for check in found["checks"]] == [True, True]


def test_only_the_marked_section_is_written(tmp_path):
    markdown, stored = tmp_path / "RESULTS.md", tmp_path / "results.json"
    markdown.write_text(f"# By hand\n\n{results.BEGIN}\nold\n{results.END}\n\nBy hand, too.\n")
    results.write([outcome(7), outcome(2)], stored, markdown)
    results.write([outcome(7, seconds=11.0)], stored, markdown)
    text = markdown.read_text()
    assert text.startswith("# By hand\n\n<!--")
    assert text.endswith("-->\n\nBy hand, too.\n")
    assert "old" not in text
    assert "| 7 | a thing | another | 10x faster | 2.00x | **no** |" in text
    assert "| 2 | a thing | another | 10x faster | 11.00x | yes |" in text
    assert [one["row"] for one in json.loads(stored.read_text())] == [2, 7]


def test_a_row_that_lacks_something_says_so_and_replaces_no_figures(tmp_path):
    lacking = replace(row(), lacking=lambda: "no such program")
    unmeasured = __main__.run_row(lacking, repeats=3, quick=False, work=tmp_path / "work")
    markdown, stored = tmp_path / "RESULTS.md", tmp_path / "results.json"
    markdown.write_text(f"{results.BEGIN}\n{results.END}\n")
    results.write([unmeasured], stored, markdown)
    assert "| 7 | a thing | another |  | not measured: no such program |  |" in markdown.read_text()
    results.write([outcome(7)], stored, markdown)
    results.write([unmeasured], stored, markdown)
    assert "11.00x" in markdown.read_text()
    assert "not measured" not in markdown.read_text()


def test_a_text_without_the_section_is_left_alone(tmp_path):
    markdown, stored = tmp_path / "RESULTS.md", tmp_path / "results.json"
    markdown.write_text("# By hand\n")
    with pytest.raises(ValueError, match="no section"):
        results.write([outcome(7)], stored, markdown)
    assert markdown.read_text() == "# By hand\n"
    assert not stored.exists()


def test_results_md_holds_the_stored_results_in_its_marked_section():
    text = results.MARKDOWN.read_text()
    assert text.count(results.BEGIN) == text.count(results.END) == 1
    assert results.section(json.loads(results.RESULTS.read_text())) in text


def test_the_breakdown_adds_up():
    counts = {"encoder_busy_s": 6.0, "encoder_idle_s": 1.0}
    run = {
        "stages": {
            "embed": {"seconds": 8.0, "counts": counts},
            "match": {"seconds": 1.0, "counts": {}},
        },
        "last_run_seconds": 12.0,
    }
    found = shares(run)
    assert found["embed"] + found["match"] + found[AROUND] == 12
    assert found["embed: encoders waiting"] == 1
    with pytest.raises(ValueError, match="several sessions"):
        shares({**run, "last_run_seconds": 5.0})
    lines = table(
        {"before": run, "after": {**run, "stages": {"embed": {"seconds": 3.0}}}}
    ).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| embed | 8.0 | 67% | 3.0 | 25% |" in lines
    assert "| match | 1.0 | 8% |  |  |" in lines
    assert lines[-1] == "| all | 12.0 | 100% | 12.0 | 100% |"
