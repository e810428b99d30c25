"""The page as text: what strangers wrote cannot act in it, and it asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys

import pytest

from pds_ray.cli import main as cli
from pds_ray.report import figures
from pds_ray.report.evaluations import ReportError
from pds_ray.report.gather import gather
from pds_ray.report.page import render, write_report
from tests.support.synthetic_run import HOSTILE, add_comparison, add_evaluation, make_run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    made = make_run(tmp_path_factory.mktemp("report") / "run", pairs=len(HOSTILE), captions=HOSTILE)
    add_evaluation(made.path, backbones=("<b>nfnet</b>", "vit"))
    return render(gather(str(made.path)))


def scripts(page: str) -> list[tuple[str, str]]:
    return re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)


def test_there_are_the_scripts_of_ours_and_no_others(page):
    kinds = [attributes.strip() for attributes, _ in scripts(page)]
    data, figure, plotly = (f'id="{name}"' for name in ("data", "figures", "plotly"))
    json_type = 'type="application/json"'
    assert kinds == [
        f"{json_type} {data}",
        "",
        f"{json_type} {figure}",
        f'type="text/plain" {plotly}',
    ]


def test_the_policy_names_the_scripts_by_hash(page):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; img-src data:;")
    texts = scripts(page)
    for text in (texts[1][1], texts[3][1]):
        assert (
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            in policy
        )
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy


def test_data_blocks_hold_no_markup_and_all_the_text(page):
    data, figure = scripts(page)[0][1], scripts(page)[2][1]
    for text in (data, figure):
        assert not set("<>&\u2028\u2029").intersection(text)
        assert text.isascii()
    assert [pair["caption"] for pair in json.loads(data)["pairs"]["list"]] == HOSTILE


def test_figures_hold_no_markup_of_strangers(page):
    found = json.loads(scripts(page)[2][1])
    hovers = found["map-image"]["figure"]["data"][1]["text"]
    assert hovers[0] == "pair 0<br>&lt;script&gt;window.hacked=1&lt;/script&gt;"
    for hover in hovers:
        assert set(re.findall(r"<[^>]*>", hover)) <= {"<br>"}
    assert found["evaluation-0"]["figure"]["data"][0]["name"] == "&lt;b&gt;nfnet&lt;/b&gt;"


def test_every_colour_has_a_partner_in_the_dark(page):
    used = set(re.findall(r"#[0-9a-f]{6}", scripts(page)[2][1]))
    assert used <= set(figures.PALETTE)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("series", figures.SERIES)
def test_series_stand_out_from_both_papers(series):
    assert contrast(series, figures.PAPER) >= 3
    assert contrast(figures.PALETTE[series], figures.PALETTE[figures.PAPER]) >= 3


def test_ink_can_be_read_on_both_papers():
    assert contrast(figures.INK, figures.PAPER) >= 7
    assert contrast(figures.PALETTE[figures.INK], figures.PALETTE[figures.PAPER]) >= 7


def test_it_is_written_into_the_run_or_where_asked(tmp_path):
    made = make_run(tmp_path / "run", pairs=4)
    assert write_report(str(made.path)) == str(made.path / "report.html")
    asked = tmp_path / "elsewhere" / "page.html"
    assert write_report(str(made.path), str(asked)) == str(asked)
    assert asked.read_text().startswith("<!doctype html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write"):
        write_report(str(made.path), str(tmp_path / "file" / "page.html"))


def test_a_comparison_has_charts_for_every_choice(tmp_path):
    add_comparison(tmp_path, {("pds", 6): "a", ("random", 6): "b", ("pds", 20): "c"})
    report = gather(str(tmp_path))
    found = figures.comparison_figures(report)
    assert set(found) == {
        f"{kind}-{b}{end}"
        for b in range(3)
        for kind, end in (("lines", ""), ("bars", "-6"), ("bars", "-20"))
    }
    assert figures.comparison_axes(report) == (
        ["pds", "random"],
        ["average", "nfnet", "vit"],
        [6, 20],
    )
    assert "comparison" in render(report)


def test_bars_of_several_sets_show_the_deviation_over_sets(tmp_path):
    add_comparison(tmp_path, {("pds", 6): "a", ("random", 6): "b"})
    path = tmp_path / "comparison.json"
    table = json.loads(path.read_text())
    for cell in table["cells"]:
        cell["set_std"] = dict.fromkeys(cell["std"], 2.5)
    path.write_text(json.dumps({**table, "set_seeds": 3}))
    report = gather(str(tmp_path))
    assert (report["set_seeds"], report["cells"][0]["set_std"]["r_mean"]) == (3, 2.5)
    found = figures.comparison_figures(report)
    assert [trace["error_x"]["array"] for trace in found["bars-0-6"]["figure"]["data"]] == [
        [2.5],
        [2.5],
    ]
    assert [trace["error_y"]["array"] for trace in found["lines-0"]["figure"]["data"]] == [
        [2.5],
        [2.5],
    ]


def test_a_comparison_of_budgets_has_frontiers(tmp_path):
    """One choice per budget, whatever the pairs; recall over bytes and over what training costs."""
    sets = {("pds", 6): "a", ("random", 7): "b", ("pds", 20): "c", ("random", 19): "d"}
    add_comparison(tmp_path, sets, backbones=("vit",), pair_bytes=130, budgets=True)
    report = gather(str(tmp_path))
    found = figures.comparison_figures(report)
    kinds = ("lines-{}", "bars-{}-1000", "bars-{}-3000", "bytes-{}", "pixels-{}")
    assert set(found) == {kind.format(b) for b in range(2) for kind in kinds}
    for name, each in (("bytes-0", 130), ("pixels-0", 4096)):
        traces = {trace["name"]: trace for trace in found[name]["figure"]["data"]}
        assert traces["pds"]["x"] == [6 * each, 20 * each]
        assert traces["random"]["x"] == [7 * each, 19 * each]
        assert traces["pds"]["text"] == ["6 pairs", "20 pairs"]
    assert [trace["y"] for trace in found["bars-0-1000"]["figure"]["data"]] == [["random"], ["pds"]]
    assert '"budgets":true' in render(report)


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_the_command_says_in_one_line_that_there_is_nothing(tmp_path, path):
    command = [sys.executable, "-m", "pds_ray.cli", "report", str(tmp_path / path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "neither a run.json nor a comparison.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verbose", [False, True])
def test_a_report_that_fails_does_not_fail_the_run(tmp_path, capsys, verbose):
    cli._report_at_the_end(str(tmp_path), verbose)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("pds-ray: the run is done, but not its report: ReportError: ")
    assert ("Traceback (most recent call last):" in lines) == verbose
