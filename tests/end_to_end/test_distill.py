"""A whole run from the command line, and its results."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pds_ray import load_distilled
from pds_ray.encoders.open_clip import demo_folder
from pds_ray.sources.scenes import ScenesSource
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.command_line import (
    DEMO,
    SOURCE,
    Run,
    check_same,
    content,
    process,
    stages,
    times,
)

pytestmark = pytest.mark.ray
Finished = tuple[Path, subprocess.CompletedProcess]


def test_the_run_folder_keeps_its_contract(finished: Finished) -> None:
    run, _ = finished
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    for shard in ("scenes-00000", "scenes-00001", "scenes-00002"):
        assert {
            f"embeddings/{shard}.{table}.parquet" for table in ("images", "captions", "errors")
        } <= names
        assert f"embeddings/{shard}.json" in names
        assert {f"pruning/{shard}.keep.parquet", f"clusters/{shard}.labels.parquet"} <= names
    one_of_each = "run.json", "embeddings/store", "matching/couples.parquet", "prototypes.parquet"
    assert {*one_of_each, "clusters/image.safetensors", "clusters/text.safetensors"} <= names
    assert {f"images/{pair:06d}.png" for pair in range(24)} <= names
    assert not [name for name in names if name.endswith((".part", ".pkl", ".pt", ".npy"))]
    manifest = json.loads((run / "run.json").read_text())
    counts = {name: entry["counts"] for name, entry in manifest["stages"].items()}
    embed = counts["embed"]
    assert (embed["images"], embed["pairs"], embed["bad"]) == (90, 450, 0)
    assert counts["prune"]["dropped"] == 90
    assert counts["match"]["shared_pairs"] + counts["match"]["pairs_not_shared"] == 360
    assert counts["prototypes"]["prototypes"] == counts["materialize"]["pairs"] == 24


def test_the_summary_tells_what_happened(finished: Finished) -> None:
    run, done = finished
    for text in (
        "450 pairs of 90 images",
        "90 pairs of lowest",
        "24 pairs",
        "images/s",
        str(run / "distilled"),
    ):
        assert text in done.stdout
    for stage in ("embed", "prune", "cluster", "match", "prototypes", "decode"):
        assert f"{stage:<12}" in done.stderr, "a stage without progress"
    assert "Traceback" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr


def test_a_caption_is_the_nearest_to_its_image(finished: Finished) -> None:
    """By open_clip's own transform and model over every caption of the source."""
    import open_clip
    import torch

    run, _ = finished
    pairs = load_distilled(str(run))
    source = ScenesSource(SOURCE)
    captions = [
        text
        for shard in source.shards()
        for sample in source.read(shard)
        for text in sample.captions
    ]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{demo_folder()}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{demo_folder()}")
    with torch.inference_mode():
        image = model.eval().encode_image(
            torch.stack([transform(pairs.image(i)) for i in range(24)]), normalize=True
        )
        text = torch.cat(
            [
                model.encode_text(tokenizer(captions[i : i + 150]), normalize=True)
                for i in range(0, 450, 150)
            ]
        )
    cosine = (image @ text.T).numpy()
    for pair, record in enumerate(pairs.records):
        chosen = cosine[pair, captions.index(pairs.captions[pair])]
        assert chosen >= cosine[pair].max() - 2e-3  # stored as float16
        assert abs(record["caption_cosine"] - cosine[pair].max()) < 2e-3


def test_the_distilled_set_is_true(finished: Finished) -> None:
    run, _ = finished
    pairs = load_distilled(str(run))
    assert len(pairs) == 24
    source = ScenesSource(SOURCE)
    known = {
        caption
        for shard in source.shards()
        for sample in source.read(shard)
        for caption in sample.captions
    }
    assert set(pairs.captions) <= known, "captions are real captions of the source"
    image, text = pairs.image_prototypes, pairs.text_prototypes
    cosine = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    assert (np.diff(cosine) <= 1e-6).all()
    np.testing.assert_allclose(cosine, [record["cosine"] for record in pairs.records], atol=1e-5)
    for pair in range(24):
        pixels = np.asarray(pairs.image(pair))
        assert pixels.std() > 2, "an empty image"
        assert np.array_equal(pixels, np.asarray(Image.open(run / "images" / f"{pair:06d}.png")))
    assert [record["prompt"] for record in pairs.records] == RunFolder(
        Folder(str(run))
    ).prototypes()["caption"].to_pylist()
    for name, file in pairs.manifest["files"].items():
        assert hashlib.sha256((run / "distilled" / name).read_bytes()).hexdigest() == file["sha256"]


