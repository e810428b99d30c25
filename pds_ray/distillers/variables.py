"""The learned tensors of a distiller: pixels, text vectors, step sizes, similarity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pds_ray.config import DistillConfig
from pds_ray.distillers.similarity import Similarity, make_similarity


@dataclass(frozen=True)
class Start:
    """The set that is improved: K pairs."""

    images: torch.Tensor
    """float32 [K, 3, S, S], normalised as the backbone takes them."""
    text: torch.Tensor
    """float32 [K, t]: vectors of the text encoder."""
    similarity: torch.Tensor | None = None
    """float32 [K, K]; None is the identity."""


class Variables(nn.Module):
    """The learned tensors; its state is that of the optimisation, with the optimizer's momenta."""

    def __init__(
        self,
        images: torch.Tensor,
        text: torch.Tensor,
        similarity: Similarity | None = None,
        step_size: float | None = None,
    ) -> None:
        super().__init__()
        self.images = nn.Parameter(images.clone())
        self.text = nn.Parameter(text.clone())
        self.similarity = similarity
        sizes = None if step_size is None else nn.Parameter(images.new_full((2,), step_size))
        self.step_sizes = sizes
        """float32 [2]: those of the image and the text branch; None where nothing is unrolled."""

    def optimizer(self, config: DistillConfig) -> torch.optim.SGD:
        """Return gradient descent with momentum, each kind of variable at its own rate."""
        similarity = [] if self.similarity is None else list(self.similarity.parameters())
        sizes = [] if self.step_sizes is None else [self.step_sizes]
        groups = [
            {"params": [self.images], "lr": config.image_rate},
            {"params": [self.text], "lr": config.text_rate},
            {"params": similarity, "lr": config.similarity_rate},
            {"params": sizes, "lr": config.step_rate},
        ]
        used = [group for group in groups if group["params"]]
        return torch.optim.SGD(used, momentum=config.momentum)

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a set keeps: images, text, and where learned similarity [K, K], step_sizes.

        They are copies in memory of the CPU.
        """
        found = {"images": self.images, "text": self.text}
        if self.similarity is not None and self.similarity.learned:
            found["similarity"] = self.similarity(torch.arange(len(self.images)))
        if self.step_sizes is not None:
            found["step_sizes"] = self.step_sizes
        return {name: value.detach().cpu().clone() for name, value in found.items()}


def for_trajectories(start: Start, config: DistillConfig, seed: int) -> Variables:
    """Return the variables of a method that unrolls a student; its options are settled."""
    similarity = make_similarity(start.images, start.similarity, config, seed)
    return Variables(start.images, start.text, similarity, config.step_size)
