"""The section on learned parts: images before and after, ratios, similarity, if they are there."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pds_ray.methods.pds import PDS_CARD
from pds_ray.report import learned as module
from pds_ray.report.figures import PALETTE
from pds_ray.report.gather import gather
from pds_ray.report.learned_figures import learned_figures
from pds_ray.report.page import render
from pds_ray.stages.extras import Extras
from pds_ray.stages.materialize import write_distilled
from pds_ray.store.learned import unpack
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.hand_made_set import learned_file, learned_tensors
from tests.support.synthetic_run import add_evaluation, make_run

PAIRS, SIDE = 6, 8
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
ABOUT = {
    "source": "nowhere",
    "method": "pds",
    "encoder": "toy",
    "decoder": "toy",
    "picture_origin": "real",
    "counts": {},
    "config": {},
}


def with_learned(path: Path, start: dict[str, np.ndarray] | None = None) -> RunFolder:
    """Writes a run whose set has learned parts; with `start`, all files of an optimisation."""
    run = RunFolder(Folder(str(make_run(path, PAIRS).path)))
    after = unpack(learned_file(learned_tensors(PAIRS, SIDE), mean=MEAN, std=STD))
    write_distilled(run, ABOUT, PDS_CARD, extras=Extras(learned=after))
    if start is not None:
        run.learning.save_start(*unpack(learned_file(start, mean=MEAN, std=STD)))
        columns = {"image": [1.0, 0.9, 0.8], "text": [1.0, 0.7, np.nan], "steps": [0.1, 0.1, 0.2]}
        run.learning.save_history(pa.table({"iteration": [0, 1, 2], **columns}))
    return run


def pixels(uri: str) -> np.ndarray:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).transpose(2, 0, 1) / 255


def by_hand(images: np.ndarray) -> np.ndarray:
    shape = (3, 1, 1)
    return images * np.reshape(STD, shape) + np.reshape(MEAN, shape)


def test_images_before_and_after_and_their_difference(tmp_path: Path) -> None:
    start = learned_tensors(PAIRS, SIDE, seed=1)
    run = with_learned(tmp_path / "run", start)
    found = gather(run.folder.path)["learned"]
    before, after = by_hand(start["images"]), by_hand(learned_tensors(PAIRS, SIDE)["images"])
    assert found["parts"] == ["images", "text", "similarity", "steps"]
    for pair, entry in enumerate(found["images"]):
        near = {"atol": 0.51 / 255}
        np.testing.assert_allclose(pixels(entry["start"]), before[pair].clip(0, 1), **near)
        np.testing.assert_allclose(pixels(entry["result"]), after[pair].clip(0, 1), **near)
        moved = 0.5 + found["factor"] * (after[pair] - before[pair])
        np.testing.assert_allclose(pixels(entry["difference"]), moved.clip(0, 1), atol=1 / 255)
    moved = np.abs(after - before) * found["factor"]
    assert (moved <= 0.5 + 1e-3).mean() >= 0.998, "nearly all is within what can be shown"


def test_ratios_and_similarity_are_charts(tmp_path: Path) -> None:
    start = {**learned_tensors(PAIRS, SIDE, seed=1), "similarity": np.eye(PAIRS, dtype=np.float32)}
    run = with_learned(tmp_path / "run", start)
    page = render(gather(run.folder.path))
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', page)[0])
    image, text = figures["learned-ratios"]["figure"]["data"]
    assert (image["name"], image["x"], image["y"]) == ("image", [0, 1, 2], [1.0, 0.9, 0.8])
    assert text["y"] == [1.0, 0.7, None]
    assert [trace["name"] for trace in figures["learned-losses"]["figure"]["data"]] == ["steps"]
    (heat,) = figures["similarity-before"]["figure"]["data"]
    assert heat["z"] == np.eye(PAIRS).tolist()
    (other,) = figures["similarity-after"]["figure"]["data"]
    after = learned_tensors(PAIRS, SIDE)["similarity"]
    np.testing.assert_allclose(other["z"], after, atol=1e-4)
    assert (heat["zmin"], heat["zmax"]) == (other["zmin"], other["zmax"])
    assert set(re.findall(r"#[0-9a-f]{6}", json.dumps(figures))) <= set(PALETTE)
    shown = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])["learned"]
    assert {*shown} == {"about", "parts", "pairs", "images", "factor"}


def test_a_set_without_its_optimisation_shows_the_result(tmp_path: Path) -> None:
    report = gather(with_learned(tmp_path / "run").folder.path)
    assert all({*entry} == {"pair", "result"} for entry in report["learned"]["images"])
    assert report["learned"]["history"] is None
    assert any("no images of before" in note for note in report["notes"])
    render(report)


def test_a_set_without_learned_parts_has_no_section(tmp_path: Path) -> None:
    report = gather(str(make_run(tmp_path / "run", PAIRS).path))
    assert report["learned"] is None
    assert "learned-ratios" not in render(report).partition('id="figures"')[2].partition("<")[0]


@pytest.mark.parametrize("file", ["start.safetensors", "history.parquet"])
def test_a_damaged_file_is_a_note(tmp_path: Path, file: str) -> None:
    run = with_learned(tmp_path / "run", learned_tensors(PAIRS, SIDE, seed=1))
    (tmp_path / "run" / file).write_bytes(b"x")
    report = gather(run.folder.path)
    assert report["learned"] is None
    assert any("cannot be shown" in note for note in report["notes"])


def test_a_long_history_is_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POINTS", 2)
    run = with_learned(tmp_path / "run", learned_tensors(PAIRS, SIDE, seed=1))
    history = gather(run.folder.path)["learned"]["history"]
    assert (history["iteration"], history["iterations"]) == ([0, 2], 3)


def test_validations_are_shown_where_there_were_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iteration 0 has a score alone, most others have none; none is thinned out."""
    monkeypatch.setattr(module, "POINTS", 2)
    run = with_learned(tmp_path / "run", learned_tensors(PAIRS, SIDE, seed=1))
    rows = [
        {"iteration": n, "image": n / 10 or None, "score": float(n) if n in (0, 5) else None}
        for n in range(9)
    ]
    run.learning.save_history(pa.Table.from_pylist(rows))
    report = gather(run.folder.path)
    history = report["learned"]["history"]
    assert history["iteration"] == [0, 5]
    assert history["others"]["score"] == [0.0, 5.0]
    assert history["ratios"]["image"] == [None, 0.5]
    assert "learned-losses" in render(report)


