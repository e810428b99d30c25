"""Adapters: none at first, merged like apart, and alone in what is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pds_ray.catalog import build_backbone, describe_backbone
from pds_ray.errors import ConfigError
from pds_ray.store.flat import Layout
from pds_ray.training.loop import generator
from pds_ray.training.lora import ADAPTED, Adapted, adapt, deltas, merged_weights
from pds_ray.training.losses import info_nce
from pds_ray.training.two_towers import TwoTowers

SIDE, TEXT_WIDTH = 16, 5


def vit(name: str = "small_vit", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_backbone(describe_backbone(name), SIDE).eval()


def images(count: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=generator("images"))


def with_random_up(backbone: nn.Module) -> nn.Module:
    """Move the adapters from zero, as training does."""
    draw = generator("up")
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith(".up"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return backbone


def towers(rank: int = 2) -> TwoTowers:
    torch.manual_seed(3)
    return TwoTowers(adapt(vit(), rank, 0), 64, TEXT_WIDTH, image_head=False)


def test_fresh_adapters_change_no_bit_of_the_output():
    plain, adapted = vit(), adapt(vit(), 4, 0)
    assert torch.equal(adapted(images()), plain(images()))
    assert torch.equal(adapt(vit(), 1, 9)(images()), plain(images()))
    assert not torch.equal(with_random_up(adapted)(images()), plain(images()))


def test_every_block_has_its_four_adapters():
    adapted = adapt(vit(), 3, 0)
    found = {name: part for name, part in adapted.named_modules() if isinstance(part, Adapted)}
    assert found.keys() == {f"blocks.{block}.{end}" for block in (0, 1) for end in ADAPTED}
    qkv = found["blocks.1.attn.qkv"]
    assert (qkv.up.shape, qkv.down.shape) == ((192, 3), (3, 64))


def test_rank_4_on_vit_base_has_as_many_weights_as_counted_by_hand():
    """Per block 4 (768 + 2304) + 4 (768 + 768) + 2 * 4 (768 + 3072)."""
    with torch.device("meta"):
        base = build_backbone(describe_backbone("vit_base_patch16_224:scratch"), 224)
    trained = [p.numel() for p in adapt(base, 4, 0).parameters() if p.requires_grad]
    assert sum(trained) == 12 * 49_152


def test_merged_weights_compute_what_the_adapters_do():
    adapted = with_random_up(adapt(vit(seed=1), 4, 0))
    plain = vit(seed=2)
    assert not torch.allclose(plain(images()), adapted(images()), atol=1e-3)
    plain.load_state_dict(merged_weights(adapted))
    torch.testing.assert_close(plain(images()), adapted(images()), rtol=1e-4, atol=1e-5)


def test_only_adapters_are_trained_and_get_a_gradient():
    adapted = with_random_up(adapt(vit(), 2, 0))
    adapted(images()).square().sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 16
    for name, parameter in adapted.named_parameters():
        assert (name in trained) == name.endswith((".up", ".down"))
        assert (parameter.grad is not None) == (name in trained)
        if name in trained:
            assert parameter.grad.abs().max() > 0, name


def test_at_the_start_only_the_upper_factor_moves():
    """The gradient of the lower one is exactly zero, as its partner is."""
    adapted = adapt(vit(), 2, 0)
    adapted(images()).square().sum().backward()
    for name, parameter in adapted.named_parameters():
        if name.endswith(".down"):
            assert not parameter.grad.any()
        if name.endswith(".up"):
            assert parameter.grad.any()


def test_adapters_depend_on_their_seed_alone():
    """Not on the backbone's weights nor on the state of the global generator."""
    one, other = adapt(vit(seed=1), 2, 7), adapt(vit(seed=2), 2, 7)
    apart = adapt(vit(seed=1), 2, 8)
    downs = {n: p for n, p in one.named_parameters() if n.endswith(".down")}
    for name, down in downs.items():
        assert torch.equal(down, other.get_parameter(name))
        assert not torch.equal(down, apart.get_parameter(name))
        bound = 1 / math.sqrt(down.shape[1])
        assert 0.5 * bound < down.abs().max() <= bound
    assert not torch.equal(downs["blocks.0.attn.qkv.down"], downs["blocks.1.attn.qkv.down"])


@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_the_delta_is_that_of_the_function(factor):
    """(up / c, c down) computes the same, and has the same delta."""
    adapted = with_random_up(adapt(vit(), 2, 0))
    before, output = deltas(adapted), adapted(images())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".up"):
                parameter.div_(factor)
            elif name.endswith(".down"):
                parameter.mul_(factor)
    torch.testing.assert_close(deltas(adapted), before)
    torch.testing.assert_close(adapted(images()), output)
    layer = adapted.get_submodule("blocks.0.mlp.fc1")
    torch.testing.assert_close(before["blocks.0.mlp.fc1"], layer.up @ layer.down)


@pytest.mark.parametrize("name", ["small_conv", "small_mixer", "convnext_atto:scratch"])
def test_a_backbone_without_such_blocks_is_refused(name):
    with torch.device("meta"):
        backbone = build_backbone(describe_backbone(name), 64)
    with pytest.raises(ConfigError, match=r"has no blocks with attn\.qkv") as caught:
        adapt(backbone, 4, 0)
    assert "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in backbone.parameters()), "nothing is done"


def test_flat_vectors_hold_adapters_and_text_head():
    model = towers()
    layout = Layout.of(model)
    assert all(entry.name.endswith((".up", ".down")) for entry in layout.image)
    assert sum(layout.sizes) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with_random_up(model)
    weights = layout.flatten(model)
    text = torch.randn(3, TEXT_WIDTH, generator=generator("text"))
    expected = model(images(), text)
    found = functional_call(towers(), layout.views(weights.theta, weights.phi), (images(), text))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_second_derivatives_are_those_of_finite_differences():
    """The gradient in the pixels of the length of the gradient in the adapters."""
    model = with_random_up(towers()).double()
    layout = Layout.of(model)
    weights = layout.flatten(model)
    theta = weights.theta.double().requires_grad_()
    text = torch.randn(3, TEXT_WIDTH, generator=generator("text"), dtype=torch.float64)

    def length(pixels: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            both = functional_call(model, layout.views(theta, weights.phi), (pixels, text))
        (slope,) = torch.autograd.grad(info_nce(*both), theta, create_graph=True)
        return slope.square().sum()

    pixels = images().double().requires_grad_()
    (gradient,) = torch.autograd.grad(length(pixels), pixels)
    for place in ((0, 0, 3, 4), (2, 1, 15, 0)):
        shift = torch.zeros_like(pixels)
        shift[place] = 1e-5
        slope = (length(pixels + shift) - length(pixels - shift)) / 2e-5
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-5)
        assert abs(slope.item()) > 1e-9
