"""Low-rank adapters on a vision transformer (LoRA, arXiv 2106.09685).

A linear layer with weight W and adapter (up B, down A) computes W x + B A x; W stays as it is.

The published figures of LoRA matching have rank 4 and say no more. All else is our choice: which
layers are adapted, a scale of 1, B from zero, and A the same in all experts of a seed, so that
their adapters can be compared and merged.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from pds_ray.config import ConfigError
from pds_ray.training.loop import generator

ADAPTED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Layers of every block that get an adapter, by timm's names; norms and patches get none."""


class Adapted(nn.Linear):
    """A frozen linear layer with an adapter: `down` [rank, in] and `up` [out, rank].

    Weight and bias are those of the layer it replaces, under the same names.
    """

    def __init__(self, layer: nn.Linear, rank: int, draw: torch.Generator) -> None:
        nn.Module.__init__(self)  # nn.Linear would draw weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        bound = 1 / math.sqrt(layer.in_features)  # of Kaiming's rule with slope sqrt(5)
        down = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=draw)
        self.down = nn.Parameter(down.to(layer.weight))
        self.up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


def adapt(backbone: nn.Module, rank: int, seed: int) -> nn.Module:
    """Freeze a backbone and put adapters on its blocks, in place; return it.

    The adapter of a layer depends on `seed`, its name and shape and on nothing else. Raises
    ConfigError in one line if the backbone has no such layers.
    """
    layers = {
        name: part
        for name, part in backbone.named_modules()
        if isinstance(part, nn.Linear) and name.endswith(ADAPTED)
    }
    if not all(any(name.endswith(end) for name in layers) for end in ADAPTED):
        raise ConfigError(
            f"the backbone has no blocks with {', '.join(ADAPTED)}; adapters need a "
            "vision transformer: give --experts.backbone small_vit or vit_tiny_patch16_224"
        )
    backbone.requires_grad_(False)
    for name, layer in layers.items():
        backbone.set_submodule(name, Adapted(layer, rank, generator("adapter", seed, name)))
    return backbone


def deltas(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Return the change of the weight of each adapted layer, up @ down, by the layer's name.

    Unlike the two factors it is one tensor for one function: (up / c, c down) has the same.
    """
    return {
        name: part.up @ part.down
        for name, part in backbone.named_modules()
        if isinstance(part, Adapted)
    }


def merged_weights(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state for the backbone without adapters that computes what it does with them."""
    changes = deltas(backbone)
    factors = {f"{layer}.{factor}" for layer in changes for factor in ("up", "down")}
    state = {k: v for k, v in backbone.state_dict().items() if k not in factors}
    for layer, change in changes.items():
        state[f"{layer}.weight"] = (state[f"{layer}.weight"] + change).detach()
    return state
