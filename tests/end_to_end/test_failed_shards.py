"""Shards that cannot be used are failed shards; once mended, they alone are embedded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pds_ray.store.distilled_set import DISTILLED
from tests.support.command_line import Run
from tests.support.poisoned import write_shard

pytestmark = [pytest.mark.ray, pytest.mark.long]
OPTIONS = ["--preset", "demo", "--decode.decoder", "nearest", "--pairs", "4",
           "--ray.max_failed_share", "1", "--ray.max_bad_share", "1"]  # fmt: skip


def test_mended_shards_alone_are_embedded_again(tmp_path: Path, pds_ray: Run) -> None:
    """The set is then that of a run which found them whole, to the byte."""
    source, run, fresh = tmp_path / "source", tmp_path / "run", tmp_path / "fresh"
    source.mkdir()
    options = [*OPTIONS, "--source", f"{source}/*.tar"]
    for number in range(4):
        write_shard(source / f"{number}.tar", {}, samples=12, seed=number)
    good = {name: (source / f"{name}.tar").read_bytes() for name in "0123"}
    (source / "1.tar").write_text("<html><title>404 Not Found</title></html>\n")
    (source / "2.tar").write_bytes(good["2"][: len(good["2"]) // 2])
    (source / "3.tar").rename(tmp_path / "away.tar")
    (source / "3.tar").symlink_to("nowhere.tar")
    (source / "4.tar").mkdir()

    first = pds_ray("distill", *options, "--out", str(run))
    assert first.returncode == 0, first.stderr
    embed = json.loads((run / "run.json").read_text())["stages"]["embed"]["counts"]
    assert embed["failed_shards"] == 4
    assert embed["failed"]["1"].startswith("not_a_tar: ")
    assert embed["failed"]["2"].startswith("truncated_shard: ")
    assert "No such file" in embed["failed"]["3"]
    assert "folder" in embed["failed"]["4"]
    for name in "1234":
        assert f"\n  {name:<20} {embed['failed'][name]}\n" in first.stdout
    assert 12 < embed["images"] < 24, "what was read before the damage is not kept"
    assert pds_ray("verify", str(run)).returncode == 0

    (source / "4.tar").rmdir()
    for name in "13":
        (source / f"{name}.tar").unlink()
        (source / f"{name}.tar").write_bytes(good[name])
    before = {path.name: path.stat().st_mtime_ns for path in (run / "embeddings").glob("[02].*")}
    again = pds_ray("retry-failed", str(run))
    assert again.returncode == 0, again.stderr
    assert "not tried again: 1 damaged shards (2)" in again.stderr
    after = {path.name: path.stat().st_mtime_ns for path in (run / "embeddings").glob("[02].*")}
    assert after == before
    nothing = pds_ray("verify", str(run))
    assert nothing.returncode == 0, nothing.stdout

    (source / "2.tar").write_bytes(good["2"])
    assert pds_ray("retry-failed", str(run)).returncode == 0
    assert pds_ray("distill", *options, "--out", str(run)).returncode == 0
    whole = ["--source", f"{source}/{{0..3}}.tar", "--out", str(fresh)]
    assert pds_ray("distill", *OPTIONS, *whole).returncode == 0
    tables = [path.name for path in (fresh / "embeddings").glob("?.*.parquet")]
    assert len(tables) == 12
    for name in tables:
        mended, found = run / "embeddings" / name, fresh / "embeddings" / name
        assert mended.read_bytes() == found.read_bytes(), name
    for name in ("imagefolder/metadata.jsonl", "webdataset/000000.tar", "prototypes.safetensors"):
        assert (run / DISTILLED / name).read_bytes() == (fresh / DISTILLED / name).read_bytes()