def test_what_only_some_iterations_have_is_drawn(tmp_path: Path) -> None:
    """A start that was validated has no ratios, and iterations between two validations no score."""
    run = with_learned(tmp_path / "run", learned_tensors(PAIRS, SIDE, seed=1))
    columns = {"image": [None, 0.9, 0.8], "text": [None, 0.7, 0.6], "score": [3.0, None, 4.0]}
    run.learning.save_history(pa.table({"iteration": [0, 1, 2], **columns}))
    report = gather(run.folder.path)
    history = report["learned"]["history"]
    assert history["ratios"]["image"] == [None, 0.9, 0.8]
    assert history["others"]["score"] == [3.0, None, 4.0]
    drawn = learned_figures(report["learned"])["learned-losses"]
    assert "score: from 3 to 4" in drawn["label"]
    assert all(trace["connectgaps"] for trace in drawn["figure"]["data"])


def test_evaluations_say_what_was_used(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", PAIRS)
    add_evaluation(made.path, backbones=("a", "b", "c"))
    (file,) = (made.path / "evaluation").glob("*.json")
    value = json.loads(file.read_text())
    value["backbones"][0]["used"], value["backbones"][1]["used"] = ["images", "text"], []
    file.write_text(json.dumps(value))
    backbones = gather(str(made.path))["evaluations"][0]["backbones"]
    assert [entry["used"] for entry in backbones] == ["images, text", "none", None]
