"""Merged teachers at the ends of the formula, and against it in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pds_ray.distillers.merging import merged
from pds_ray.training.loop import generator

SHAPES = [(4, 3), (5,), (2, 3, 2)]


def tensors(part: str) -> list[torch.Tensor]:
    draw = generator("merging", part)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]


def merge(
    references: list[torch.Tensor],
    first: list[torch.Tensor],
    second: list[torch.Tensor],
    alpha: float,
) -> list[torch.Tensor]:
    triples = zip(references, first, second, strict=True)
    return [merged(*triple, alpha) for triple in triples]


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def plus(some: list[torch.Tensor], others: list[torch.Tensor], factor: float = 1):
    return [one + factor * other for one, other in zip(some, others, strict=True)]


def test_equal_experts_give_a_part_of_their_way():
    reference, change = tensors("reference"), tensors("change")
    expert = plus(reference, change)
    for alpha in (0.5, 1.0):
        close(merge(reference, expert, expert, alpha), plus(reference, change, alpha))


def test_nothing_is_merged_at_alpha_0():
    reference = tensors("reference")
    close(merge(reference, tensors("a"), tensors("b"), 0), reference)


def test_experts_at_right_angles_give_the_reference():
    reference = tensors("reference")
    one, other = [t.clone() for t in reference], [t.clone() for t in reference]
    for first, second in zip(one, other, strict=True):
        first.view(-1)[0] += 2
        second.view(-1)[1] += 3
    close(merge(reference, one, other, 0.5), reference)


@pytest.mark.parametrize("length", [1.0, 0.5, 3.0])
def test_opposed_experts_give_the_reference(length):
    reference, change = tensors("reference"), tensors("change")
    one, other = plus(reference, change), plus(reference, change, -length)
    close(merge(reference, one, other, 0.5), reference)


def test_experts_that_did_not_move_give_the_reference():
    reference = tensors("reference")
    close(merge(reference, reference, reference, 0.5), reference)
    close(merge(reference, plus(reference, tensors("a")), reference, 0.5), reference)


def test_each_tensor_has_its_own_share():
    """The formula in numpy, with a cosine per tensor."""
    reference, common = tensors("reference"), tensors("common")
    one = plus(plus(reference, common), tensors("a"), 0.4)
    other = plus(plus(reference, common), tensors("b"), 0.4)
    shares = []
    for place, found in enumerate(merge(reference, one, other, 0.5)):
        origin, a, b = (t[place].numpy() for t in (reference, one, other))
        a, b = a - origin, b - origin
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        share = 2 * cosine / (1 + cosine)
        np.testing.assert_allclose(found.numpy(), origin + 0.5 * share * (a + b) / 2)
        shares.append(share)
    assert np.ptp(shares) > 0.01, "the shares differ"


def test_the_order_of_experts_does_not_matter():
    reference, one, other = tensors("reference"), tensors("a"), tensors("b")
    close(merge(reference, one, other, 0.5), merge(reference, other, one, 0.5))
