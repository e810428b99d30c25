"""open_clip models: what is known before loading, and that embeddings are open_clip's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from pds_ray.config import ConfigError
from pds_ray.encoders import open_clip as encoders
from pds_ray.modalities.image import Preprocess
from tests.support.tiny_models import CLIP, VOCABULARY, save_clip

CAPTIONS = ["a red circle", "", "Zoë ☃", "word " * 300, "a red circle"]


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        encoders.describe(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def noise_images(count: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (40 + n, 70 - 9 * n, 3), dtype=np.uint8))
        for n in range(count)
    ]


def test_a_folder_is_described_from_its_files(clip_folder, clip_info):
    weights = (clip_folder / "open_clip_model.safetensors").read_bytes()
    assert clip_info.dim == CLIP["embed_dim"]
    assert clip_info.space == hashlib.sha256(weights).hexdigest()
    assert clip_info.preprocess == Preprocess(32)


def test_other_weights_are_another_space(tmp_path, clip_info):
    other = encoders.describe(f"local-dir:{save_clip(tmp_path, seed=1)}")
    assert other.space != clip_info.space


def test_the_space_is_that_of_the_weights_open_clip_loads(clip_folder, tmp_path, clip_info):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    save_clip(tmp_path / "other", seed=1)
    for name in ("a.safetensors", "model.safetensors", "open_clip_pytorch_model.safetensors"):
        shutil.copy(tmp_path / "other" / "open_clip_model.safetensors", tmp_path / name)
    info = encoders.describe(f"local-dir:{tmp_path}")
    assert info.space == clip_info.space
    loaded, expected = encoders.load(info, "fp32"), encoders.load(clip_info, "fp32")
    np.testing.assert_array_equal(loaded.encode_captions(["x"]), expected.encode_captions(["x"]))


def test_the_preprocessing_of_a_folder_is_its_own(tmp_path):
    save_clip(tmp_path, interpolation="bilinear", resize_mode="squash", fill_color=9)
    assert encoders.describe(f"local-dir:{tmp_path}").preprocess == Preprocess(
        32, "bilinear", "squash", 9
    )


@pytest.mark.parametrize(
    ("name", "dim", "size"),
    [
        ("ViT-L-14:openai", 768, 224),
        ("ViT-B-32:laion2b_s34b_b79k", 512, 224),
        ("RN50:openai", 1024, 224),
    ],
)
def test_pretrained_names_agree_with_open_clip(name, dim, size, monkeypatch):
    monkeypatch.setattr(encoders, "require_repository", lambda *_: None)  # would ask the hub
    info = encoders.describe(name)
    config = open_clip.get_model_config(name.partition(":")[0])
    assert (info.dim, info.preprocess.size) == (dim, size)
    assert (config["embed_dim"], config["vision_cfg"]["image_size"]) == (dim, size)
    assert info.space == name


def test_a_tag_brings_its_own_preprocessing(monkeypatch):
    monkeypatch.setattr(encoders, "require_repository", lambda *_: None)
    monkeypatch.setattr(encoders, "_try_loading", lambda *_: None)  # its tokenizer is on the hub
    info = encoders.describe("ViT-B-16-SigLIP:webli")
    assert info.preprocess.resize_mode == "squash"
    assert open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")["resize_mode"] == "squash"


def small_architecture(monkeypatch, model: str) -> None:
    """Put a small architecture in the place of a known one."""
    monkeypatch.setattr(encoders, "architecture", lambda name: CLIP if name == model else None)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, model, CLIP)


def test_a_checkpoint_file_of_a_known_model(clip_folder, monkeypatch):
    weights = clip_folder / "open_clip_model.safetensors"
    assert "do not fit" in refusal(f"ViT-B-32:{weights}")
    small_architecture(monkeypatch, "RN50")
    info = encoders.describe(f"RN50:{weights}")
    assert info.dim == CLIP["embed_dim"]
    assert info.space == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_checkpoint_file_is_what_is_loaded(tmp_path, monkeypatch):
    model = "RN50"
    small_architecture(monkeypatch, model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = open_clip.create_model(model, None)
    torch.save(made.state_dict(), tmp_path / "epoch.pt")
    encoder = encoders.load(encoders.describe(f"{model}:{tmp_path / 'epoch.pt'}"), "fp32")
    tokens = open_clip.get_tokenizer(model)(CAPTIONS)
    with torch.inference_mode():
        expected = made.eval().encode_text(tokens).numpy()
    np.testing.assert_allclose(encoder.encode_captions(CAPTIONS), expected, atol=1e-5)


def test_describing_the_built_in_model_and_no_model_is_quick(clip_folder):
    """Neither imports the libraries, which takes seconds."""
    code = f"""
