"""The small backbones: widths, determinism, and that images do not see each other."""

from __future__ import annotations

import pytest
import torch

from pds_ray import catalog

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
