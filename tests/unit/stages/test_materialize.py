"""The distilled set as other tools read it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import webdataset
import yaml
from PIL import Image

from pds_ray import load_distilled
from pds_ray.distributed.tasks import _named
from pds_ray.methods.pds import PDS_CARD
from pds_ray.modalities.image import encode_image
from pds_ray.stages import materialize
from pds_ray.stages.extras import Extras
from pds_ray.stages.materialize import write_distilled
from pds_ray.store.calls import CALLS_AT_ONCE
from pds_ray.store.distilled_set import DistilledSetError, image_path, tar_path
from pds_ray.store.learned import LEARNED_CAPTION_SCHEMA, LearnedError, unpack
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import prototype_schema, vector_array
from pds_ray.store.storage import Folder
from tests.support.hand_made_set import learned_file, learned_tensors

CAPTIONS = [
    "a red circle above a blue square",
    "pipes | and `ticks` and <b>tags</b> & \\ backslashes",
    "two\nlines\r\nand a\ttab",
    "Zoë ☃ \u2028 line\u0085separators 漢字",
    '"quoted", {"json": true}',
    " leading and trailing ",
    "x" * 400,
]
ABOUT = {
    "source": "made up",
    "method": "pds",
    "encoder": "toy",
    "decoder": "toy",
    "picture_origin": "synthetic",
    "counts": {"distilled pairs": len(CAPTIONS), "bad samples": 0},
    "config": {"pairs": len(CAPTIONS)},
}


def prototypes(captions: list[str], dim: int = 4) -> pa.Table:
    count = len(captions)
    rng = np.random.default_rng(0)
    numbers = np.arange(count)
    return pa.table(
        {
            "pair": numbers.astype(np.int32),
            "image_prototype": vector_array(rng.standard_normal((count, dim))),
            "text_prototype": vector_array(rng.standard_normal((count, dim))),
            "cosine": np.linspace(0.9, 0.1, count),
            "image_cluster": numbers.astype(np.int32),
            "text_cluster": numbers[::-1].astype(np.int32),
            "shared": numbers.astype(np.int64),
            "member_norm": np.ones(count),
            "caption": captions,
            "caption_shard": ["s0"] * count,
            "caption_key": [f"k{n}" for n in numbers],
            "caption_cosine": np.full(count, 0.5, np.float32),
            "nearest_shard": ["s1"] * count,
            "nearest_key": [f"n{n}" for n in numbers],
            "nearest_cosine": np.full(count, 0.25, np.float32),
            "members": [[f"s0/k{m}" for m in range(n)] for n in numbers],
        },
        schema=prototype_schema(dim),
    )


def pixels(pair: int) -> np.ndarray:
    return np.random.default_rng(100 + pair).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def make_run(path, captions=CAPTIONS) -> RunFolder:
    run = RunFolder(Folder(str(path)))
    run.save_prototypes(prototypes(captions))
    for pair in range(len(captions)):
        buffer = io.BytesIO()
        Image.fromarray(pixels(pair)).save(buffer, "PNG")
        run.images.write_bytes(run.image_name(pair), buffer.getvalue())
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    assert write_distilled(make_run(path), ABOUT, PDS_CARD)["pairs"] == len(CAPTIONS)
    return path


def test_load_distilled(finished):
    for place in (finished, finished / "distilled"):
        pairs = load_distilled(str(place))
        assert len(pairs) == len(CAPTIONS)
        assert pairs.captions == CAPTIONS
        rng = np.random.default_rng(0)
        shape = (len(CAPTIONS), 4)
        np.testing.assert_array_equal(
            pairs.image_prototypes, rng.standard_normal(shape).astype(np.float32)
        )
        np.testing.assert_array_equal(
            pairs.text_prototypes, rng.standard_normal(shape).astype(np.float32)
        )
        for pair in range(len(pairs)):
            np.testing.assert_array_equal(np.asarray(pairs.image(pair)), pixels(pair))
        assert pairs.records[3]["members"] == ["s0/k0", "s0/k1", "s0/k2"]
        assert pairs.manifest["about"] == ABOUT


def test_webdataset_reads_it(finished):
    path = finished / "distilled" / "webdataset" / "000000.tar"
    found = list(
        webdataset.WebDataset(str(path), shardshuffle=False)
        .decode("rgb8")
        .to_tuple("png", "txt", "json")
    )
    assert [text for _, text, _ in found] == CAPTIONS
    for pair, (image, _, record) in enumerate(found):
        np.testing.assert_array_equal(image, pixels(pair))
        assert record["pair"] == pair
        assert record["text"] == CAPTIONS[pair]


def test_datasets_reads_it(finished, tmp_path):
    """In its own process, as the library reads offline mode and cache folder at import."""
    code = """
