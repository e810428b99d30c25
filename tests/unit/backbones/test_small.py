"""The small backbones: widths, determinism, weights of a file, images that do not see others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pds_ray import catalog
from pds_ray.config import ConfigError

WIDTHS = {"small_conv": 128, "small_vit": 64, "small_mixer": 64}


def built(name: str, size: int = 64, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return catalog.build_backbone(catalog.describe_backbone(name), size)


def images(count: int, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", WIDTHS)
def test_features_have_the_promised_width(name, size):
    info = catalog.describe_backbone(name)
    assert (info.name, info.image_size, info.pretrained) == (name, 64, False)
    assert built(name, size)(images(2, size)).shape == (2, WIDTHS[name])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WIDTHS)
def test_an_image_does_not_see_its_neighbours(name, training):
    model = built(name).train(training)
    together = images(6)
    with torch.no_grad():
        among_others = model(together)[2]
        others = together.flip(0).mul(3)
        others[2] = together[2]
        torch.testing.assert_close(model(others)[2], among_others, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(together[2:3])[0], among_others, rtol=1e-4, atol=1e-5)
        assert (model(others)[1] - model(together)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", WIDTHS)
def test_the_weights_come_from_the_seed(name):
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in built(name, seed=seed).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_the_three_differ_in_identity():
    assert len({catalog.describe_backbone(name).identity for name in WIDTHS}) == 3


def saved(folder: Path, name: str, seed: int = 11) -> tuple[Path, torch.nn.Module]:
    """Return a file of random weights and the network that has them."""
    network = built(name, seed=seed).eval()
    path = folder / f"{name}-{seed}.safetensors"
    save_file(network.state_dict(), path)
    return path, network


def refusal(name: str, size: int = 64) -> str:
    with pytest.raises(ConfigError) as caught:
        catalog.build_backbone(catalog.describe_backbone(name), size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", WIDTHS)
def test_weights_of_a_file(name, tmp_path, monkeypatch):
    """They are used whatever the seed, and from another working directory, as workers have."""
    path, network = saved(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    info = catalog.describe_backbone(f"{name}:{path.name}")
    monkeypatch.chdir("/")
    fresh = catalog.describe_backbone(name)
    assert info.pretrained
    assert (info.image_size, info.mean, info.std) == (fresh.image_size, fresh.mean, fresh.std)
    torch.manual_seed(3)
    loaded = catalog.build_backbone(info, 64).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(3)), network(images(3)))
        assert not torch.equal(built(name, seed=3).eval()(images(3)), network(images(3)))


def test_the_file_is_part_of_the_identity(tmp_path):
    path, _ = saved(tmp_path, "small_conv")
    other, _ = saved(tmp_path, "small_conv", seed=12)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(path.read_bytes())
    names = ["small_conv", *(f"small_conv:{file}" for file in (path, moved, other))]
    without, one, same, another = (catalog.describe_backbone(name).identity for name in names)
    assert one == same
    assert len({without, one, another}) == 3
    assert hashlib.sha256(path.read_bytes()).hexdigest() in one


def test_wrong_files_are_one_line_before_anything_is_built(tmp_path):
    path, _ = saved(tmp_path, "small_conv")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-8])
    pickle = tmp_path / "weights.pth"
    torch.save({}, pickle)
    for name, reason in {
        f"small_conv:{tmp_path}/none.safetensors": "is no file; give small_conv:FILE or small_conv",
        f"small_conv:{pickle}": "is no .safetensors file",
        f"small_conv:{cut}": "cut off or damaged",
        f"small_vit:{path}": "cannot be built",
    }.items():
        with pytest.raises(ConfigError) as caught:
            catalog.describe_backbone(name)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_of_a_file_at_another_size(tmp_path):
    """A convolution takes any size; embedded or mixed places are those of one."""
    path, network = saved(tmp_path, "small_conv")
    loaded = catalog.build_backbone(catalog.describe_backbone(f"small_conv:{path}"), 96).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(2, 96)), network(images(2, 96)))
    for name in ("small_vit", "small_mixer"):
        path, _ = saved(tmp_path, name)
        assert "cannot be built" in refusal(f"{name}:{path}", 96)


def test_a_misspelt_name_with_a_file():
    assert refusal("small-conv:weights.safetensors").endswith("give small_conv:weights.safetensors")
