"""The unCLIP decoder, on a tiny random pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.decoders import unclip
from pds_ray.decoders.base import DecodeBatch

CAPTIONS = ["a red circle", "", "word " * 100, "zoë | ☃", "a red circle"]
SEEDS = [7, 2**62 + 1, 3, 0, 7]


def config(model, **options) -> DecodeConfig:
    return DecodeConfig(
        model=str(model), **{"steps": 3, "precision": "fp32", "noise_level": 3, **options}
    )


def batch(rows, seeds=SEEDS, dim=16) -> DecodeBatch:
    prototypes = np.random.default_rng(0).standard_normal((len(CAPTIONS), dim)).astype(np.float32)
    prototypes[4] = prototypes[0]
    return DecodeBatch(
        prototypes[rows],
        [CAPTIONS[r] for r in rows],
        [seeds[r] for r in rows],
        [("", "")] * len(rows),
    )


def pixels(images) -> np.ndarray:
    assert all(image.mode == "RGB" for image in images)
    return np.stack([np.asarray(image, int) for image in images])


@pytest.fixture(scope="module")
def decoder(unclip_folder, clip_info):
    asked = config(unclip_folder)
    return unclip.load(unclip.describe(asked, clip_info), asked, None)


@pytest.fixture
def copy(unclip_folder, tmp_path):
    return shutil.copytree(unclip_folder, tmp_path / "model")


def refusal(model, encoder) -> str:
    with pytest.raises(ConfigError) as caught:
        unclip.describe(config(model), encoder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_fitting_folder(unclip_folder, clip_info):
    info = unclip.describe(config(unclip_folder), clip_info)
    assert info.dim == 16
    assert info.name == "unclip"
    assert len(info.notes) == 1  # that the space is not stated


def test_a_stated_space_that_fits(copy, clip_info):
    (copy / "pds_ray.json").write_text(json.dumps({"space": clip_info.space, "dim": 16}))
    assert unclip.describe(config(copy), clip_info).notes == ()


def test_the_identity_follows_the_weights(copy, unclip_folder, clip_info):
    before = unclip.describe(config(unclip_folder), clip_info).identity
    assert unclip.describe(config(copy), clip_info).identity == before
    (copy / "pds_ray.json").write_text(json.dumps({"space": clip_info.space}))
    for part in ("unet", "vae"):
        weights = copy / part / "diffusion_pytorch_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        after = unclip.describe(config(copy), clip_info).identity
        assert after != before
        before = after


def test_another_width_is_refused(unclip_folder, clip_info):
    message = refusal(unclip_folder, replace(clip_info, dim=24, name="wide"))
    assert all(word in message for word in ("16", "24", "wide"))


def test_another_space_is_refused(copy, clip_info):
    (copy / "pds_ray.json").write_text(json.dumps({"space": "f" * 64, "dim": 16}))
    assert "other space" in refusal(copy, clip_info)


def test_published_checkpoints_are_known_by_name(unclip_folder, tmp_path, clip_info):
    """A local copy under the published name is held to the published space."""
    model = shutil.copytree(unclip_folder, tmp_path / "stable-diffusion-2-1-unclip-small")
    assert "ViT-L-14:openai" in refusal(
        model, replace(clip_info, space="ViT-L-14:laion2b_s32b_b82k")
    )
    assert unclip.describe(config(model), replace(clip_info, space="ViT-L-14:openai")).notes == ()
    # the encoder's space is a file's hash, which a name cannot be compared with
    assert len(unclip.describe(config(model), clip_info).notes) == 1


def test_no_decoder_is_chosen_for_an_unknown_space(clip_info):
    assert "nearest" in refusal("auto", clip_info)


def test_other_pipelines_are_refused(copy, clip_info):
    index = json.loads((copy / "model_index.json").read_text())
    del index["image_normalizer"]
    index["_class_name"] = "StableDiffusionPipeline"
    (copy / "model_index.json").write_text(json.dumps(index))
    assert "StableDiffusionPipeline" in refusal(copy, clip_info)


def test_paths_that_people_type(copy, clip_info, tmp_path):
    """The advice names the folder, which works."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0"
    shutil.copytree(copy, snapshot)
    for typed, meant in ((copy / "unet", copy), (snapshot.parents[1], snapshot)):
        message = refusal(typed, clip_info)
        assert message.endswith(f"give --decode.model {meant}")
        assert unclip.describe(config(meant), clip_info).dim == 16
    assert "is a file" in refusal(copy / "vae" / "config.json", clip_info)


