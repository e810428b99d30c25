"""Runs to a budget: what is chosen, what comes out, and that both come out again."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pds_ray import catalog
from pds_ray.config import ConfigError, EvaluateConfig, RunConfig, replace
from pds_ray.engine import plan
from pds_ray.engine.compare import compare
from pds_ray.engine.run import distill
from pds_ray.engine.status import status
from pds_ray.engine.upkeep import repair, verify
from pds_ray.modalities.image import decode_image
from pds_ray.recipes import recipe
from pds_ray.sources.base import Sample
from pds_ray.stages.budget import DRAWN, SAMPLE, SHARES, draw
from pds_ray.store.distilled_set import load_distilled

pytestmark = pytest.mark.ray
SOURCE, IMAGES, BUDGET = "scenes:300:3:0:100", 300, 9_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("budget")


def configured(shared: Path, name: str, **changes: Any) -> RunConfig:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    base = {
        "source": SOURCE,
        "out": str(shared / name),
        "embed.store": str(shared / "store"),
        "method": "random",
        "budget": f"{BUDGET} B",
    }
    return replace(recipe("demo"), {**base, **dotted})


def files(run: Path) -> dict[str, bytes]:
    folder = run / "distilled"
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def bytes_on_disk(run: Path) -> int:
    folder = run / "distilled/imagefolder"
    rows = (folder / "metadata.jsonl").read_text("utf-8").splitlines()
    captions = sum(len(json.loads(row)["text"].encode()) + 1 for row in rows)
    images = [path for path in folder.iterdir() if path.name != "metadata.jsonl"]
    assert len(images) == len(rows)
    return captions + sum(path.stat().st_size for path in images)


@pytest.fixture(scope="module")
def chosen(shared: Path) -> Path:
    distill(configured(shared, "random"))
    return shared / "random"


def test_the_set_fills_the_budget_and_no_more(chosen: Path) -> None:
    assert 0.9 * BUDGET < bytes_on_disk(chosen) <= BUDGET
    manifest = json.loads((chosen / "run.json").read_text())
    counts, pairs = manifest["stages"]["budget"]["counts"], load_distilled(str(chosen))
    assert len(pairs) <= counts["pairs"]
    assert {pairs.image(pair).size for pair in range(len(pairs))} == {(counts["image_size"],) * 2}
    assert pairs.manifest["about"]["config"]["pairs"] == counts["pairs"]
    assert pairs.manifest["about"]["counts"]["bytes allowed"] == BUDGET
    assert (manifest["config"]["pairs"], manifest["config"]["budget"]) == (0, f"{BUDGET} B")
    assert status(str(chosen))["stages"]["budget"] == "done"


def test_bytes_are_measured_on_images_of_the_source(chosen: Path) -> None:
    """Bytes are those of the drawn sample, by Pillow alone; captions have their line ends."""
    source = catalog.make_source(SOURCE)
    samples = {
        shard.name: [item for item in source.read(shard) if isinstance(item, Sample)]
        for shard in source.shards()
    }
    places = draw({shard: len(found) for shard, found in samples.items()}, 0)
    drawn = [samples[shard][row] for shard, rows, _ in places for row in rows]
    assert len(drawn) == SAMPLE
    written = json.loads((chosen / "budget.json").read_text())
    texts = [caption for sample in drawn for caption in sample.captions]
    captions = [len(f"{text}\n".encode()) for text in texts]
    assert written["caption_bytes"] == pytest.approx(np.mean(captions))
    by_way = {(e["side"], e["format"], e["quality"]): e["bytes"] for e in written["measured"]}
    assert {side for side, _, _ in by_way} == {round(64 * share) for share in SHARES}
    for side, format, quality, options in (
        (32, "png", None, {}),
        (48, "jpeg", 75, {"optimize": True}),
        (16, "webp", 50, {"method": 6}),
    ):
        sizes = []
        for sample in drawn:
            small = decode_image(sample.image).resize((side, side), Image.Resampling.LANCZOS)
            file = io.BytesIO()
            small.save(file, format, **options, **({"quality": quality} if quality else {}))
            sizes.append(len(file.getvalue()))
        assert by_way[side, format, quality] == pytest.approx(np.mean(sizes))


@pytest.mark.parametrize("stages", [["embed", "budget"], ["embed", "budget", "select", "decode"]])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    shared: Path, chosen: Path, stages: list[str]
) -> None:
    name = f"stopped-{len(stages)}"
    distill(configured(shared, name), only=stages)
    distill(configured(shared, name, ray__embed_workers=1))
    assert files(shared / name) == files(chosen)
    assert (shared / name / "budget.json").read_bytes() == (chosen / "budget.json").read_bytes()


def test_verify_guards_the_choice(chosen: Path) -> None:
    before, good = files(chosen), (chosen / "budget.json").read_bytes()
    assert verify(str(chosen), {})[1] == []
    (chosen / "budget.json").write_bytes(good.replace(b"kept", b"lost"))
    problems = verify(str(chosen), {})[1]
    assert [(problem.stage, problem.name) for problem in problems] == [("budget", "budget.json")]
    repair(str(chosen), problems, {})
    assert (files(chosen), (chosen / "budget.json").read_bytes()) == (before, good)


def test_soft_targets_of_as_many_pairs_as_fit_have_the_limit_of_others(
    shared: Path, chosen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number is known when the budget is settled: then, before the other stages."""
    shutil.copytree(chosen, shared / "soft")
    monkeypatch.setattr(plan, "SOFT_TARGETS_LIMIT", 4)
    with pytest.raises(ConfigError, match=r"pairs are more than 4; give --extras.similarity off"):
        distill(configured(shared, "soft", extras__similarity="clip"), redo=True)


