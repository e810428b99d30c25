"""Tiny trainings: results load with open_clip and diffusers; a resumed one changes nothing."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from safetensors.torch import load_file

from pds_ray.demo import train_clip, train_unclip
from pds_ray.demo.convert import convert_image_tower, convert_text_tower
from pds_ray.demo.data import load_captioned_images, to_signed
from pds_ray.demo.tokenizer import train_tokenizer
from pds_ray.demo.training import Schedule, TrainingError, train

CLIP_ARGS = "--source scenes:60:1 --holdout scenes:20:2 --steps 6 --batch-size 16"
CLIP_ARGS += " --width 64 --layers 1 --text-layers 1"
CLIP_ARGS += " --embed-dim 32 --vocab-size 600 --checkpoint-every 3 --swap left/right --device cpu"
UNCLIP_ARGS = "--source scenes:60:1 --vae-channels 8 16 16 16 --vae-steps 2 --vae-batch-size 4"
UNCLIP_ARGS += " --unet-channels 64 64 --decoder-steps 2 --unet-steps 4"
UNCLIP_ARGS += " --batch-size 8 --checkpoint-every 2 --device cpu"


def run_clip(out: Path, extra: str = "") -> Path:
    assert train_clip.main([*CLIP_ARGS.split(), "--out", str(out), *extra.split()]) == 0
    return out


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return run_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def unclip_folder(tmp_path_factory, clip_folder):
    out = tmp_path_factory.mktemp("unclip")
    args = [*UNCLIP_ARGS.split(), "--clip", str(clip_folder), "--out", str(out)]
    assert train_unclip.main([*args, "--evaluate", "scenes:60:3", "--prototypes", "4"]) == 0
    return out


@pytest.mark.long
def test_open_clip_loads_the_folder(clip_folder):
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    data = load_captioned_images("scenes:3:9", 64)
    ids = tokenizer([data.captions[0][0], "Zoë saw 3 quagmires! " * 40, ""])
    assert ids.shape == (3, 32)
    assert ids.max() < model.vocab_size
    assert torch.equal(ids.argmax(-1), (ids == tokenizer.tokenizer.eos_token_id).int().argmax(-1))
    assert ids[1, -1] == tokenizer.tokenizer.eos_token_id  # truncated, yet ended
    assert model.encode_text(ids).shape == (3, 32)
    from torchvision.transforms.functional import to_pil_image

    torch.testing.assert_close(preprocess(to_pil_image(data.pixels[0])), to_signed(data.pixels[0]))
    metrics = json.loads((clip_folder / "metrics.json").read_text())
    assert 0 <= metrics["TR@1"] <= 100
    assert metrics["holdout_pictures"] == 20


@pytest.mark.long
def test_towers_converted_to_transformers_agree_with_open_clip(clip_folder):
    clip = train_unclip.load_clip(clip_folder, "cpu")
    pixels = to_signed(load_captioned_images("scenes:8:9", 64).pixels)
    ids = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(["a red star on white", "a ring"])
    with torch.no_grad():
        image_embeds = convert_image_tower(clip.model, clip.config)(pixels).image_embeds
        torch.testing.assert_close(image_embeds, clip.model.encode_image(pixels), atol=1e-4, rtol=0)
        states = convert_text_tower(clip.model, clip.config, clip.tokenizer)(ids)[0]
        pooled = states[torch.arange(2), ids.argmax(-1)]
        torch.testing.assert_close(
            pooled @ clip.model.text_projection, clip.model.encode_text(ids), atol=1e-4, rtol=0
        )


def test_resumed_training_ends_with_the_same_weights(tmp_path, clip_folder, monkeypatch):
    calls = 0
    original = train_clip.CaptionTokens.draw

    def interrupt(self, rows, generator):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(self, rows, generator)

    monkeypatch.setattr(train_clip.CaptionTokens, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_clip(tmp_path)
    monkeypatch.undo()
    run_clip(tmp_path)
    straight = load_file(clip_folder / "open_clip_model.safetensors")
    resumed = load_file(tmp_path / "open_clip_model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.long
def test_checkpoint_of_another_model_is_refused(clip_folder, capsys):
    args = [*CLIP_ARGS.split(), "--embed-dim", "16", "--out", str(clip_folder)]
    assert train_clip.main(args) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.long
def test_diffusers_loads_the_folder_and_decodes_a_batch(unclip_folder, clip_folder):
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(unclip_folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def paint(count: int) -> list:
        return pipeline(
            prompt=["a red star on white"] * count,
            image_embeds=torch.linspace(-1, 1, 32).repeat(count, 1),
            num_inference_steps=2,
            guidance_scale=2.0,
            noise_level=10,
            generator=[torch.Generator().manual_seed(i) for i in range(count)],
            output_type="np",
        ).images

    images = paint(3)
    assert images.shape == (3, 64, 64, 3)
    assert abs(images[:2] - paint(2)).max() < 1e-3  # an image does not depend on its batch
    space = json.loads((unclip_folder / "pds_ray.json").read_text())
    assert space == {"space": train_unclip.load_clip(clip_folder, "cpu").sha256, "dim": 32}
    assert 0 <= json.loads((unclip_folder / "metrics.json").read_text())["found"] <= 4


@pytest.mark.long
def test_a_training_goes_on_from_a_pipeline(unclip_folder, clip_folder, tmp_path):
    """Without a step more, VAE and UNet are those of the pipeline, up to half precision."""
    args = [*UNCLIP_ARGS.split(), "--clip", str(clip_folder), "--start", str(unclip_folder)]
    args += ["--unet-steps", "0", "--decoder-steps", "0", "--out", str(tmp_path)]
    assert train_unclip.main(args) == 0
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        before, after = load_file(unclip_folder / name), load_file(tmp_path / name)
        assert before.keys() == after.keys()
        for weight in before:
            # latents are brought to variance 1 anew
            torch.testing.assert_close(after[weight], before[weight], atol=5e-3, rtol=5e-3)


@pytest.mark.long
def test_a_folder_without_a_pipeline_is_one_clear_line(clip_folder, tmp_path, capsys):
    args = [*UNCLIP_ARGS.split(), "--clip", str(clip_folder), "--start", str(tmp_path / "none")]
    assert train_unclip.main([*args, "--out", str(tmp_path)]) == 2
    assert "no vae in it" in capsys.readouterr().err


@pytest.mark.long
def test_embedding_noise_is_the_pipelines_own(unclip_folder):
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(unclip_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    embeddings, noise = torch.randn(2, 4, 32, generator=generator)
    with torch.no_grad():
        ours = train_unclip.add_embedding_noise(
            embeddings,
            torch.full((4,), 50),
            noise,
            pipeline.image_normalizer,
            pipeline.image_noising_scheduler,
        )
        torch.testing.assert_close(ours, pipeline.noise_image_embeddings(embeddings, 50, noise))


@pytest.mark.long
def test_standardised_latents_decode_to_the_same_image():
    torch.manual_seed(0)
    vae = train_unclip.make_vae(64, [8, 16], 4).eval()
    pixels = load_captioned_images("scenes:12", 64).pixels
    with torch.no_grad():
        before = vae.encode(to_signed(pixels)).latent_dist
        painted = vae.decode(before.mean).sample
        latents = train_unclip.standardise_latents(vae, before.mean)
        after = vae.encode(to_signed(pixels)).latent_dist
        torch.testing.assert_close(after.mean, latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            after.std / before.std,
            (1 / before.mean.std((0, 2, 3)))[None, :, None, None].expand_as(after.std),
        )
        torch.testing.assert_close(vae.decode(latents).sample, painted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4))


def test_more_steps_go_on_from_the_checkpoint(tmp_path):
    def fit(steps: int) -> int:
        calls = 0
        model = torch.nn.Linear(2, 1)

        def loss(generator):
            nonlocal calls
            calls += 1
            return model(torch.randn(4, 2, generator=generator)).square().mean()

        train("test", model, loss, Schedule(steps, 1e-3), tmp_path, {})
        return calls

    assert [fit(4), fit(6), fit(6)] == [4, 2, 0]


@pytest.mark.long
def test_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(TrainingError, match="at least 514"):
        train_tokenizer(["a star"], 100, 16)


@pytest.mark.long
def test_missing_clip_is_one_clear_line(tmp_path, capsys):
    assert (
        train_unclip.main(
            ["--clip", str(tmp_path), "--out", str(tmp_path / "out"), "--source", "scenes:10"]
        )
        == 2
    )
    assert "train_clip writes such a folder" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    ("caption", "number", "expected"),
    [
        ("star at top left, ring at bottom right", 0, "star at bottom left, ring at top right"),
        ("star at top left, ring at bottom right", 1, "star at top right, ring at bottom left"),
        ("star at top left, ring at bottom right", 2, "star at bottom left, ring at top right"),
        ("an overleft star", 0, ""),
        ("left", 5, "right"),
    ],
)  # fmt: skip
def test_words_exchanged(caption, number, expected):
    assert train_clip.swapped(caption, [("top", "bottom"), ("left", "right")], number) == expected


@pytest.mark.long
def test_negatives_follow_the_captions_they_belong_to():
    data = load_captioned_images("scenes:30:4", 64)
    captions = [caption for captions in data.captions for caption in captions]
    tokenizer = train_tokenizer(captions, 700, 32)
    plain = train_clip.CaptionTokens(tokenizer, data)
    tokens = train_clip.CaptionTokens(tokenizer, data, [("left", "right")])
    rows = torch.arange(30)
    drawn = tokens.draw(rows, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:30], plain.draw(rows, torch.Generator().manual_seed(0)))
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    exchanged = [train_clip.swapped(text, [("left", "right")], 0) for text in texts[:30]]
    assert texts[30:] == [text for text in exchanged if text]
    assert 0 < len(texts) - 30 < 30
