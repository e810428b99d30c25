"""User errors end in one line and exit code 2, before Ray starts and anything is written.

The bounds of each option are tried in tests/unit/test_config.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pds_ray.cli import main as cli

DEMO = ["distill", "--preset", "demo"]
SOURCE = ["--source", "scenes:50"]


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Runs the command line in this process; returns its one line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("pds-ray: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*SOURCE, "--pairs", "60"], ["60 pairs asked for", "50 captioned images", "--pairs"]),
        (["--source", "scenes:many"], ["scenes:many", "scenes:N"]),
        (["--source", "{tmp}/no/*.tar"], ["no tar shard matches", "/no/*.tar"]),
        (["--source", "flickr30k:{tmp}"], ["flickr30k_train.json", "{tmp}"]),
        ([*SOURCE, "--pairs", "0"], ["pairs is 0", "positive"]),
        ([*SOURCE, "--only", "embedd"], ["--only names 'embedd'", "embed, prune, cluster"]),
        ([*SOURCE, "--rm_ratio", "-1"], ["prune.ratio is -1.0"]),
        ([*SOURCE, "--encoder", "ViT-L-15:openai"], ["ViT-L-15", "ViT-L-14"]),
        ([*SOURCE, "--encoder", "ViT-B-32"], ["which weights", "ViT-B-32:openai"]),
        ([*SOURCE, "--encoder", "ViT-B-32:no"], ["neither a file nor a tag", "laion2b_s34b_b79k"]),
        ([*SOURCE, "--encoder", "local-dir:{tmp}"], ["open_clip_config.json", "{tmp}"]),
        ([*SOURCE, "--decoder", "magic"], ["unknown decoder 'magic'", "unclip, nearest"]),
        ([*SOURCE, "--decoder-model", "{tmp}"], ["model_index.json"]),
        ([*SOURCE, "--preset", "fast"], ["unknown preset 'fast'", "demo"]),
        ([*SOURCE, "--config", "{tmp}/no.yaml"], ["cannot read --config", "no.yaml"]),
        ([*SOURCE, "--frobnicate", "1"], ["--frobnicate"]),
        (["--source", "s4://bucket/x.tar"], ["s4://bucket/x.tar"]),
    ],
)  # fmt: skip
def test_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], words: list[str]
) -> None:
    out = tmp_path / "out"
    filled = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    pairs = [] if "--pairs" in args else ["--pairs", "5"]
    line = fails(capsys, *DEMO, "--out", str(out), *pairs, *filled)
    for word in words:
        assert word.replace("{tmp}", str(tmp_path)) in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["give --method", "herding, k_center"]),
        (["--method", "pds"], ["give --method", "herding, k_center"]),
        (["--method", "magic"], ["method is 'magic'", "herding, k_center"]),
        (
            ["--method", "random", "--pairs", "60"],
            ["60 pairs asked for", "50 captioned images", "--pairs"],
        ),
        (["--method", "random", "--prune.ratio", "0.1"], ["--prune.ratio"]),
    ],
)
def test_one_clear_line_of_select(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], words: list[str]
) -> None:
    out = tmp_path / "out"
    line = fails(
        capsys,
        "select",
        "--preset",
        "demo",
        "--source",
        "scenes:50",
        "--pairs",
        "5",
        "--out",
        str(out),
        *args,
    )
    assert all(word in line for word in words), line
    assert not out.exists()


def test_source_and_out_are_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "give --source" in fails(capsys, "distill", "--out", str(tmp_path / "x"))
    assert "give --out" in fails(capsys, *DEMO)


def test_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    line = fails(
        capsys,
        *DEMO,
        "--source",
        "scenes:20",
        "--pairs",
        "5",
        "--out",
        str(tmp_path / "file" / "run"),
    )
    assert "cannot write to" in line
    assert "file/run" in line


def test_source_without_captions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import io
    import tarfile

    from PIL import Image

    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
    line = fails(
        capsys,
        *DEMO,
        "--source",
        str(tmp_path / "0.tar"),
        "--pairs",
        "5",
        "--out",
        str(tmp_path / "out"),
    )
    assert "no sample of" in line
    assert "(missing_caption: 20; such as " in line
    assert "caption" in line


def test_karpathy_folder_with_missing_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [
        {"image": f"flickr30k-images/{n}.jpg", "caption": "x", "image_id": str(n)} for n in range(9)
    ]
    (tmp_path / "flickr30k_train.json").write_text(json.dumps(rows))
    (tmp_path / "flickr30k-images").mkdir()
    (tmp_path / "flickr30k-images" / "0.jpg").touch()
    line = fails(
        capsys,
        *DEMO,
        "--source",
        f"flickr30k:{tmp_path}",
        "--pairs",
        "5",
        "--out",
        str(tmp_path / "out"),
    )
    assert "8" in line
    assert "flickr30k-images/1.jpg" in line


def test_encoder_and_decoder_of_different_spaces(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    from pds_ray.encoders.open_clip import demo_folder

    folder = tmp_path / "clip"
    shutil.copytree(demo_folder(), folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["logit_scale"] = np.asarray(weights["logit_scale"] + 1)  # other weights, same width
    save_file(weights, folder / "open_clip_model.safetensors")
    base = [*DEMO, "--source", "scenes:20", "--pairs", "5", "--out", str(tmp_path / "out")]
    line = fails(capsys, *base, "--encoder", f"local-dir:{folder}", "--decode.model", "demo")
    assert "same width, other space" in line
    assert "no unCLIP decoder is known" in fails(capsys, *base, "--encoder", f"local-dir:{folder}")


def test_models_are_tried_before_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import shutil

    from pds_ray.decoders import unclip
    from pds_ray.encoders import open_clip

    clip = shutil.copytree(open_clip.demo_folder(), tmp_path / "clip")
    maker = shutil.copytree(unclip.demo_folder(), tmp_path / "unclip")
    weights = clip / "open_clip_model.safetensors"
    unet = maker / "unet" / "diffusion_pytorch_model.safetensors"
    for file in (weights, unet):
        file.write_bytes(file.read_bytes()[:-9])
    base = [*DEMO, "--source", "scenes:20", "--pairs", "5", "--out", str(tmp_path / "out")]
    assert f"{weights} are cut off" in fails(capsys, *base, "--encoder", f"local-dir:{clip}")
    assert f"{unet} are cut off" in fails(capsys, *base, "--decode.model", str(maker))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_what_only_a_worker_finds_is_one_line_too(tmp_path: Path, model: str) -> None:
    """Weights that went after the checks: no retries, and no trace of Ray's on the terminal."""
    out = str(tmp_path / "out")
    small = ["--ray.num-cpus", "2", "--ray.object-store-gib", "0.2"]
    args = [*DEMO, "--source", "scenes:40", "--pairs", "4", "--out", out, *small]
    code = f"""
import dataclasses
from pds_ray import catalog
from pds_ray.cli import main as cli
describe = catalog.describe_{model}
def gone(*args):
    args_of_load = (("model_name", "local-dir:/gone"), ("model", "/gone"), ("revision", None))
    kept = dict(describe(*args).load_args)
    args_of_load = tuple((name, value) for name, value in args_of_load if name in kept)
    return dataclasses.replace(describe(*args), load_args=args_of_load)
catalog.describe_{model} = gone
cli.main({args!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 2
    bar = re.compile(r"\w+ +:")
    (about,) = (line for line in done.stderr.splitlines() if not bar.match(line))
    assert "cannot load" in about


def test_not_a_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is no run folder" in fails(capsys, "show", str(tmp_path))
    (tmp_path / "run.json").write_text("{ not json")
    assert "is not a run manifest" in fails(capsys, "show", str(tmp_path))


def test_yaml_with_an_unknown_field(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("prune:\n  share: 0.3\n")
    assert "unknown option prune.share; known: prune.ratio" in fails(
        capsys, *DEMO, "--config", str(file)
    )


def test_verbose_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scenes"):
        cli.main([*DEMO, "--source", "scenes:no", "--out", str(tmp_path), "-v"])


def test_options_of_the_authors_script() -> None:
    """Their names for things reach the same fields."""
    args = (
        "distill --num_pairs 300 --rm_ratio 0.1 --steps 7 --guidance 2 --noise 3"
        " --normalize_embedding true --image_size 96"
    )
    config = cli.resolve(cli.build_parser().parse_args(args.split()))
    assert (config.pairs, config.prune.ratio, config.decode.steps, config.decode.guidance) == (
        300,
        0.1,
        7,
        2.0,
    )
    assert (config.decode.noise_level, config.cluster.normalize, config.decode.image_size) == (
        3,
        True,
        96,
    )
