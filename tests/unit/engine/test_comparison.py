"""Rows of a comparison, and the table of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pds_ray.cli.output import _recall
from pds_ray.config import ConfigError, EvaluateConfig, replace
from pds_ray.engine.compare import ABLATIONS, _cells, ablations, as_csv, entries
from pds_ray.recipes import recipe
from pds_ray.stages.trial import MEASURES

CONFIG = replace(recipe("demo"), {"out": "runs/comparison"})
JUDGED = EvaluateConfig(test="scenes:60:7")


def test_every_method_at_every_size() -> None:
    rows = entries(CONFIG, ["random", "pds", "random"], [10, 20], JUDGED)
    assert [row.label for row in rows] == ["random-10", "random-20", "pds-10", "pds-20"]
    assert [(row.run.method, row.run.pairs) for row in rows] == [
        ("random", 10),
        ("random", 20),
        ("pds", 10),
        ("pds", 20),
    ]
    assert len({row.run.out for row in rows}) == 4


def test_sets_of_a_row_differ_in_their_seed_alone() -> None:
    methods = ["random", "random+seed=7", "random+seed=2"]
    rows = entries(replace(CONFIG, {"seed": 1}), methods, [10, 20], JUDGED, set_seeds=3)
    assert [row.run.seed for row in rows] == [1, 2, 3, 1, 2, 3, 7, 8, 9, 7, 8, 9, 2, 3, 4, 2, 3, 4]
    assert len({row.label for row in rows}) == len(rows)
    assert [row.row for row in rows[:4]] == [*["random-10"] * 3, "random-20"]
    for one in rows:
        for other in rows:
            assert (one.folder == other.folder) == (one.run == other.run)
    first = entries(replace(CONFIG, {"seed": 1}), methods, [10, 20], JUDGED)
    assert [row.folder for row in first] == [row.folder for row in rows[::3]], "as with one set"


def test_the_table_of_several_sets_shows_both_deviations() -> None:
    rows = entries(CONFIG, ["random"], [10], JUDGED, set_seeds=2)
    means = {row.label: mean for row, mean in zip(rows, (40.0, 44.0), strict=True)}
    results = {label: result_of(mean, std=1.0) for label, mean in means.items()}
    cells = _cells(rows, results)
    assert [cell["backbone"] for cell in cells] == ["small_vit", "average"]
    for cell in cells:
        assert (cell["mean"]["r_mean"], cell["std"]["r_mean"]) == (42.0, 1.0)
        assert (cell["set_std"]["r_mean"], cell["trials"]) == (2.0, 4)
        assert cell["sets"] == ["sets/random-10", "sets/random+seed=1-10"]
    titles, line, _ = csv.reader(as_csv(cells).splitlines())
    assert dict(zip(titles, line, strict=True))["tr@1 set std"] == "2.0000"
    assert _recall(cells[0], "r_mean", seeds=2) == " 42.0 ± 1.0 / 2.0"
    (alone,) = {tuple(cell) for cell in _cells(rows[:1], results)}
    assert alone == ("method", "pairs", "backbone", "mean", "std", "trials", "set")
    assert _recall(_cells(rows[:1], results)[0], "r_mean", seeds=2) == " 40.0 ± 1.0"


def result_of(mean: float, std: float) -> dict:
    figures = {"mean": dict.fromkeys(MEASURES, mean), "std": dict.fromkeys(MEASURES, std)}
    return {"backbones": [{"name": "small_vit", "trials": [{}, {}], **figures}], **figures}


def test_a_change_reaches_the_run_or_the_protocol() -> None:
    (row,) = entries(
        CONFIG, ["pds+match.filter=false+prune.ratio=0+protocol.text=prototypes"], [10], JUDGED
    )
    assert (row.run.match.filter, row.run.prune.ratio) == (False, 0.0)
    assert row.evaluation.protocol.text == "prototypes"
    plain, changed = entries(CONFIG, ["pds", "pds+protocol.epochs=3"], [10], JUDGED)
    assert plain.run == changed.run, "what changes the protocol alone shares the set"


def test_fields_are_spelled_as_flags_may_be() -> None:
    flag, field = entries(
        CONFIG, ["pds+decode.noise-level=7", "pds+decode.noise_level=7"], [10], JUDGED
    )
    assert (flag.run, flag.folder) == (field.run, field.folder)
    assert flag.run.decode.noise_level == 7


def test_every_ablation_changes_something() -> None:
    rows = entries(CONFIG, ["pds", *ABLATIONS], [10], JUDGED)
    assert len({(row.run.out, row.evaluation.protocol) for row in rows}) == len(ABLATIONS) + 1


def test_ablations_that_change_nothing_are_left_out() -> None:
    paper = replace(CONFIG, {"caption.nearest_to": "prototype"})
    by_prototypes = replace(JUDGED, {"protocol.text": "prototypes"})
    left = set(ABLATIONS) - set(ablations(paper, by_prototypes))
    assert left == {"pds+caption.nearest_to=prototype", "pds+protocol.text=prototypes"}
    assert ablations(CONFIG, JUDGED) == list(ABLATIONS)


def test_every_set_has_a_folder_of_its_own(tmp_path: Path) -> None:
    texts = (letters + end for letters in ("x" * 300, "ü" * 180) for end in "ab")
    long = [f"pds+decode.negative_prompt={text}" for text in texts]
    folders = {row.folder for row in entries(CONFIG, long, [10], JUDGED)}
    assert len(folders) == 4
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    alike = ["pds+decode.negative_prompt=a/b", "pds+decode.negative_prompt=a:b"]
    with pytest.raises(ConfigError, match=r"a/b.* and .*a:b.*in two folders"):
        entries(CONFIG, alike, [10], JUDGED)


def test_nothing_secret_is_in_a_place() -> None:
    config = replace(CONFIG, {"out": "s3://bucket/x?access_key=AK&secret_key=SK"})
    (row,) = entries(config, ["random"], [10], JUDGED)
    assert row.folder == "sets/random-10"
    assert row.run.out == "s3://bucket/x/sets/random-10?access_key=AK&secret_key=SK"


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        ("nothing", "unknown method 'nothing'"),
        ("pds+match.filter", "FIELD=VALUE"),
        ("pds+match.nothing=1", "unknown option match.nothing"),
        ("pds+pairs=500", "pairs is the same for all"),
        ("pds+embed.store=x", "embed.store is the same for all"),
        ("herding+decode.steps=5", "changes nothing"),
        ("pds+match.filter=true", "changes nothing"),
        ("pds+protocol.text=captions", "changes nothing"),
        ("pds+protocol.text=nothing", "text is 'nothing'"),
    ],
)
def test_what_is_no_row_is_refused(method: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        entries(CONFIG, [method], [10], JUDGED)