def test_distilling_to_a_budget(shared: Path) -> None:
    """The pairs are the clusters; side and format are the same as of a selection."""
    config = configured(shared, "pds", method="pds", decode__decoder="nearest")
    distill(config)
    run = shared / "pds"
    assert 0.6 * BUDGET < bytes_on_disk(run) <= BUDGET
    counts = json.loads((run / "run.json").read_text())["stages"]
    assert counts["match"]["counts"]["clusters"] == counts["budget"]["counts"]["pairs"]


def test_bytes_of_drawn_images_are_those_of_the_decoder(shared: Path) -> None:
    """Its PNGs have several times the bytes of the flat drawings that it learned from."""
    options = {"method": "pds", "decode__format": "png", "decode__steps": 2}
    distill(
        configured(shared, "drawn", budget="30kB", **options), only=["embed", "prune", "budget"]
    )
    written = json.loads((shared / "drawn" / "budget.json").read_text())
    assert (written["sampled"], written["measured_on"]) == (SAMPLE, DRAWN)
    full = {each["side"]: each["bytes"] for each in written["measured"]}[64]
    assert full > 1_500, "a scene has some 550"


def test_pairs_that_are_given_get_the_largest_images_that_fit(shared: Path) -> None:
    config = configured(shared, "given", pairs=12, decode__format="webp", decode__quality=80)
    distill(config)
    pairs = load_distilled(str(shared / "given"))
    assert len(pairs) == 12
    assert pairs.size().bytes <= BUDGET
    assert {record["file_name"][-5:] for record in pairs.records} == {".webp"}
    assert pairs.image(0).size == (64, 64)


def test_what_cannot_fit_is_one_line(shared: Path) -> None:
    with pytest.raises(ConfigError, match=r"^budget is 50 bytes; a pair needs about \d+ at the"):
        distill(configured(shared, "tiny", budget="50B"))
    with pytest.raises(ConfigError, match=r"^budget is 9,000 bytes; 200 pairs need about "):
        distill(configured(shared, "many", pairs=200, decode__format="png"))


@pytest.mark.long
def test_a_comparison_of_budgets(shared: Path) -> None:
    """Random pairs stand beside the others; every cell says pairs, bytes and pixels."""
    config = replace(
        recipe("demo"),
        {"source": SOURCE, "out": str(shared / "table"), "decode.decoder": "nearest"},
    )
    judged = replace(
        EvaluateConfig(test="scenes:60:7", backbones="small_mixer", seeds=1),
        {"protocol.epochs": 2, "protocol.evaluate_every": 1},
    )
    table = compare(config, ["herding"], ["4kB", "9kB"], judged)
    cells = [cell for cell in table["cells"] if cell["backbone"] == "average"]
    rows = [("herding", 4000), ("herding", 9000), ("random", 4000), ("random", 9000)]
    assert [(cell["method"], cell["budget"]) for cell in cells] == rows
    for cell in cells:
        distilled = load_distilled(str(shared / "table" / cell["set"]))
        assert cell["bytes"] == bytes_on_disk(shared / "table" / cell["set"]) <= cell["budget"]
        assert (cell["pairs"], cell["pixels_per_epoch"]) == (len(distilled), len(distilled) * 64**2)
        assert cell["pixels"] == sum(
            np.prod(distilled.image(pair).size) for pair in range(len(distilled))
        )
