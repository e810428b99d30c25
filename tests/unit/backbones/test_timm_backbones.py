"""Backbones of timm against timm used directly; no network."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from pds_ray import catalog
from pds_ray.config import ConfigError

PUBLISHED_WIDTHS = {  # parameters of the published evaluations: three give their 1,000 logits
    "vit_tiny_patch16_224": 1000,
    "nf_regnet_b1": 1000,
    "nf_resnet50": 1000,
    "nfnet_l0": 2304,
}


def save_model(
    folder: Path, name: str, seed: int = 11, **options: object
) -> tuple[Path, torch.nn.Module]:
    """A model of timm with random weights, and its file."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **options).eval()
    path = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path, model


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        catalog.build_backbone(catalog.describe_backbone(name), 224)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_from_scratch():
    info = catalog.describe_backbone("resnet10t:scratch")
    cfg = timm.get_pretrained_cfg("resnet10t")
    assert (info.image_size, info.mean, info.std, info.pretrained) == (
        cfg.input_size[-1],
        cfg.mean,
        cfg.std,
        False,
    )
    torch.manual_seed(2)
    model = catalog.build_backbone(info, 64).eval()
    torch.manual_seed(2)
    expected = timm.create_model("resnet10t", num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    torch.manual_seed(3)
    other = catalog.build_backbone(info, 64).eval()
    with torch.no_grad():
        assert not torch.equal(other(x), expected(x))


@pytest.mark.parametrize("name", PUBLISHED_WIDTHS)
def test_published_backbones_with_weights_of_a_file(name: str, tmp_path: Path):
    """Exactly those weights; logits where published evaluations take them, else features."""
    path, reference = save_model(tmp_path, name)
    info = catalog.describe_backbone(f"{name}:{path}")
    assert info.pretrained
    assert hashlib.sha256(path.read_bytes()).hexdigest() in info.identity
    model = catalog.build_backbone(info, 224).eval()
    assert all(
        torch.equal(value, reference.state_dict()[key]) for key, value in model.state_dict().items()
    )
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(x)
        expected = reference(x) if PUBLISHED_WIDTHS[name] == 1000 else reference.forward_head(
            reference.forward_features(x), pre_logits=True
        )  # fmt: skip
    assert found.shape == (1, PUBLISHED_WIDTHS[name])
    torch.testing.assert_close(found, expected)


def test_other_models_give_features_not_logits(tmp_path: Path):
    path, reference = save_model(tmp_path, "resnet10t")
    model = catalog.build_backbone(catalog.describe_backbone(f"resnet10t:{path}"), 64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(
            model(x), reference.forward_head(reference.forward_features(x), pre_logits=True)
        )


def test_a_transformer_takes_another_size():
    info = catalog.describe_backbone("vit_tiny_patch16_224:scratch")
    model = catalog.build_backbone(info, 96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 192)


def test_the_file_is_part_of_the_identity(tmp_path: Path):
    path, _ = save_model(tmp_path, "resnet10t", seed=1)
    one = catalog.describe_backbone(f"resnet10t:{path}").identity
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(path.read_bytes())
    assert catalog.describe_backbone(f"resnet10t:{moved}").identity == one
    save_model(tmp_path, "resnet10t", seed=2)
    assert catalog.describe_backbone(f"resnet10t:{path}").identity != one


def test_unknown_models_suggest_near_names():
    message = refusal("nf_resnet51")
    assert "nf_resnet50" in message
    assert "small_conv" in message
    assert "timm.list_models()" in refusal("qqqqqqqqqqqqqq")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resnet-10t:scratch", "resnet10t:scratch"),
        ("NF-ResNet50:scratch", "nf_resnet50:scratch"),
        ("vit-tiny-patch16-224:scratch", "vit_tiny_patch16_224:scratch"),
        ("efficientnet-b0:scratch", "efficientnet_b0:scratch"),
        ("timm/resnet50.a1_in1k:scratch", "resnet50.a1_in1k:scratch"),
        ("small-conv", "small_conv"),
    ],
)
def test_spellings_that_people_type(typed: str, meant: str):
    assert refusal(typed).endswith(f"give {meant}")
    assert catalog.describe_backbone(meant).name == meant


def test_an_unknown_tag_is_refused():
    assert "unknown backbone 'resnet50.a9_in1k'" in refusal("resnet50.a9_in1k")


def test_wrong_files_are_one_line(tmp_path: Path):
    assert "is no file" in refusal(f"resnet10t:{tmp_path}/none.safetensors")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no weights" * 9)
    assert "resnet10t" in refusal(f"resnet10t:{junk}")
    path, _ = save_model(tmp_path, "resnet10t")
    assert "cannot be built" in refusal(f"resnet18:{path}")


def test_a_pickle_that_does_something_is_not_loaded(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    assert "cannot be built" in refusal(f"resnet10t:{tmp_path}/evil.pth")
    assert not (tmp_path / "touched").exists()


def test_without_a_network_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal("resnet10t")
    assert "timm/resnet10t" in message
    assert "resnet10t:FILE" in message
    assert "resnet10t:scratch" in message
