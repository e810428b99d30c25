"""The dashboard: its metrics exist, and it depends on nothing of one Grafana."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pds_ray.distributed.metrics import COUNTERS
from tests.support.cluster_files import dashboard, metrics_of

PANELS = dashboard()["panels"]
RAY_OWN = {  # scraped from a running Ray by tests/end_to_end/test_jobs.py
    "ray_node_cpu_utilization",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_object_store_memory",
}


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_metric_is_one_of_ours_or_of_rays_own() -> None:
    ours = {f"ray_{name}" for name in COUNTERS}
    assert metrics_of(dashboard()) == ours | RAY_OWN


def test_our_metrics_are_those_of_the_chosen_runs_and_counters_are_not_shown_raw() -> None:
    for expression in expressions():
        if "ray_pds_ray_" in expression:
            assert expression.count("ray_pds_ray_") == expression.count('{run=~"$run"}')
            counted = "shards" in expression or "bad_samples" in expression
            assert counted or expression.count("rate(") == expression.count("ray_pds_ray_")


def test_brackets_close() -> None:
    for expression in expressions():
        for left, right in ("()", "{}", "[]"):
            assert expression.count(left) == expression.count(right), expression


def test_the_idle_share_is_that_of_idle_time() -> None:
    """30 s busy and 10 s idle are a share of a quarter."""
    (expression,) = (each for each in expressions() if each.startswith("1 - "))
    values = {"busy": "30.0", "idle": "10.0"}
    for kind, value in values.items():
        metric = f'ray_pds_ray_actor_{kind}_seconds_total{{run=~"$run"}}'
        asked = f"sum by (run, stage) (rate({metric}[$__rate_interval]))"
        assert asked in expression
        expression = expression.replace(asked, value)
    assert arithmetic(expression) == pytest.approx(0.25)


def arithmetic(text: str) -> float:
    import ast
    import operator

    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Div: operator.truediv}

    def value(node: Any) -> float:
        if isinstance(node, ast.Constant):
            return node.value
        return signs[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(text, mode="eval").body)


def test_it_can_be_imported_anywhere() -> None:
    """Ids differ, panels do not overlap, and the reader chooses the source of data."""
    text = json.dumps(dashboard())
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not places & cells
        assert place["x"] + place["w"] <= 24
        places |= cells
    assert text.count('"uid": "${datasource}"') == text.count('"type": "prometheus"')
    assert {each["name"] for each in dashboard()["templating"]["list"]} == {"datasource", "run"}
