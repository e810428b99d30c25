"""The similarity S of images and text vectors that a distiller may learn, after LoRS (ICML 2024).

S[i, j] says how far caption j is a target of image i. A step of the student sees the block of its
own pairs, S[rows, rows].
"""

from __future__ import annotations

import torch
from torch import nn

from pds_ray.config import DistillConfig
from pds_ray.training.loop import generator

NO_FACTOR = 1e-6
"""A singular value below this is rounding."""


class Similarity(nn.Module):
    """The identity, and the interface of the others: `forward(rows)` is S[rows, rows]."""

    learned = False

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the block of some pairs, int64 [b] -> float [b, b]."""
        return torch.eye(len(rows), device=rows.device)


class Full(Similarity):
    """A number per image and text vector, [K, K]."""

    learned = True

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the block of some pairs, int64 [b] -> float [b, b]."""
        return self.matrix[rows][:, rows]


class LowRank(Similarity):
    """S = diag(a) + (alpha / r) L R^T; with a of ones and R of zeros it is the identity."""

    learned = True

    def __init__(
        self, diagonal: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float
    ) -> None:
        super().__init__()
        self.diagonal = nn.Parameter(diagonal.clone())
        self.left, self.right = nn.Parameter(left.clone()), nn.Parameter(right.clone())
        self.scale = alpha / left.shape[1]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the block of some pairs, int64 [b] -> float [b, b]."""
        product = self.left[rows] @ self.right[rows].T
        return torch.diag(self.diagonal[rows]) + self.scale * product


def make_similarity(
    like: torch.Tensor, start: torch.Tensor | None, config: DistillConfig, seed: int
) -> Similarity:
    """Return the similarity that the options name, begun at `start` [K, K] or at the identity.

    `like` [K, ...] gives the number of pairs, the dtype and the device.
    """
    if config.similarity == "identity":
        return Similarity()
    identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
    matrix = identity if start is None else start.to(identity)
    if config.similarity == "full":
        return Full(matrix)
    return _low_rank(matrix, min(config.rank, len(like)), config.alpha, seed)


def _low_rank(matrix: torch.Tensor, rank: int, alpha: float, seed: int) -> LowRank:
    """Return a similarity near a matrix: its diagonal, and the rest cut to the largest factors.

    Where the rest has fewer factors, or there is none, L is drawn from N(0, 1) and R is zero, as
    published: R moves first. With zeros in both neither would ever move.
    """
    diagonal = matrix.diagonal()
    rest = matrix - torch.diag(diagonal)
    draw = torch.randn(len(matrix), rank, generator=generator(seed, "similarity"))
    left, right = draw.to(matrix), matrix.new_zeros(len(matrix), rank)
    if rest.any():
        u, sizes, v = torch.linalg.svd(rest)
        there = sizes[:rank] > NO_FACTOR
        root = (sizes[:rank] * there * rank / alpha).sqrt()
        left, right = torch.where(there, u[:, :rank] * root, left), v[:rank].T * root
    return LowRank(diagonal, left, right, alpha)
