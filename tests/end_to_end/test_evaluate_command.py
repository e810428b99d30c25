"""`pds-ray evaluate` and `pds-ray compare` as a user meets them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pds_ray import load_distilled
from tests.end_to_end.test_user_errors import fails
from tests.support.command_line import SOURCE, Run, times
from tests.support.hand_made_set import save_set, scenes_set

RECALLS = ("tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10", "r_mean")
CAPTIONS_ALONE = "pds+match.filter=false+protocol.text=prototypes"
JUDGED = ["--test", "scenes:60:7", "--backbones", "small_mixer", "--seeds", "1",
          "--protocol.epochs", "3", "--protocol.evaluate-every", "1", "--trials", "1"]  # fmt: skip
COMPARE = ["compare", "--preset", "demo", "--source", SOURCE, "--decode.decoder", "nearest",
           "--pairs", "12", "--methods", f"random,pds,{CAPTIONS_ALONE}", *JUDGED]  # fmt: skip
SMALL = ["compare", "--preset", "demo", "--source", "scenes:50", "--pairs", "5"]


# --- results


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, pds_ray: Run
) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("compared") / "table"
    done = pds_ray(*COMPARE, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.mark.ray
def test_a_comparison_is_a_table(compared):
    out, done = compared
    table = json.loads((out / "comparison.json").read_text())
    methods = ["random", "pds", CAPTIONS_ALONE]
    assert [(cell["method"], cell["pairs"], cell["backbone"]) for cell in table["cells"]] == [
        (method, 12, backbone) for method in methods for backbone in ("small_mixer", "average")
    ]
    assert (table["source"], table["seeds"], table["test"]["images"]) == (SOURCE, 1, 60)
    assert table["test"]["captions"] == 300
    assert table["protocol"]["name"].startswith("standard, ")
    assert "epochs=3" in table["protocol"]["name"]
    for cell in table["cells"]:
        assert cell["trials"] == 1
        assert set(cell["std"].values()) == {0.0}, "one seed has no deviation"
        assert cell["mean"]["r_mean"] == pytest.approx(
            np.mean([cell["mean"][name] for name in RECALLS[:6]])
        )
        assert all(0 <= value <= 100 for value in cell["mean"].values())
        assert cell["mean"]["tr@1"] <= cell["mean"]["tr@5"] <= cell["mean"]["tr@10"]
        assert len(load_distilled(str(out / cell["set"]))) == 12
    for word in (*methods, "TR@1", "r_mean", "scenes:60:7"):
        assert word in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (out / "evaluation" / "trials" / "state").exists()


@pytest.mark.ray
def test_the_csv_says_what_the_json_says(compared):
    out, _ = compared
    cells = json.loads((out / "comparison.json").read_text())["cells"]
    rows = list(csv.DictReader(io.StringIO((out / "comparison.csv").read_text())))
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        assert (row["method"], row["pairs"], row["backbone"]) == (
            cell["method"],
            "12",
            cell["backbone"],
        )
        for name in RECALLS:
            for kind in ("mean", "std"):
                assert float(row[f"{name} {kind}"]) == pytest.approx(cell[kind][name], abs=1e-4)


@pytest.mark.ray
def test_methods_share_the_embeddings(compared):
    """Each set has a run folder of its own; a change of the protocol needs no new set."""
    out, _ = compared
    assert {path.name for path in (out / "sets").iterdir()} == {
        "random-12",
        "pds-12",
        "pds+match.filter=false-12",
    }
    assert len(list((out / "embeddings").iterdir())) == 1
    assert not list((out / "sets").glob("*/embeddings/*.parquet"))
    random, pds = (load_distilled(str(out / "sets" / name)) for name in ("random-12", "pds-12"))
    assert random.captions != pds.captions


@pytest.mark.ray
def test_a_repeated_comparison_does_nothing(compared, pds_ray: Run):
    out, done = compared
    diary = ("run.json", "report.html", "comparison.json", "comparison.csv")
    before, table = times(out, *diary), (out / "comparison.json").read_bytes()
    again = pds_ray(*COMPARE, "--out", str(out))
    assert again.returncode == 0, again.stderr
    after = times(out, *diary)

    def made(found: dict[Path, int]) -> dict[Path, int]:
        return {path: when for path, when in found.items() if "evaluation" not in path.parts[-2:]}

    assert made(after) == made(before)
    assert (out / "comparison.json").read_bytes() == table
    assert done.stdout.splitlines()[-5:] == again.stdout.splitlines()[-5:]


@pytest.mark.ray
def test_a_set_of_a_comparison_is_evaluated_to_the_same_figures(compared, pds_ray: Run):
    """The trials are found in the folder of the comparison, and none is run."""
    out, _ = compared
    trials = times(out / "evaluation" / "trials")
    done = pds_ray("evaluate", str(out / "sets" / "pds-12"), "--out", str(out), "--json", *JUDGED)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert times(out / "evaluation" / "trials") == trials
    cells = json.loads((out / "comparison.json").read_text())["cells"]
    expected = next(
        cell for cell in cells if cell["method"] == "pds" and cell["backbone"] == "small_mixer"
    )
    assert found["backbones"][0]["mean"] == expected["mean"]


@pytest.mark.long
@pytest.mark.ray
def test_a_set_alone(tmp_path: Path, pds_ray: Run):
    folder = scenes_set(tmp_path / "set")
    done = pds_ray("evaluate", str(folder), *JUDGED, "--seeds", "2", "--protocol", "paper")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (result,) = (folder / "evaluation").glob("*.json")
    assert result.name.startswith("paper-")
    assert str(result) in done.stdout
    found = json.loads(result.read_text())
    (backbone,) = found["backbones"]
    assert [trial["seed"] for trial in backbone["trials"]] == [0, 1]
    for name in RECALLS:
        values = [trial["recalls"][name] for trial in backbone["trials"]]
        assert found["mean"][name] == pytest.approx(np.mean(values))
        assert found["std"][name] == pytest.approx(np.std(values))
    assert "chosen on the test split" in done.stdout
    assert found["val"] is None
    assert len(load_distilled(str(folder))) == 12, "the set itself is as it was"


# --- user errors: one line, before Ray starts


@pytest.fixture(scope="module")
def a_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_set(tmp_path_factory.mktemp("set") / "set")


def images_alone(path: Path) -> str:
    """Write a tar of images without captions."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    with tarfile.open(path, "w") as tar:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
    return str(path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["no test split", "--test"]),
        (["--test", "scenes:many"], ["scenes:many"]),
        (["--test", "{tmp}/no/*.tar"], ["no tar shard matches"]),
        (["--test", "{images}"], ["none of the 20 samples", "caption"]),
        (["--test", "scenes:20:7", "--val", "{images}"], ["none of the 20 samples", "caption"]),
        (
            ["--test", "scenes:20:7", "--backbones", "nf_resnet51"],
            ["unknown backbone 'nf_resnet51'", "nf_resnet50"],
        ),
        (
            ["--test", "scenes:20:7", "--backbones", "resnet18:{tmp}/no.pt"],
            ["is no file", "resnet18:scratch"],
        ),
        (["--test", "scenes:20:7", "--backbones", ","], ["backbones", "at least one"]),
        (
            ["--test", "scenes:20:7", "--protocol", "papre"],
            ["unknown protocol 'papre'", "standard, paper"],
        ),
        (
            ["--test", "scenes:20:7", "--protocol.train", "nothing"],
            ["train is 'nothing'", "text_head, heads"],
        ),
        (["--test", "scenes:20:7", "--seeds", "0"], ["seeds is 0"]),
        (["--test", "scenes:20:7", "--protocol.text-encoder", "bert:{tmp}/no"], ["bert:FOLDER"]),
        (["--test", "scenes:20:7", "--protocol.text-encoder", "bert"], ["which model"]),
        (
            ["--test", "scenes:20:7", "--protocol.text-encoder", "ViT-B-32"],
            ["which weights", "ViT-B-32:openai"],
        ),
    ],
)
def test_a_user_error_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, a_set: Path, args: list[str], words
):
    """`evaluate` and `compare` say the same."""
    images = images_alone(tmp_path / "0.tar") if "{images}" in args else ""
    filled = [arg.replace("{tmp}", str(tmp_path)).replace("{images}", images) for arg in args]
    before = times(a_set)
    line = fails(capsys, "evaluate", str(a_set), *filled)
    assert all(word in line for word in words), line
    assert times(a_set) == before
    out = tmp_path / "table"
    line = fails(capsys, *SMALL, "--out", str(out), *filled)
    assert all(word in line for word in words), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--methods", "pds,magic"], ["unknown method 'magic'", "herding"]),
        (["--methods", "pds+prune.share=1"], ["unknown option prune.share", "prune.ratio"]),
        (["--methods", "pds+prune.ratio"], ["'prune.ratio' is no change", "FIELD=VALUE"]),
        (["--methods", "pds+prune.ratio=7"], ["prune.ratio is 7"]),
        (["--methods", "pds+protocol.train=x"], ["train is 'x'"]),
        (["--methods", "pds+protocol.text_encoder=bert:/no/such"], ["bert:FOLDER"]),
        (["--methods", "pds+decode.decoder=magic"], ["unknown decoder 'magic'"]),
        (["--pairs", "5,ten"], ["--pairs is '5,ten'", "whole numbers"]),
        (["--pairs", ""], ["--pairs is ''"]),
        (["--pairs", "0"], ["--pairs is '0'"]),
        (["--pairs", "5,60"], ["60 pairs asked for", "50 captioned images"]),
        (["--methods", ","], ["--methods"]),
        (["--source", ""], ["--source"]),
    ],
)
def test_a_user_error_of_compare_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], words
):
    out = tmp_path / "table"
    line = fails(capsys, *SMALL, "--test", "scenes:20", "--out", str(out), *args)
    assert all(word in line for word in words), line
    assert not out.exists()


