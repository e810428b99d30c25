"""Teachers merged from two experts, per tensor (MDM, arXiv 2605.23482; Model Stock, 2403.19522).

With D1, D2 the ways from a reference to the two experts and c the cosine between them, the merged
tensor is

    reference + alpha t (D1 + D2) / 2,    t = 2 c / (1 + c).

t is 1 where the experts agree and 0 where they have nothing in common.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows


def merged(
    reference: torch.Tensor, first: torch.Tensor, second: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return one merged tensor of a model, of the shape of the three."""
    return reference + alpha * agreement(first - reference, second - reference)


def agreement(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return t times the mean of two changes of one tensor, of their shape.

    A negative cosine counts as 0: t would point away from both experts, and grow without bound as
    the cosine nears -1. (Our choice; the published code leaves it so.) So does the cosine of a
    tensor that did not move.
    """
    cosine = F.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(0, 1)
    return 2 * cosine / (1 + cosine) * (first + second) / 2