import sys
from pds_ray.config import ConfigError
from pds_ray.encoders import open_clip
open_clip.describe("demo")
for name in ("{clip_folder}", "local-dir:{clip_folder.parent}"):
    try:
        open_clip.describe(name)
    except ConfigError:
        pass
print([m for m in ("torch", "open_clip", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_that_are_nothing_cost_one_line(tmp_path):
    assert "ViT-B-32" in refusal("ViT-B-23:openai")  # what is near it
    assert "which weights" in refusal("ViT-B-32")
    assert "laion2b_s34b_b79k" in refusal("ViT-B-32:laion3b")  # its tags
    assert "laion2b_s34b_b79k" in refusal("ViT-B-32:/no/such/file.pt")
    refusal("")
    refusal(":")
    refusal("../ViT-B-32:openai")
    assert str(tmp_path / "none") in refusal(f"local-dir:{tmp_path / 'none'}")
    refusal("local-dir:")
    refusal("hf-hub:no-such-org/no-such-model")
    refusal("hf-hub:not a name")
    refusal("hf-hub:")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "{}",
        '{"model_cfg": 5}',
        '{"model_cfg": {}}',
        '{"model_cfg": {"embed_dim": "wide"}}',
        '{"model_cfg": {"embed_dim": 16}}',
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": 5}}',
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": {"image_size": [32, 64]}}}',
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": {}}, "preprocess_cfg": 5}',
    ],
)
def test_a_broken_folder_costs_one_line(tmp_path, clip_folder, text):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "open_clip_config.json").write_text(text)
    refusal(f"local-dir:{tmp_path}")


def test_a_folder_without_weights(tmp_path, clip_folder):
    shutil.copy(clip_folder / "open_clip_config.json", tmp_path)
    assert "no .safetensors weights" in refusal(f"local-dir:{tmp_path}")


DAMAGES = {  # what became of the weights -> what the message says
    "cut": (lambda data: data[:1000], "cut off or damaged"),
    "cut at the end": (lambda data: data[:-1], "cut off or damaged"),
    "zeros": (lambda data: bytes(len(data)), "cut off or damaged"),
    "empty": (lambda _: b"", "cut off or damaged"),
    "pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "page": (lambda _: b"<!doctype html>" + bytes(99), "it is a web page"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_before_they_are_loaded(tmp_path, clip_folder, damage):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    change, words = DAMAGES[damage]
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    message = refusal(f"local-dir:{tmp_path}")
    assert words in message
    assert str(weights) in message


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("", "embed_dim", 8, "size mismatch for text_projection"),
        ("vision_cfg", "width", 48, "size mismatch"),
        ("vision_cfg", "layers", 3, "Missing key(s)"),
        ("text_cfg", "layers", 1, "Unexpected key(s)"),
        ("text_cfg", "heads", 5, "makes no model"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, clip_folder, section, name, value, words):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    model = json.loads(json.dumps(CLIP))
    (model[section] if section else model)[name] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    assert words in refusal(f"local-dir:{tmp_path}")


def test_a_cut_or_foreign_checkpoint_is_refused(tmp_path):
    file = tmp_path / "epoch.pt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, file)
    assert "do not fit" in refusal(f"RN50:{file}")
    file.write_bytes(file.read_bytes()[:-100])
    assert "cut off or damaged" in refusal(f"RN50:{file}")
    file.write_bytes(b"no weights at all")
    assert "cut off or damaged" in refusal(f"RN50:{file}")


def test_a_pickle_that_does_something_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    assert "do not fit" in refusal(f"RN50:{tmp_path / 'evil.pt'}")
    assert not (tmp_path / "touched").exists()


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path):
    shutil.copytree(encoders.demo_folder(), tmp_path, dirs_exist_ok=True)
    encoders.describe(f"local-dir:{tmp_path}")
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(f"local-dir:{tmp_path}")


