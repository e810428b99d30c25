"""Backbones whose features depend on more than their parameters."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

from pds_ray.catalog import build_backbone, describe_backbone
from pds_ray.errors import ConfigError
from pds_ray.store.flat import Layout, check_matchable


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        timm.layers.BatchNormAct2d(4),
        timm.layers.EvoNorm2dB0(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_statistics_of_batches_are_refused(norm):
    with pytest.raises(ConfigError, match="backbone mine normalises over the batch") as caught:
        check_matchable(nn.Sequential(nn.Conv2d(3, 4, 3), norm), "mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["small_conv", "small_vit", "small_mixer", "nfnet_l0:scratch", "convnext_atto:scratch"]
)
def test_others_are_not(name):
    info = describe_backbone(name)
    with torch.device("meta"):
        check_matchable(build_backbone(info, info.image_size), name)


def test_two_models_of_equal_weights_may_differ_by_statistics():
    """The reason for the refusal."""
    one, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    one(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 9)
    layout = Layout.of(one)
    layout.load(other, layout.flatten(one))
    image = torch.ones(1, 3, 8, 8)
    assert not torch.allclose(one.eval()(image), other.eval()(image), atol=0.1)
