"""The retrieval model of the published evaluations: an image and a text tower with residual heads.

Images go through a backbone and, if asked for, a residual head; text vectors go through a residual
head.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

DROPOUT = 0.1


class ResidualHead(nn.Module):
    """The projection of VL-Distill, LoRS and PDS: LayerNorm(a + Dropout(W2 GELU(a))), a = W1 x."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.project = nn.Linear(width_in, width_out)
        self.inner = nn.Linear(width_out, width_out)
        self.norm = nn.LayerNorm(width_out)

    def forward(self, x: torch.Tensor, dropout: torch.Tensor | None) -> torch.Tensor:
        """Project float32 [b, width_in] to [b, width_out].

        `dropout` is the scaled mask [b, width_out], None in evaluation.
        """
        a = self.project(x)
        b = self.inner(F.gelu(a))
        return self.norm(a + (b if dropout is None else b * dropout))


class TwoTowers(nn.Module):
    """Map images (or features of a frozen backbone) and text vectors to unit vectors."""

    def __init__(
        self, backbone: nn.Module | None, features: int, text_width: int, image_head: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_head = ResidualHead(features, features) if image_head else None
        self.text_head = ResidualHead(text_width, features)
        self.width = features

    def forward(
        self, images: torch.Tensor, text: torch.Tensor, dropout: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed b images and b text vectors; `dropout` is the result of `dropout_masks`."""
        image_mask, text_mask = (None, None) if dropout is None else dropout.unbind(1)
        return self.embed_images(images, image_mask), self.embed_text(text, text_mask)

    def embed_images(
        self, images: torch.Tensor, dropout: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return unit vectors [b, width] of images float32 [b, 3, S, S], or of features [b, f]."""
        x = images if self.backbone is None else self.backbone(images)
        return F.normalize(x if self.image_head is None else self.image_head(x, dropout), dim=1)

    def embed_text(self, text: torch.Tensor, dropout: torch.Tensor | None = None) -> torch.Tensor:
        """Return unit vectors [b, width] of text vectors float32 [b, t]."""
        return F.normalize(self.text_head(text, dropout), dim=1)

    def branches(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of the image branch and those of the text branch."""
        parts = [part for part in (self.backbone, self.image_head) if part is not None]
        image = [parameter for part in parts for parameter in part.parameters()]
        return image, list(self.text_head.parameters())


def dropout_masks(rows: int, width: int, draw: torch.Generator) -> torch.Tensor:
    """Return the scaled masks of both heads for a whole batch, float32 [rows, 2, width].

    They are drawn apart from the model, so that workers that share a batch take slices of the same
    masks.
    """
    return (torch.rand(rows, 2, width, generator=draw) >= DROPOUT).float() / (1 - DROPOUT)