def test_embeddings_are_open_clips_own(clip_folder, clip_info, clip):
    """Model, transform and tokenizer as open_clip makes them, un-normalised."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    with torch.inference_mode():
        images = (
            model.eval()
            .encode_image(torch.stack([transform(image) for image in noise_images()]))
            .numpy()
        )
        texts = model.encode_text(tokenizer(CAPTIONS)).numpy()
    found = clip.encode_images(np.stack([clip_info.preprocess(image) for image in noise_images()]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images, atol=1e-5)
    np.testing.assert_allclose(clip.encode_captions(CAPTIONS), texts, atol=1e-5)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() > 1e-3  # not of unit length


def test_long_captions_are_cut_not_refused(clip):
    found = clip.encode_captions(["word " * 300, "word " * 12, "word " * 3])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_half_precision_is_near(clip_info, clip):
    pixels = np.stack([clip_info.preprocess(image) for image in noise_images()])
    half = encoders.load(clip_info, "bf16").encode_images(pixels)
    assert half.dtype == np.float32
    full = clip.encode_images(pixels)
    cosine = (half * full).sum(axis=1) / np.linalg.norm(half, axis=1) / np.linalg.norm(full, axis=1)
    assert (cosine > 0.99).all()


@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_a_caption_costs_no_more_than_its_length(clip_info, monkeypatch, pool):
    """Its embedding is that of the whole context, and does not depend on its neighbours."""
    monkeypatch.setattr(encoders, "SHORT_CONTEXTS", (4, 6, 9, 40))
    clip = encoders.load(clip_info, "fp32")
    clip.model.text_pool_type, clip.model.text_eos_id = pool, VOCABULARY - 1
    for model in clip.by_length.values():
        model.text_pool_type, model.text_eos_id = pool, VOCABULARY - 1
    seen = []
    clip.model.transformer.register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape[:2]))
    )
    captions = [
        "",
        "a",
        "a b",
        "a b c",
        "a b c d e f",
        "a b c d e f g h",
        "a b c d e f g h i j k l m n",
        "b",
    ]
    tokens = clip.tokenizer(captions)
    lengths = tokens.argmax(dim=1) + 1
    with torch.inference_mode():
        whole = clip.model.encode_text(tokens).numpy()
    seen.clear()
    found = clip.encode_captions(captions)
    np.testing.assert_allclose(found, whole, atol=1e-6)
    expected = [next(size for size in (4, 6, 9, 12) if length <= size) for length in lengths]
    assert sorted(seen) == sorted((16, size) for size in set(expected))  # rows are filled up to 16
    assert len(set(expected)) > 2
    alone = np.concatenate([clip.encode_captions([caption]) for caption in captions])
    np.testing.assert_array_equal(alone, found)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR])
@pytest.mark.parametrize("handlers", [[], [logging.NullHandler()]])
def test_the_root_logger_is_left_as_it_was(clip_info, monkeypatch, capfd, level, handlers):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(handlers))
    monkeypatch.setattr(root, "level", level)
    encoders.load(clip_info, "fp32")
    with pytest.raises(ConfigError):
        encoders.load(dataclasses.replace(clip_info, load_args=(("model_name", "x"),)), "fp32")
    assert (root.level, root.handlers) == (level, handlers)
    assert "Loading" not in capfd.readouterr().err


def test_texts_seen_whole_are_not_cut(clip_info):
    model = encoders.load(clip_info, "fp32").model
    model.text_pool_type = "last"
    assert encoders._by_length(model) == {}