def test_repeating_the_command_does_nothing(finished: Finished, pds_ray: Run) -> None:
    run, _ = finished
    before = times(run, "run.json", "report.html")
    again = pds_ray("distill", *DEMO, "--out", str(run))
    assert again.returncode == 0
    assert times(run, "run.json", "report.html") == before


@pytest.mark.long
def test_a_process_with_other_workers_and_batches_gives_the_same_bytes(
    finished: Finished, tmp_path: Path
) -> None:
    """A Ray of its own with one CPU; two batches per shard, where the reference has one."""
    run = tmp_path / "run"
    options = ("--ray.num_cpus", "1", "--ray.object_store_gib", "0.3", "--embed.batch_size", "16")
    done = process("distill", *DEMO, "--out", str(run), *options)
    assert done.returncode == 0, done.stderr
    assert "24 pairs" in done.stdout
    assert done.stderr.splitlines()[-1] == "pds-ray: distill done"
    assert "Traceback" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr
    check_same(run, finished[0])


def test_a_changed_option_redoes_what_depends_on_it(
    finished: Finished, pds_ray: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    refused = pds_ray("distill", *DEMO, "--out", str(run), "--decode.decoder", "nearest")
    assert refused.returncode == 2
    assert "decode.decoder: unclip -> nearest" in refused.stderr
    assert content(run) == content(finished[0])
    redone = pds_ray("distill", *DEMO, "--out", str(run), "--decode.decoder", "nearest", "--redo")
    assert redone.returncode == 0, redone.stderr
    before, after = content(finished[0]), content(run)
    changed = {name.split("/")[0] for name in after if after[name] != before.get(name)}
    assert changed == {"images", "captions.parquet", "distilled", "hashes"}
    assert set(stages(run).values()) == {"done"}


def test_two_runs_share_an_embedding_store(
    finished: Finished, pds_ray: Run, tmp_path: Path
) -> None:
    store = str(finished[0] / "embeddings")
    run = tmp_path / "run"
    options = ("--embed.store", store, "--decoder", "nearest", "--pairs", "12")
    done = pds_ray("distill", *DEMO, "--out", str(run), *options)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["stages"]["embed"]["counts"]["images_reused"] == 90
    assert not (run / "embeddings").exists()
    assert len(load_distilled(str(run))) == 12


def test_show(finished: Finished, pds_ray: Run, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    shown = pds_ray("show", str(finished[0]), "--sheet", str(sheet))
    assert shown.returncode == 0
    assert "450 pairs of 90 images" in shown.stdout
    assert Image.open(sheet).width > 1000
    as_json = json.loads(pds_ray("show", str(finished[0]), "--json").stdout)
    assert as_json["stages"]["decode"]["status"] == "done"


def test_dry_run_prints_a_configuration_that_can_be_used(pds_ray: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    dry = pds_ray("distill", *DEMO, "--out", str(out), "--dry-run", "--prune.ratio", "0.31")
    assert dry.returncode == 0, dry.stderr
    assert not out.exists()
    assert SOURCE in dry.stdout.partition("# the resolved configuration")[0]
    file = tmp_path / "run.yaml"
    file.write_text(dry.stdout)
    again = pds_ray("distill", "--config", str(file), "--dry-run")
    assert again.stdout == dry.stdout
    assert "ratio: 0.31" in again.stdout


def test_doctor(pds_ray: Run) -> None:
    healthy = pds_ray("doctor")
    assert healthy.returncode == 0, healthy.stdout
    for topic in ("cpus", "memory", "disk", "ray's files", "home", "cache", "characters"):
        assert f" {topic} " in healthy.stdout
    for topic in ("open files", "versions", "demo models", "weights"):
        assert topic in healthy.stdout