@pytest.mark.parametrize("space", unclip.DEFAULT_MODELS)
def test_published_names_lead_to_the_one_that_fits(clip_info, space):
    """Under withdrawn names, for another encoder, or an ordinary text-to-image model."""
    encoder = replace(clip_info, space=space, name=space)
    for name in (
        "stabilityai/stable-diffusion-2-1-unclip",
        "stabilityai/stable-diffusion-2-1-unclip-small",
        "runwayml/stable-diffusion-v1-5",
    ):
        assert f"give --decode.model {unclip.DEFAULT_MODELS[space]}," in refusal(name, encoder)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./no/such", "no-such-org/no-such-model", "no such name", ""]
)
def test_what_is_nowhere_is_refused(model, clip_info, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(model, clip_info)


def test_an_empty_folder_is_refused(tmp_path, clip_info):
    assert "model_index.json" in refusal(tmp_path, clip_info)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_missing_weights_are_refused(copy, clip_info, part):
    (copy / part / "diffusion_pytorch_model.safetensors").unlink()
    assert part in refusal(copy, clip_info)


@pytest.mark.parametrize(
    "name", ["model_index.json", "image_normalizer/config.json", "pds_ray.json"]
)
@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"embedding_dim": null}', "\udcff"])
def test_broken_configurations_are_refused(copy, clip_info, name, text):
    (copy / name).write_bytes(text.encode(errors="surrogateescape"))
    refusal(copy, clip_info)


@pytest.mark.parametrize("part", unclip.MODELS)
def test_damaged_weights_are_named_before_they_are_loaded(copy, clip_info, part):
    weights = copy / part / unclip.MODELS[part][1]
    weights.write_bytes(weights.read_bytes()[:-1])
    message = refusal(copy, clip_info)
    assert str(weights) in message
    assert "cut off or damaged" in message


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "feature_extractor"])
def test_parts_without_weights_are_tried_too(copy, clip_info, part):
    shutil.rmtree(copy / part)
    assert part in refusal(copy, clip_info)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "image_encoder"])
def test_weights_that_lack_tensors_are_refused(copy, clip_info, part):
    """The libraries would fill them with noise."""
    file = copy / part / unclip.MODELS[part][1]
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})
    message = refusal(copy, clip_info)
    assert f"its {part} does not load" in message


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("unet", "cross_attention_dim", 24),
        ("vae", "latent_channels", 8),
        ("text_encoder", "hidden_size", 32),
        ("image_encoder", "projection_dim", 8),
    ],
)
def test_weights_of_another_model_are_refused(copy, clip_info, part, option, value):
    file = copy / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    assert f"its {part} does not load" in refusal(copy, clip_info)


def test_an_image_depends_on_its_row_alone(decoder):
    whole = pixels(decoder.decode(batch([0, 1, 2, 3, 4])))
    assert whole.shape == (5, 16, 16, 3)
    assert whole.std() > 10  # there is something to compare
    for rows in ([0], [4, 3, 2, 1, 0], [2, 0], [1, 1]):
        np.testing.assert_allclose(pixels(decoder.decode(batch(rows))), whole[rows], atol=1)
    np.testing.assert_allclose(whole[4], whole[0], atol=1)  # the same request twice


def test_other_seeds_other_images(decoder):
    one = pixels(decoder.decode(batch([0, 1])))
    other = pixels(decoder.decode(batch([0, 1], seeds=[8, 9])))
    assert (np.abs(one - other).mean(axis=(1, 2, 3)) > 3).all()


def test_prototypes_and_captions_matter(decoder):
    plain = batch([0, 1])
    one = pixels(decoder.decode(plain))
    moved = pixels(decoder.decode(replace(plain, prototypes=plain.prototypes[::-1])))
    assert (np.abs(one - moved).max(axis=(1, 2, 3)) > 1).all()
    longer = pixels(
        decoder.decode(replace(plain, prototypes=plain.prototypes * 3))
    )  # lengths are not thrown away
    assert (np.abs(one - longer).max(axis=(1, 2, 3)) > 1).all()
    reworded = pixels(decoder.decode(replace(plain, captions=["blue", "green"])))
    assert (np.abs(one - reworded).max(axis=(1, 2, 3)) > 1).all()


@pytest.mark.parametrize(
    "options", [{}, {"guidance": 1.0}, {"noise_level": 0, "negative_prompt": "blur", "steps": 2}]
)
def test_equals_the_pipeline_called_by_hand(unclip_folder, clip_info, options):
    asked = config(unclip_folder, **options)
    ours = pixels(unclip.load(unclip.describe(asked, clip_info), asked, None).decode(batch([0, 3])))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(unclip_folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    request = batch([0, 3])
    for row in range(2):
        image = pipeline(
            prompt=request.captions[row],
            negative_prompt=asked.negative_prompt,
            image_embeds=torch.tensor(request.prototypes[row : row + 1], device=device),
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance,
            noise_level=asked.noise_level,
            generator=torch.Generator("cpu").manual_seed(request.seeds[row]),
        ).images[0]
        np.testing.assert_allclose(ours[row], np.asarray(image, int), atol=1)