import datasets, hashlib, json, sys
datasets.disable_progress_bars()
found = datasets.load_dataset("imagefolder", data_dir=sys.argv[1], split="train")
digest = lambda image: hashlib.sha256(image.tobytes()).hexdigest()
print(json.dumps([[row["text"], row["pair"], digest(row["image"])] for row in found]))
"""
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    folder = str(finished / "distilled" / "imagefolder")
    done = subprocess.run(
        [sys.executable, "-c", code, folder], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [
        [caption, pair, hashlib.sha256(pixels(pair).tobytes()).hexdigest()]
        for pair, caption in enumerate(CAPTIONS)
    ]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def contents(path) -> dict[str, bytes]:
    return {
        str(item.relative_to(path)): item.read_bytes()
        for item in sorted(path.rglob("*"))
        if item.is_file()
    }


def test_the_same_pairs_are_the_same_bytes(finished, tmp_path):
    write_distilled(make_run(tmp_path), ABOUT, PDS_CARD)
    first = contents(tmp_path / "distilled")
    assert first == contents(finished / "distilled")
    write_distilled(RunFolder(Folder(str(tmp_path))), ABOUT, PDS_CARD)
    assert contents(tmp_path / "distilled") == first


@pytest.mark.parametrize("pairs_per_tar", [1, 2, 1000])
def test_tars_may_be_shared(finished, tmp_path, monkeypatch, pairs_per_tar):
    """Whoever writes them, and in whatever order they end, the set has the same bytes."""
    monkeypatch.setattr(materialize, "PAIRS_PER_TAR", pairs_per_tar)
    monkeypatch.setattr(materialize, "IMAGES_TOGETHER", 2)
    alone, together = (tmp_path / name for name in ("alone", "together"))
    done: list[int] = []
    write_distilled(make_run(alone), ABOUT, PDS_CARD, step=done.append)
    assert sum(done) == len(CAPTIONS)

    def last_first(function, parts):
        return reversed([function(part) for part in reversed(parts)])

    write_distilled(make_run(together), ABOUT, PDS_CARD, step=done.append, apply=last_first)
    assert sum(done) == 2 * len(CAPTIONS)
    assert contents(together / "distilled") == contents(alone / "distilled")
    if pairs_per_tar >= len(CAPTIONS):
        assert contents(alone / "distilled") == contents(finished / "distilled")


def test_the_stall_watchdog_names_a_tar_in_few_words(tmp_path):
    folder = Folder(str(tmp_path))
    tar = materialize.Tar(3, [{"file_name": "a.png", "text": "a dog"}] * 10_000, folder, folder)
    assert _named(tar) == tar_path(3)
    assert _named(materialize.Images(["a.png", "b.png"], folder, folder)) == image_path("a.png")


def test_the_manifest_lists_every_other_file_truly(finished):
    files = contents(finished / "distilled")
    manifest = json.loads(files.pop("manifest.json"))
    assert set(manifest["files"]) == set(files)
    for name, data in files.items():
        assert manifest["files"][name] == {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    write_distilled(run, ABOUT, PDS_CARD)
    monkeypatch.setattr(materialize, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_distilled(run, ABOUT, PDS_CARD)
    with pytest.raises(DistilledSetError, match="is the run finished"):
        load_distilled(str(tmp_path))


def test_images_are_not_gathered(tmp_path, monkeypatch):
    """160 images of 256 KiB in tars of 80: never are all of them or a whole tar in memory."""
    monkeypatch.setattr(materialize, "PAIRS_PER_TAR", 80)
    run = RunFolder(Folder(str(tmp_path)))
    run.save_prototypes(prototypes([f"caption {number}" for number in range(160)]))
    noise = np.random.default_rng(0).integers(0, 256, (296, 296, 3), np.uint8)
    image = encode_image(Image.fromarray(noise), "png")
    assert len(image) > 256 * 1024
    for pair in range(160):
        run.images.write_bytes(run.image_name(pair), image)
    write_distilled(run, ABOUT, PDS_CARD)  # what is imported and cached on the way is not counted
    tracemalloc.start()
    try:
        written = write_distilled(run, ABOUT, PDS_CARD)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written["bytes"] > 2 * 160 * len(image)
    assert peak < 3 * CALLS_AT_ONCE * len(image)


def test_large_sets_are_cut_in_tars(tmp_path, monkeypatch):
    monkeypatch.setattr(materialize, "PAIRS_PER_TAR", 3)
    write_distilled(make_run(tmp_path), ABOUT, PDS_CARD)
    paths = sorted((tmp_path / "distilled" / "webdataset").iterdir())
    assert [path.name for path in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    names = []
    for path in paths:
        with tarfile.open(path) as tar:
            names += tar.getnames()
            owners = {(member.uid, member.gid, member.uname, member.gname) for member in tar}
            assert owners == {(0, 0, "", "")}
            assert {(member.mtime, member.mode) for member in tar} == {(0, 0o644)}
    assert names == [
        f"{pair:06d}.{suffix}" for pair in range(len(CAPTIONS)) for suffix in ("json", "png", "txt")
    ]


def test_the_card_has_front_matter_that_parses(finished):
    text = (finished / "distilled" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["configs"][0]["data_dir"] == "imagefolder"
    assert fields["license"] == "other"
    assert "made up" in body
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == ABOUT["config"]


def one_line_refusal(path) -> str:
    with pytest.raises(DistilledSetError) as caught:
        load_distilled(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_what_is_no_distilled_set_is_refused(tmp_path):
    one_line_refusal(tmp_path)
    one_line_refusal(tmp_path / "nowhere")
    run = make_run(tmp_path)
    one_line_refusal(run.folder.path)


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


DAMAGE = {
    "metadata gone": lambda d: (d / "imagefolder" / "metadata.jsonl").unlink(),
    "metadata cut": lambda d: (d / "imagefolder" / "metadata.jsonl").write_bytes(
        b'{"file_name": "0000'
    ),
    "metadata empty": lambda d: (d / "imagefolder" / "metadata.jsonl").write_bytes(b""),
    "metadata without captions": lambda d: (d / "imagefolder" / "metadata.jsonl").write_text(
        '{"pair": 0}\n' * 7
    ),
    "prototypes gone": lambda d: (d / "prototypes.safetensors").unlink(),
    "prototypes cut": lambda d: (d / "prototypes.safetensors").write_bytes(b"\x10" + bytes(9)),
    "prototypes of another set": lambda d: (d / "prototypes.safetensors").write_bytes(b"{}"),
    "manifest cut": lambda d: (d / "manifest.json").write_text('{"pairs": 7,'),
    "manifest of something else": lambda d: (d / "manifest.json").write_text("{}"),
    "manifest a list": lambda d: (d / "manifest.json").write_text("[1]"),
    "manifest not UTF-8": lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\xff"),
    "other number of pairs": lambda d: edit_json(d / "manifest.json", lambda m: m.update(pairs=8)),
    "image gone": lambda d: (d / "imagefolder" / "000003.png").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_sets_are_refused_in_one_line(tmp_path, damage):
    write_distilled(make_run(tmp_path), ABOUT, PDS_CARD)
    DAMAGE[damage](tmp_path / "distilled")
    one_line_refusal(tmp_path / "distilled")


def test_an_exchanged_image_is_refused(tmp_path):
    write_distilled(make_run(tmp_path), ABOUT, PDS_CARD)
    folder = tmp_path / "distilled" / "imagefolder"
    (folder / "000003.png").write_bytes((folder / "000002.png").read_bytes())
    pairs = load_distilled(str(tmp_path))
    pairs.image(2)
    with pytest.raises(DistilledSetError, match=r"000003\.png is not the image"):
        pairs.image(3)
    (folder / "000003.png").unlink()
    with pytest.raises(DistilledSetError, match=r"000003\.png cannot be read"):
        pairs.image(3)


def test_an_image_missing_from_the_run_stops_it(tmp_path):
    run = make_run(tmp_path)
    run.images.delete(run.image_name(5))
    with pytest.raises(FileNotFoundError):
        write_distilled(run, ABOUT, PDS_CARD)


def test_extra_parts_are_written_and_read(tmp_path):
    count = len(CAPTIONS)
    further = [[f"more {pair}"] * (pair % 3) for pair in range(count)]
    soft = np.random.default_rng(0).uniform(0.1, 1, (count, count)).astype(np.float32)
    extras = Extras(further, soft)
    write_distilled(make_run(tmp_path), ABOUT, PDS_CARD, extras=extras)
    found = load_distilled(str(tmp_path))
    np.testing.assert_array_equal(found.similarity, soft)
    assert found.captions == CAPTIONS
    lists = zip(CAPTIONS, further, strict=True)
    assert found.caption_lists == [[own, *more] for own, more in lists]
    card = (tmp_path / "distilled" / "README.md").read_text()
    assert f"{sum(map(len, further))} further captions" in card
    assert "as `similarity`" in card


def test_a_set_without_extra_parts_says_nothing_of_them(finished):
    found = load_distilled(str(finished))
    assert found.similarity is None
    assert found.caption_lists == [[caption] for caption in CAPTIONS]
    assert not any("captions" in record for record in found.records)
    assert materialize.describe_extras(Extras()) == {}


def test_learned_parts_are_written_and_read(tmp_path):
    count = len(CAPTIONS)
    tensors = learned_tensors(count, 6)
    learned, images = unpack(learned_file(tensors))
    nearest = pa.table(
        {
            "pair": range(count),
            "learned_captions": [[f"near {pair}", "next"] for pair in range(count)],
            "learned_cosines": [[0.5, 0.25]] * count,
        },
        schema=LEARNED_CAPTION_SCHEMA,
    )
    extras = Extras(learned=(learned, images), learned_captions=nearest)
    counts = write_distilled(make_run(tmp_path), ABOUT, PDS_CARD, extras=extras)
    found = load_distilled(str(tmp_path))
    np.testing.assert_array_equal(found.learned.text, tensors["text"])
    np.testing.assert_array_equal(found.learned.similarity, tensors["similarity"])
    np.testing.assert_array_equal(found.learned_images(), tensors["images"])
    assert found.records[2]["learned_captions"] == ["near 2", "next"]
    assert found.records[2]["learned_cosines"] == [0.5, 0.25]
    files = found.manifest["files"]
    assert counts["size"]["learned_bytes"] == files["learned.safetensors"]["bytes"]
    assert found.size().to_json() == counts["size"]
    card = (tmp_path / "distilled" / "README.md").read_text()
    for words in ("learned by lors", "of use with that encoder alone", "the loss wbce"):
        assert words in card
    few = extras.first(2)
    assert few.learned[1].shape == (2, 3, 6, 6)
    assert few.learned_captions.num_rows == len(few.learned[0].text) == 2


def test_a_run_that_optimises_hands_its_learned_parts_on(tmp_path):
    run = make_run(tmp_path)
    learned, images = unpack(learned_file(learned_tensors(len(CAPTIONS), 6)))
    for save, load in (
        (run.learning.save_start, run.learning.start),
        (run.learning.save_result, run.learning.result),
    ):
        save(learned, images)
        again, images_again = load()
        np.testing.assert_array_equal(again.text, learned.text)
        np.testing.assert_array_equal(images_again, images)
    (tmp_path / "learned.safetensors").write_bytes(b"x")
    with pytest.raises(LearnedError, match=r"learned\.safetensors is damaged: its learned\.safe"):
        run.learning.result()


@pytest.mark.parametrize("damage", ["shape", "negative", "empty row", "no number"])
def test_soft_targets_that_cannot_be_weighed_are_damage(tmp_path, damage):
    soft = np.eye(len(CAPTIONS), dtype=np.float32)
    soft = soft[1:] if damage == "shape" else soft
    soft[2, 2] = {"negative": -1, "empty row": 0, "no number": np.nan}.get(damage, 1)
    write_distilled(make_run(tmp_path), ABOUT, PDS_CARD, extras=Extras(None, soft))
    with pytest.raises(DistilledSetError, match="its similarity is no table of soft targets"):
        load_distilled(str(tmp_path))


def test_records_tell_how_an_image_was_chosen(tmp_path):
    run = make_run(tmp_path)
    for pair in range(len(CAPTIONS)):
        real = pair == 2
        choice = {
            "pair": pair,
            "origin": "real" if real else "synthetic",
            "candidate": None if real else pair % 3,
            "noise_level": None if real else 10,
            "image_cosine": 0.5,
            "text_cosine": 0.25,
            "score": 0.75,
            "round_trip": True,
        }
        run.save_choice(choice)
    choices = run.gather_choices(len(CAPTIONS))
    assert run.choices().equals(choices)
    assert run.images_done(len(CAPTIONS), judged=True) == set(run.image_names())
    run.images.delete(run.choice_name(1))
    assert run.images_done(len(CAPTIONS), judged=True) == {
        name for name in run.image_names() if name != run.image_name(1)
    }
    write_distilled(run, ABOUT, PDS_CARD, choices=choices)
    records = load_distilled(str(tmp_path)).records
    assert [record["origin"] for record in records].index("real") == 2
    assert [record["candidate"] for record in records[:4]] == [0, 1, None, 0]
    assert {record["score"] for record in records} == {0.75}


def test_what_a_budget_cuts_off_is_not_counted(tmp_path):
    """The card counts the further captions and real images of the pairs that are left."""
    run, count = make_run(tmp_path), len(CAPTIONS)
    for pair in range(count):
        scored = {"pair": pair, "origin": "synthetic" if pair % 2 else "real", "candidate": None}
        cosines = dict.fromkeys(("image_cosine", "text_cosine", "score"), 0.5)
        run.save_choice({**scored, "noise_level": None, **cosines, "round_trip": True})
    choices = run.gather_choices(count)
    extras = Extras([["more"]] * count, np.eye(count, dtype=np.float32))
    whole = write_distilled(run, ABOUT, PDS_CARD, extras=extras, choices=choices)
    budget = whole["size"]["bytes"] - 1
    counts = write_distilled(
        run, ABOUT, PDS_CARD, extras=extras, choices=choices, budget=budget, asked=count
    )
    found = load_distilled(str(tmp_path))
    assert len(found) == count - 1
    assert found.similarity.shape == (count - 1, count - 1)
    real = sum(record["origin"] == "real" for record in found.records)
    assert f"synthetic, but for {real} real images" in found.manifest["about"]["picture_origin"]
    assert found.manifest["about"]["extras"].startswith(f"{count - 1} further captions")
    fewer = f"{count - 1} of the {count} pairs asked for: no more fit in the budget"
    assert counts["fewer"] == found.manifest["about"]["fewer"] == fewer
    assert fewer in (tmp_path / "distilled" / "README.md").read_text("utf-8")
