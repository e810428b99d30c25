"""The energy of samples on the sphere against its formula and its symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pds_ray.distillers.energy import energy, features, kernel
from pds_ray.training.loop import generator


def sample(rows: int, part: str, width: int = 6) -> torch.Tensor:
    drawn = torch.randn(rows, width, generator=generator("energy", part), dtype=torch.float64)
    return F.normalize(drawn + 1, dim=1)


def by_hand(first: torch.Tensor, second: torch.Tensor, sigma: float) -> float:
    """Return the distance by loops over pairs of vectors, in numpy."""

    def mean(xs: np.ndarray, ys: np.ndarray) -> float:
        values = [
            np.exp(-(np.arccos(np.clip(x @ y, -1, 1)) ** 2) / (2 * sigma**2))
            for x in xs
            for y in ys
        ]
        return float(np.mean(values))

    a, b = first.numpy(), second.numpy()
    within = mean(a, a) + mean(b, b)
    return float(np.sqrt(max(within - 2 * mean(a, b), 0)))


@pytest.mark.parametrize("sigma", [0.5, 1.3])
def test_it_is_its_formula(sigma):
    first, second = sample(7, "a"), 0.3 - sample(4, "b")
    second = F.normalize(second, dim=1)
    found = energy(first, second, sigma).item()
    assert found > 0.1
    assert found == pytest.approx(by_hand(first, second, sigma), abs=1e-5)


def test_it_is_symmetric_and_does_not_turn_with_the_space():
    first, second = sample(7, "a"), sample(4, "b")
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator("turn"), dtype=torch.float64))
    distance = energy(first, second)
    torch.testing.assert_close(energy(second, first), distance, rtol=1e-12, atol=0)
    torch.testing.assert_close(energy(first @ turn, second @ turn), distance, rtol=1e-9, atol=0)
    assert not torch.isclose(energy(first @ turn, second), distance, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_samples_it_is_zero_with_a_finite_gradient(dtype):
    first = sample(5, "a").to(dtype).requires_grad_()
    distance = energy(first, first.detach().clone())
    assert distance.item() == 0
    distance.backward()
    assert first.grad is not None
    assert first.grad.isfinite().all()


def test_a_negative_radicand_gives_zero_and_no_nan():
    """A wide kernel is not positive definite on the circle: 1 + exp(-1.23) < 2 exp(-0.31)."""
    first = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    distance = energy(first, torch.tensor([[0.0, 1.0], [0.0, -1.0]]), sigma=2.0)
    assert distance.item() == 0
    distance.backward()
    assert first.grad is not None
    assert first.grad.isfinite().all()


def test_the_gradient_is_that_of_finite_differences():
    first = sample(4, "a").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: energy(F.normalize(x, dim=1), sample(5, "b")), first)


def test_a_step_down_the_gradient_brings_samples_nearer():
    first, second = sample(6, "a"), F.normalize(0.5 - sample(6, "b"), dim=1)
    moved = first.clone().requires_grad_()
    for _ in range(20):
        value = energy(F.normalize(moved, dim=1), second)
        (slope,) = torch.autograd.grad(value, moved)
        moved = (moved - slope).detach().requires_grad_()
    assert energy(F.normalize(moved, dim=1), second) < 0.8 * energy(first, second)


def test_the_kernel_is_one_at_no_angle_and_falls_with_it():
    ray = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.0, 0.3, 1.0, 2.5, np.pi])
    found = kernel(ray, torch.stack([angles.cos(), angles.sin()], dim=1))[0]
    torch.testing.assert_close(found, (-2 * angles**2).exp(), atol=1e-4, rtol=1e-3)


def test_features_are_the_directions_of_sum_and_difference():
    image, text = sample(5, "a"), sample(5, "b")
    agreement, discrepancy = features(image, text)
    for found, whole in ((agreement, image + text), (discrepancy, image - text)):
        np.testing.assert_allclose(
            found.numpy(), whole.numpy() / np.linalg.norm(whole.numpy(), axis=1, keepdims=True)
        )
    # sum and difference of unit vectors are at right angles
    torch.testing.assert_close((agreement * discrepancy).sum(1), torch.zeros(5).double())


def test_features_of_equal_embeddings_have_finite_gradients():
    image = sample(3, "a").requires_grad_()
    _, discrepancy = features(image, image.detach())
    discrepancy.sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
