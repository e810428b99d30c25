"""Rows of a comparison, and the table of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.cli.output import _recall, print_comparison
from pds_ray.config import ConfigError, EvaluateConfig, replace
from pds_ray.engine.compare import ABLATIONS, _cells, ablations, as_csv, entries
from pds_ray.engine.evaluate import _result, make_evaluation
from pds_ray.recipes import recipe
from pds_ray.stages.trial import MEASURES, Candidate
from pds_ray.store.distilled_set import load_distilled
from pds_ray.store.evaluation_folder import COMPARISON, frontier, read_table
from pds_ray.store.storage import Folder
from tests.support.hand_made_set import scenes_set

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
        assert (cell["bytes"], cell["pixels"], cell["pixels_per_epoch"]) == (42, 40, 100)
    titles, line, _ = csv.reader(as_csv(cells).splitlines())
    assert dict(zip(titles, line, strict=True))["tr@1 set std"] == "2.0000"
    assert _recall(cells[0], "r_mean", seeds=2) == " 42.0 ± 1.0 / 2.0"
    for cell in _cells(rows[:1], results):
        assert not {"set_std", "sets"} & set(cell)
    assert _recall(_cells(rows[:1], results)[0], "r_mean", seeds=2) == " 40.0 ± 1.0"


def test_pairs_that_differ_over_sets_are_a_rounded_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = entries(CONFIG, ["random"], ["9kB"], JUDGED, set_seeds=3)
    results = {row.label: result_of(40.0, std=1.0) for row in rows}
    for pairs, result in zip((10, 11, 10), results.values(), strict=True):
        result["set"]["pairs"] = pairs
    cells = _cells(rows, results)
    assert cells[0]["pairs"] == pytest.approx(31 / 3)
    titles, line, _ = csv.reader(as_csv(cells).splitlines())
    assert dict(zip(titles, line, strict=True))["pairs"] == "10"
    test = {"source": "x", "images": 1, "captions": 1}
    about = {"source": "x", "test": test, "protocol": {"name": "x"}, "notes": []}
    table = {**about, "cells": cells, "seeds": 1, "set_seeds": 3}
    print_comparison(str(tmp_path), table)
    assert "10.3" not in capsys.readouterr().out


def result_of(mean: float, std: float) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "mean": dict.fromkeys(MEASURES, mean),
        "std": dict.fromkeys(MEASURES, std),
    }
    figures["pixels_per_epoch"] = 100.0
    size = {"pairs": 10, "bytes": mean, "image_bytes": 7, "caption_bytes": 3, "pixels": 40}
    backbone = {"name": "small_vit", "trials": [{}, {}], **figures}
    return {"set": size, "backbones": [backbone], **figures}


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
        ("pds+budget=1MB", "budget is the same for all"),
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


def test_a_budget_takes_the_place_of_pairs() -> None:
    rows = entries(CONFIG, ["random", "pds+prune.ratio=0"], ["0.5MB", "2 MB"], JUDGED)
    assert [row.label for row in rows[:2]] == ["random-0.5MB", "random-2 MB"]
    assert [row.folder for row in rows] == [
        "sets/random-0.5MB",
        "sets/random-2_MB",
        "sets/pds+prune.ratio=0-0.5MB",
        "sets/pds+prune.ratio=0-2_MB",
    ]
    assert [(row.run.pairs, row.run.budget_bytes) for row in rows[:2]] == [
        (0, 500_000),
        (0, 2_000_000),
    ]
    (plain,) = entries(replace(CONFIG, {"budget": "1MB"}), ["random"], [10], JUDGED)
    assert (plain.run.pairs, plain.run.budget) == (10, "")


def cell(r_mean: float, **counts: float) -> dict[str, Any]:
    return {"mean": {**dict.fromkeys(MEASURES, 0.0), "r_mean": r_mean}, **counts}


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=15))
def test_the_frontier_is_what_nothing_smaller_reaches(points: list[tuple[int, int]]) -> None:
    found = frontier([cell(float(r), bytes=size) for size, r in points], "bytes")
    on_it = {(each["bytes"], each["mean"]["r_mean"]) for each in found}
    expected = {
        (size, r)
        for size, r in points
        if not any(
            (other <= size and better > r) or (other < size and better >= r)
            for other, better in points
        )
    }
    assert on_it == expected
    assert len(found) == len(expected)
    assert [each["bytes"] for each in found] == sorted(size for size, _ in expected)


def test_the_table_has_the_sizes_of_each_set() -> None:
    deviation = dict.fromkeys(MEASURES, 0.5)
    counts = {"bytes": 500, "pixels": 4096, "pixels_per_epoch": 8192.0}
    row = {**cell(3.0, **counts), "std": deviation}
    about = {"method": "pds", "pairs": 4, "backbone": "average", "trials": 2}
    (found,) = csv.DictReader(io.StringIO(as_csv([{**row, **about}])))
    names = ("pairs", "bytes", "pixels", "pixels_per_epoch", "r_mean mean")
    assert [found[name] for name in names] == ["4", "500", "4096", "8192", "3.0000"]


def test_the_table_of_a_folder(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert read_table(str(tmp_path)) is None
    folder.write_json(COMPARISON, {"cells": []})
    assert read_table(str(tmp_path)) == {"cells": []}
    folder.write_bytes(COMPARISON, b"{")
    with pytest.raises(ConfigError, match="cannot be read as a comparison"):
        read_table(str(tmp_path))


def test_cells_say_what_their_sets_and_their_training_cost(tmp_path: Path) -> None:
    """Bytes are those of the files, an epoch reads every pair at the side of the backbone."""
    path = scenes_set(tmp_path / "set", pairs=3)
    judged = replace(JUDGED, {"backbones": "small_conv,small_vit", "seeds": 1})
    entry = entries(CONFIG, ["random"], ["2MB"], judged)[0]
    candidate = Candidate(entry.label, str(path), judged.protocol)
    evaluation = make_evaluation([candidate], judged)
    trials = Folder(str(tmp_path / "trials"))
    for trial in evaluation.trials:
        counts = {"images": 60, "captions": 300, "bad": {}}
        found = {"seed": 0, "epoch": 1, "seconds": 1.0, "recalls": dict.fromkeys(MEASURES, 5.0)}
        splits = dict.fromkeys(evaluation.splits, counts)
        trials.write_json(f"{trial.key}.json", {**found, "splits": splits})
    cells = _cells([entry], {entry.label: _result(evaluation.sets[0], evaluation, trials)})
    images = sum(file.stat().st_size for file in (path / "imagefolder").glob("*.png"))
    captions = sum(len(text.encode()) + 1 for text in load_distilled(str(path)).captions)
    assert [cell["backbone"] for cell in cells] == ["small_conv", "small_vit", "average"]
    for found in cells:
        assert (found["pairs"], found["budget"], found["bytes"]) == (
            3,
            2_000_000,
            images + captions,
        )
        assert (found["pixels"], found["pixels_per_epoch"]) == (3 * 64**2, 3 * 64**2)
