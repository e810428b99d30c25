"""Similarities begin at the identity or a given matrix; a step sees the block of its pairs."""

from __future__ import annotations

import pytest
import torch

from pds_ray.config import DistillConfig
from pds_ray.distillers.similarity import LowRank, make_similarity

PAIRS, RANK = 7, 3


def made(kind: str, start: torch.Tensor | None = None, alpha: float = 2.0, rank: int = RANK):
    config = DistillConfig(similarity=kind, rank=rank, alpha=alpha)
    return make_similarity(torch.zeros(PAIRS, 1, dtype=torch.float64), start, config, seed=3)


def moved(kind: str) -> torch.nn.Module:
    similarity, draw = made(kind), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in similarity.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(noise)
    return similarity


@pytest.mark.parametrize("kind", ["identity", "full", "low_rank"])
def test_all_begin_at_the_identity(kind: str) -> None:
    similarity = made(kind)
    assert torch.equal(similarity(torch.arange(PAIRS)).double(), torch.eye(PAIRS).double())
    assert similarity.learned == (kind != "identity")


@pytest.mark.parametrize("kind", ["identity", "full", "low_rank"])
def test_a_step_sees_the_block_of_its_pairs_in_their_order(kind: str) -> None:
    similarity, rows = moved(kind), torch.tensor([5, 0, 3])
    whole = similarity(torch.arange(PAIRS))
    assert torch.allclose(similarity(rows), whole[rows][:, rows])


def test_low_rank_is_its_formula() -> None:
    similarity = moved("low_rank")
    assert isinstance(similarity, LowRank)
    parts = (similarity.diagonal, similarity.left, similarity.right)
    a, left, right = (part.detach() for part in parts)
    entry = 2.0 / RANK * float(left[1] @ right[4])
    assert float(similarity(torch.arange(PAIRS))[1, 4]) == pytest.approx(entry)
    own = float(a[2]) + 2.0 / RANK * float(left[2] @ right[2])
    assert float(similarity(torch.arange(PAIRS))[2, 2]) == pytest.approx(own)


def test_a_given_matrix_is_the_start() -> None:
    draw = torch.Generator().manual_seed(1)
    matrix = torch.rand(PAIRS, PAIRS, generator=draw, dtype=torch.float64)
    whole = torch.arange(PAIRS)
    assert torch.equal(made("full", matrix)(whole), matrix)
    assert torch.allclose(made("low_rank", matrix, rank=PAIRS)(whole), matrix)
    errors = [float((made("low_rank", matrix, rank=r)(whole) - matrix).norm()) for r in (1, 3, 5)]
    assert errors == sorted(errors, reverse=True)
    rest = matrix - torch.diag(matrix.diagonal())
    best = torch.linalg.svdvals(rest)[3:].square().sum().sqrt()
    assert errors[1] == pytest.approx(float(best)), "no matrix of rank 3 is nearer"


def test_factors_that_a_given_matrix_does_not_need_can_still_move() -> None:
    """Two equal captions: rank 2 of 3. A factor of zeros on both sides would have no gradient."""
    matrix = torch.eye(PAIRS, dtype=torch.float64)
    matrix[1, 4] = matrix[4, 1] = 0.5
    similarity, whole = made("low_rank", matrix), torch.arange(PAIRS)
    assert isinstance(similarity, LowRank)
    assert torch.allclose(similarity(whole), matrix)
    similarity(whole).square().sum().backward()
    moving = similarity.right.grad.norm(dim=0) + similarity.left.grad.norm(dim=0)
    assert (moving > 0.1).all()
