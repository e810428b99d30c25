"""pds-ray plan from the command line: its output, and refusals in one line with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pds_ray.cli import main as cli
from pds_ray.methods.coverage import COVERAGE
from pds_ray.methods.pds import PDS

WEB = ["plan", "--pairs-in", "400M", "--encoder", "ViT-L-14", "--pairs", "100000"]
WEB += ["--gpus", "64xH100"]


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_a_plan_names_every_stage_its_bottleneck_and_its_formulas(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, *WEB)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "source    400,000,000 pairs of 400,000,000 images, 9.60 TB, 40,000 shards"
    assert lines[1] == "machines  64 x H100, 512 CPU cores"
    for stage in PDS.names:
        assert any(line.startswith(f"{stage:<12} ") for line in lines)
        assert any(line.startswith(f"{stage}: start ") for line in lines)
    assert (
        "encode images: 4.00e+08 images / 1,068 images/s per GPU = 104 GPU-h, at most 64 at once"
        in out
    )
    assert "989 TFLOP/s x 17.5% / 162 GFLOP (published: clip-retrieval" in out
    assert "assumed, every one" in out
    assert "label image vectors: " in out
    assert "989 TFLOP/s x 10.0% (assumed: bf16 products" in out
    assert "k-means is planned on CPUs" not in out
    assert "of memory on the driver, in match" in out


def test_a_plan_of_coverage_has_its_stages_and_no_k_means(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, *WEB, "--method", "coverage")
    assert (code, err) == (0, "")
    named = [line.split()[0] for line in out.splitlines() if line]
    assert [name for name in named if name in COVERAGE.names] == list(COVERAGE.names)
    assert "k-means" not in out


def test_a_plan_of_an_optimisation_counts_experts_as_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ("--pairs", "100", "--experts.backbone", "small_conv", "--experts.gpus", "0.5")
    code, out, err = run(capsys, *WEB, *few, "--method", "lors", "--experts.count", "8")
    assert (code, err) == (0, "")
    assert "GPU-h, at most 4 at once [989 TFLOP/s x 3.0% (assumed: float32" in out
    for stage in ("experts", "optimise"):
        assert any(line.startswith(f"{stage:<12} ") for line in out.splitlines())


def test_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *WEB, "--json")
    plan = json.loads(out)
    assert code == 0
    assert [stage["name"] for stage in plan["stages"]] == list(PDS.names)
    assert plan["workload"] == {
        "images": 400_000_000,
        "pairs": 400_000_000,
        "bytes": 9.6e12,
        "shards": 40_000,
        "remote": True,
    }
    named = {"seconds", "bottleneck", "gpu_hours", "core_hours", "disk_bytes", "usd", "phases"}
    assert all(named <= stage.keys() for stage in plan["stages"])


def test_captions_share_an_image(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *WEB, "--captions-per-image", "5", "--bytes-per-pair", "5k", "--json")
    work = json.loads(out)["workload"]
    assert (work["images"], work["pairs"]) == (80_000_000, 400_000_000)
    assert (work["bytes"], work["shards"]) == (2e12, 8_000)


WEB_PAIRS = ["--pairs-in", "400M"]
ONE_GPU = [*WEB_PAIRS, "--gpus", "1xH100"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpus", "0", "--cpus", "8"], ["plan what?", "--pairs-in", "--source"]),
        (WEB_PAIRS, ["which machines?", "--gpus", "pds-ray bench"]),
        ([*ONE_GPU, "--source", "scenes:10"], ["give one of them"]),
        (["--pairs-in", "lots", "--gpus", "1xH100"], ["--pairs-in is 'lots'", "400M"]),
        ([*ONE_GPU, "--captions-per-image", "0"], ["--captions-per-image is '0'"]),
        ([*ONE_GPU, "--bytes-per-pair", "24kB"], ["--bytes-per-pair is '24kB'"]),
        ([*WEB_PAIRS, "--gpus", "64xP100"], ["--gpus is '64xP100'", "64xH100", "A100"]),
        ([*WEB_PAIRS, "--gpus", "0"], ["--cpus"]),
        ([*WEB_PAIRS, "--gpus", "0", "--cpus", "-3"], ["--cpus is '-3'"]),
        ([*ONE_GPU, "--rates", "no.json"], ["no.json", "pds-ray bench"]),
        ([*ONE_GPU, "--prices", "no.yaml"], ["no.yaml"]),
        ([*ONE_GPU, "--encoder", "RN50"], ["encoder RN50", "ViT-L-14"]),
        ([*ONE_GPU, "--prune.ratio", "2"], ["prune.ratio is 2.0"]),
        (["--source", "scenes:many", "--gpus", "1xH100"], ["scenes:many"]),
    ],
)
def test_refusals_are_one_line(
    capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    code, out, err = run(capsys, "plan", *args)
    assert (code, out) == (2, "")
    (line,) = err.strip().splitlines()
    assert all(word in line for word in words), line
