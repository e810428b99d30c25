"""pds-ray bench with the built-in models at small sizes, and pds-ray plan from what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pds_ray.cli import main as cli
from pds_ray.methods.pds import PDS
from pds_ray.planning import bench

pytestmark = [pytest.mark.ray, pytest.mark.long]
QUICK = ["--preset", "demo", "--decode.steps", "2", "--decode.batch_size", "4"]
QUICK += ["--embed.batch_size", "32"]


def run(*args: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "new" / "rates.json"
    with pytest.MonkeyPatch.context() as patch:
        for name, small in (("RUNS", 1), ("SHARD_PAIRS", 2000), ("CLUSTERS", 50)):
            patch.setattr(bench, name, small)
        run("bench", *QUICK, "--out", str(path))
    return path


def test_the_file_names_models_sources_and_machine(rates: Path) -> None:
    data = json.loads(rates.read_text())
    assert data["schema"] == 1
    assert data["encoder"] == {"name": "demo", "dim": 128, "size": 64}
    assert data["decoder"]["passes"] == 4
    assert data["machine"]["cpus"] >= 1
    assert data["machine"]["memory_bytes"] > 2**28
    assert {"python", "torch", "ray"} <= data["versions"].keys()
    assert set(data["sources"]) == {"jpeg", "scenes:10000"}
    for stage in PDS.names:
        assert data["figures"][f"start_{stage}"]["unit"] == "s"


def test_figures_are_positive_and_in_their_range(rates: Path) -> None:
    data = json.loads(rates.read_text())
    everything = [
        *data["figures"].items(),
        *(item for found in data["sources"].values() for item in found.items()),
    ]
    assert len(everything) > 30
    for name, figure in everything:
        low, high = sorted((figure["worst"], figure["best"]))
        assert low <= figure["value"] <= high, name
        assert high > 0 or name.startswith("start_"), name
        longer_is_worse = figure["unit"] in ("s", "bytes")
        assert figure["worst"] == (high if longer_is_worse else low), name


def test_figures_agree_with_each_other(rates: Path) -> None:
    data = json.loads(rates.read_text())
    figures, sources = data["figures"], data["sources"]
    jpeg, scenes = sources["jpeg"], sources["scenes:10000"]
    for name in ("encode_images", "encode_captions"):
        by_batch = [
            figure["value"] for size, figure in figures.items() if size.startswith(f"{name}@")
        ]
        assert len(by_batch) > 1
        assert figures[name]["value"] == max(by_batch)
    assert figures["draw_with_start"]["value"] < 4 / figures["load_decoder"]["value"]
    assert 20_000 < jpeg["image_bytes"]["value"] < 30_000  # 341 x 256 pixels; a scene has 64 x 64
    assert scenes["image_bytes"]["value"] < 2_000
    assert jpeg["preprocess"]["value"] < scenes["preprocess"]["value"]
    assert 10 < figures["text"]["value"] < 500


def test_a_plan_uses_them(rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run("plan", *QUICK, "--source", "scenes:3000", "--rates", str(rates), "--json")
    plan, data = json.loads(capsys.readouterr().out), json.loads(rates.read_text())
    figures = data["figures"]
    assert plan["workload"]["images"] == 3000
    assert plan["cluster"]["cpus"] == data["machine"]["cpus"]
    embed = plan["stages"][0]
    rates_used = {demand["what"]: demand["rate"] for phase in embed["phases"] for demand in phase}
    assert rates_used["encode images"]["value"] == figures["encode_images@32"]["value"]
    assert rates_used["read"]["value"] == data["sources"]["scenes:10000"]["read"]["value"]
    assert rates_used["encode captions"]["origin"].startswith("measured on ")
    assert embed["start"]["value"] == figures["start_embed"]["value"]
    assert embed["seconds"] > embed["start"]["value"]


def test_plans_of_web_data_use_the_jpegs(rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run("plan", *QUICK, "--pairs-in", "1M", "--rates", str(rates), "--json")
    plan, data = json.loads(capsys.readouterr().out), json.loads(rates.read_text())
    rates_used = {
        demand["what"]: demand["rate"] for phase in plan["stages"][0]["phases"] for demand in phase
    }
    assert rates_used["read"]["value"] == data["sources"]["jpeg"]["read"]["value"]
