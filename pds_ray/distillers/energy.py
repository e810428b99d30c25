"""Distances of two samples on the unit sphere, and the features that MDM compares by them.

The kernel of unit vectors x, y is a Gaussian of the angle between them,

    k(x, y) = exp(-arccos(x . y)^2 / (2 sigma^2)),

and the distance of samples A, B is sqrt(mean k(A, A) + mean k(B, B) - 2 mean k(A, B)) (MDM,
arXiv 2605.23482).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

SIGMA = 0.5
"""The width of the kernel in radians, as published."""
MARGIN = 1e-6
"""Cosines stay so far from -1 and 1, where the slope of arccos is infinite."""
EPSILON = 1e-12
"""Added under the root, whose slope at 0 is infinite; as in the published code."""
SHORTEST = 1e-6
"""A sum or difference that is shorter has no direction: its feature is shorter than 1."""


def features(image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return agreement and discrepancy of unit embeddings [n, d]: unit vectors [n, d] each.

    They are the directions of image + text and of image - text.
    """
    agreement = F.normalize(image + text, dim=1, eps=SHORTEST)
    return agreement, F.normalize(image - text, dim=1, eps=SHORTEST)


def kernel(first: torch.Tensor, second: torch.Tensor, sigma: float = SIGMA) -> torch.Tensor:
    """Return k(x, y) of all unit vectors of [n, d] and [m, d]. [n, m]."""
    angle = (first @ second.T).clamp(MARGIN - 1, 1 - MARGIN).arccos()
    return (-angle.square() / (2 * sigma**2)).exp()


def energy(first: torch.Tensor, second: torch.Tensor, sigma: float = SIGMA) -> torch.Tensor:
    """Return the distance of two samples of unit vectors, [n, d] and [m, d]: a scalar, not below 0.

    It is 0, with a finite gradient, where the samples are equal. The kernel is not positive
    definite on the sphere, so that the radicand may be negative: it is then taken as 0. The kernel
    of a vector with itself counts; the published code leaves it out.
    """
    within = kernel(first, first, sigma).mean() + kernel(second, second, sigma).mean()
    radicand = within - 2 * kernel(first, second, sigma).mean()
    return (radicand.clamp(min=0) + EPSILON).sqrt() - EPSILON**0.5