def test_compare_without_a_folder_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "--out" in fails(capsys, "compare", "--source", "scenes:50", "--test", "scenes:20")


def test_a_folder_without_a_set_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    line = fails(capsys, "evaluate", str(tmp_path), "--test", "scenes:20")
    assert "is no distilled set" in line
    assert list(tmp_path.iterdir()) == []
    assert "is no distilled set" in fails(
        capsys, "evaluate", str(tmp_path / "none"), "--test", "scenes:20"
    )
    assert not (tmp_path / "none").exists()


def test_a_set_of_one_pair(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    line = fails(capsys, "evaluate", str(scenes_set(tmp_path / "set", 1)), "--test", "scenes:20")
    assert "has 1 pair" in line
    assert "at least 2" in line


def test_captions_are_needed_where_they_are_encoded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    folder = scenes_set(tmp_path / "set", captions=False)
    line = fails(
        capsys, "evaluate", str(folder), "--test", "scenes:20", "--protocol.text", "captions"
    )
    assert "12 of 12 pairs" in line
    assert "no caption" in line


def test_prototypes_of_another_clip(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, a_set: Path
):
    from tests.support.tiny_models import save_clip

    other = f"local-dir:{save_clip(tmp_path / 'clip')}"
    args = [
        "--test",
        "scenes:20",
        "--protocol.text",
        "prototypes",
        "--protocol.text-encoder",
        other,
    ]
    line = fails(capsys, "evaluate", str(a_set), *args)
    assert "do not fit" in line
    assert "--protocol.text captions" in line


def test_a_set_that_does_not_say_what_made_it(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = save_set(tmp_path / "set", [Image.new("RGB", (8, 8))] * 3, ["a", "b", "c"], np.eye(3))
    line = fails(capsys, "evaluate", str(folder), "--test", "scenes:20")
    assert "--protocol.text-encoder" in line


@pytest.mark.ray
def test_more_workers_than_there_is_room_for(a_set: Path, pds_ray: Run):
    before = times(a_set)
    done = pds_ray("evaluate", str(a_set), *JUDGED, "--workers", "3")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "3 workers" in line
    assert "--workers" in line
    assert times(a_set, ".lock") == before


# --- several sets per row, and the parts of a set


@pytest.mark.ray
@pytest.mark.long
def test_several_sets_per_row(tmp_path: Path, pds_ray: Run):
    """The row has the mean of its sets; a set alone, made with its seed, has the same figures."""
    hard = "random+protocol.targets=hard"
    common = ["--pairs", "12", "--extras.captions", "2", "--extras.similarity", "clip",
              "--protocol.targets", "soft", "--protocol.captions-per-image", "all"]  # fmt: skip
    command = [*COMPARE, *common, "--methods", f"random,{hard}", "--set-seeds", "2"]
    done = pds_ray(*command, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "two" / "comparison.json").read_text())
    assert table["set_seeds"] == 2
    names = ["random-12", "random+seed=1-12"]
    assert sorted(path.name for path in (tmp_path / "two" / "sets").iterdir()) == sorted(names)
    cells = {cell["method"]: cell for cell in table["cells"] if cell["backbone"] == "average"}
    assert cells["random"]["sets"] == [f"sets/{name}" for name in names]
    assert cells["random"]["mean"] != cells[hard]["mean"]
    for name in names:
        distilled = load_distilled(str(tmp_path / "two" / "sets" / name))
        assert distilled.similarity is not None
        assert {len(captions) for captions in distilled.caption_lists} == {3}
    means = []
    for seed in ("0", "1"):
        out, alone = str(tmp_path / seed), ["--methods", "random", "--seed", seed]
        assert pds_ray(*COMPARE, *common, *alone, "--out", out).returncode == 0
        (cell, _) = json.loads((tmp_path / seed / "comparison.json").read_text())["cells"]
        assert "set_std" not in cell
        means.append(cell["mean"]["r_mean"])
    assert cells["random"]["mean"]["r_mean"] == pytest.approx(np.mean(means), abs=0.5)
    assert cells["random"]["set_std"]["r_mean"] == pytest.approx(np.std(means), abs=0.5)
    with (tmp_path / "two" / "comparison.csv").open() as file:
        row = next(iter(csv.DictReader(file)))
    assert float(row["r_mean set std"]) == pytest.approx(
        cells["random"]["set_std"]["r_mean"], abs=1e-4
    )
    assert "over models / over sets" in done.stdout


@pytest.mark.ray
@pytest.mark.long
def test_a_world_of_real_images(tmp_path: Path, pds_ray: Run, shared_data: Path):
    """Real drawings and photographs, with a pretrained backbone that is kept frozen."""
    clipart, models = shared_data / "clipart", shared_data / "models"
    weights = models / "tf_efficientnet_lite0.safetensors"
    done = pds_ray(
        "compare", "--source", str(clipart / "val-*.tar"), "--test", str(clipart / "test-*.tar"),
        "--encoder", f"local-dir:{models / 'clipart_clip'}", "--methods", "random,pds",
        "--backbones", f"tf_efficientnet_lite0:{weights}", "--decode.decoder", "nearest",
        "--decode.image-size", "0", "--protocol.train", "heads", "--protocol.fit", "crop",
        "--protocol.subjects", "caption", "--protocol.select", "last", "--extras.captions", "4",
        "--protocol.captions-per-image", "all", "--pairs", "40", "--seeds", "1",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "comparison.json").read_text())
    assert (table["test"]["images"], table["test"]["bad"]) == (274, {})
    by_chance = 100 * 10 / 274  # of subjects that share captions a little more
    for cell in table["cells"]:
        assert 2 * by_chance < cell["mean"]["ir@10"] < 100
    distilled = load_distilled(str(tmp_path / "sets" / "random-40"))
    assert len({distilled.image(pair).size for pair in range(40)}) > 5, "images as they are"
    assert sum(map(len, distilled.caption_lists)) > 80
