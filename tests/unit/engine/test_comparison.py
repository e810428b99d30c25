"""Rows of a comparison, and the table of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pds_ray.config import ConfigError, EvaluateConfig, replace
from pds_ray.engine.compare import ABLATIONS, ablations, entries
from pds_ray.recipes import recipe

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
