"""One model, one space; and names that people type get advice that works when it is followed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import open_clip
import pytest

from pds_ray import catalog
from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.decoders import unclip
from pds_ray.encoders import open_clip as encoders
from pds_ray.encoders.base import spaces
from pds_ray.encoders.open_clip_names import advice, published_as
from tests.support.tiny_models import CLIP

TAG, REPOSITORY = "ViT-L-14:openai", "timm/vit_large_patch14_clip_224.openai"
LAION = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"


@pytest.fixture(name="hub_cache")
def _hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> Path:
    """A cache of the hub that holds ViT-L-14:openai, in fact a small model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(encoders, "architecture", lambda name: CLIP if name == "ViT-L-14" else None)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14", CLIP)
    save_in_cache(tmp_path / "hub", REPOSITORY, clip_folder)
    return tmp_path / "hub"


def save_in_cache(cache: Path, repository: str, folder: Path) -> None:
    """Save a folder as the hub's client does: blobs by their hash, links by revision."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    for path in (snapshot, place / "blobs", place / "refs"):
        path.mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    for file in folder.iterdir():
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)


@pytest.mark.usefixtures("hub_cache")
def test_all_names_of_one_model_are_one_space(clip_folder: Path):
    weights = clip_folder / "open_clip_model.safetensors"
    names = [TAG, f"hf-hub:{REPOSITORY}", f"local-dir:{clip_folder}", f"ViT-L-14:{weights}"]
    found = [encoders.describe(name) for name in names]
    for one in found:
        for other in found:
            assert one.space in spaces(other), (one.name, other.name)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    config = json.loads((clip_folder / "open_clip_config.json").read_text())
    # as they were before: stores that were filled under a name stay valid
    assert [one.space for one in found] == [TAG, names[1], digest, digest]
    assert found[0].identity == TAG
    assert found[1].identity == f"{names[1]} {json.dumps(config, sort_keys=True)}"


@pytest.mark.usefixtures("hub_cache")
def test_other_weights_share_no_name():
    other = encoders.describe(f"local-dir:{encoders.demo_folder()}")
    assert spaces(other) == (other.space,)
    assert not set(spaces(encoders.describe(TAG))) & set(spaces(other))


@pytest.mark.usefixtures("hub_cache")
def test_the_decoder_of_a_model_is_found_by_all_of_its_names(clip_folder: Path):
    wanted = unclip.DEFAULT_MODELS[TAG]
    for name in (TAG, f"hf-hub:{REPOSITORY}", f"local-dir:{clip_folder}"):
        info = encoders.describe(name)
        with pytest.raises(ConfigError) as caught:  # it is not in the cache
            unclip.describe(DecodeConfig(), info)
        assert wanted in str(caught.value)


@pytest.mark.usefixtures("hub_cache")
def test_a_tag_in_another_spelling_is_the_same_space():
    assert TAG in spaces(encoders.describe("ViT-L-14:OpenAI"))


def test_cached_weights_are_tried(hub_cache: Path):
    blob = next(hub_cache.glob("*/snapshots/*/open_clip_model.safetensors")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    for name in (TAG, f"hf-hub:{REPOSITORY}"):
        with pytest.raises(ConfigError, match="cut off or damaged"):
            encoders.describe(name)


def followed(name: str) -> str:
    """Return the name that the refusal of `name` says to give."""
    with pytest.raises(ConfigError) as caught:
        catalog.describe_text_encoder(name)
    given = re.findall(r"give ([^ ,;)]+)", str(caught.value))
    assert given, str(caught.value)
    return given[0]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ViT-L/14", TAG),
        ("ViT-B/32", "ViT-B-32:openai"),
        ("ViT-L/14@336px", "ViT-L-14-336:openai"),
        ("ViT-L-14", TAG),
        ("ViT-L-14-336", "ViT-L-14-336:openai"),
        ("vit-l-14", TAG),
        ("vit_l_14:openai", TAG),
        ("ViT-L/14:openai", TAG),
        ("ViT-L-14/openai", TAG),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "ViT-B-32:laion2b_s34b_b79k"),
        ("RN50X4", "RN50x4:openai"),
        ("EVA02-L-14", "EVA02-L-14:merged2b_s4b_b131k"),
        ("openai/clip-vit-large-patch14", TAG),
        ("clip-vit-base-patch32", "ViT-B-32:openai"),
        ("hf-hub:openai/clip-vit-large-patch14-336", "ViT-L-14-336:openai"),
        ("google/siglip-base-patch16-224", "ViT-B-16-SigLIP:webli"),
        (LAION, f"hf-hub:{LAION}"),
        (LAION.lower(), f"hf-hub:{LAION}"),
        (f"https://huggingface.co/{LAION}", f"hf-hub:{LAION}"),
        ("some-org/some-clip", "hf-hub:some-org/some-clip"),
    ],
)
def test_names_that_people_type(typed: str, meant: str):
    assert followed(typed) == meant
    model, _, tag = meant.partition(":")
    known = [one.rpartition("/")[0] for _, one in hub_entries()]
    assert tag in known or tag == "some-org/some-clip" or open_clip.get_pretrained_cfg(model, tag)


def hub_entries() -> list[tuple[str, str]]:
    table = open_clip.pretrained._PRETRAINED
    return [(m, cfg.get("hf_hub", "")) for m, tags in table.items() for cfg in tags.values()]


def test_published_names_need_no_advice():
    """The table of open_clip has each of them, with the repository that open_clip itself asks."""
    for model, tag in open_clip.list_pretrained():
        found = published_as(model, tag)
        assert found is not None
        assert open_clip.get_pretrained_cfg(model, tag)["hf_hub"].startswith(f"{found.repository}/")


def test_paths_that_people_type(clip_folder: Path, tmp_path: Path):
    folder = f"local-dir:{clip_folder}"
    weights = clip_folder / "open_clip_model.safetensors"
    for typed in (str(clip_folder), f"{clip_folder}/", str(weights), f"local-dir:{weights}"):
        right = followed(typed)
        assert right == folder
        assert encoders.describe(right).dim == CLIP["embed_dim"]
    save_in_cache(tmp_path, REPOSITORY, clip_folder)
    right = followed(str(next(tmp_path.glob("models--*"))))
    assert encoders.describe(right).dim == CLIP["embed_dim"]
    alone = Path(shutil.copy(weights, tmp_path / "epoch.safetensors"))
    assert f"as in ViT-B-32:{alone}" in advice(str(alone))
    assert followed(f"vit-b-32:{alone}") == f"ViT-B-32:{alone}"
    (tmp_path / "config.json").write_text("{}")
    assert "for transformers" in advice(str(tmp_path))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("bert-base-uncased", "bert:bert-base-uncased"),
        ("google-bert/bert-base-uncased", "bert:google-bert/bert-base-uncased"),
        ("distilbert-base-uncased", "distilbert:distilbert-base-uncased"),
    ],
)
def test_text_encoders_that_people_type(typed: str, meant: str):
    assert followed(typed) == meant
