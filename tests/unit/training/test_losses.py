"""Losses against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.training.losses import (
    SOFT_LOSSES,
    contrastive,
    ence,
    info_nce,
    soft_contrastive,
    soft_wbce,
    training_loss,
    wbce,
)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**31))
def test_the_loss_is_the_double_loop(pairs, width, seed):
    rng = np.random.default_rng(seed)
    image, text = (rng.normal(size=(pairs, width)) for _ in range(2))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    total = 0.0
    for i in range(pairs):
        own = math.exp(image[i] @ text[i] / 0.07)
        total -= math.log(own / sum(math.exp(image[i] @ text[j] / 0.07) for j in range(pairs)))
        total -= math.log(own / sum(math.exp(image[j] @ text[i] / 0.07) for j in range(pairs)))
    found = info_nce(torch.from_numpy(image), torch.from_numpy(text))
    assert found.item() == pytest.approx(total / (2 * pairs), rel=1e-9, abs=1e-12)


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**31))
def test_further_captions_are_negatives_of_the_images_alone(pairs, further, seed):
    logits = np.random.default_rng(seed).normal(size=(pairs, pairs + further))
    total = 0.0
    for i in range(pairs):
        total -= logits[i, i] - math.log(sum(math.exp(value) for value in logits[i]))
        total -= logits[i, i] - math.log(sum(math.exp(logits[j, i]) for j in range(pairs)))
    found = contrastive(torch.from_numpy(logits))
    assert found.item() == pytest.approx(total / (2 * pairs), rel=1e-9, abs=1e-12)


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_soft_targets_weigh_every_caption_and_every_image(pairs, seed):
    rng = np.random.default_rng(seed)
    logits, similarity = rng.normal(size=(pairs, pairs)), rng.uniform(0.1, 1, (pairs, pairs))
    total = 0.0
    for table, targets in ((logits, similarity), (logits.T, similarity.T)):
        for row, weights in zip(table, targets, strict=True):
            norm = math.log(sum(math.exp(value) for value in row))
            total -= sum(
                weight / weights.sum() * (value - norm)
                for value, weight in zip(row, weights, strict=True)
            )
    found = soft_contrastive(torch.from_numpy(logits), torch.from_numpy(similarity))
    assert found.item() == pytest.approx(total / (2 * pairs), rel=1e-9, abs=1e-12)
    hard = soft_contrastive(torch.from_numpy(logits), torch.eye(pairs, dtype=torch.float64))
    assert hard.item() == pytest.approx(contrastive(torch.from_numpy(logits)).item())


def similar(seed: int, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and a similarity that leaves 0 to 1, as learned ones do."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, n, generator=draw, dtype=torch.float64)
    return logits, 0.4 + torch.randn(n, n, generator=draw, dtype=torch.float64)


def entropy(logit: float, target: float) -> float:
    chance = 1 / (1 + math.exp(-logit))
    return -target * math.log(chance + 1e-6) - (1 - target) * math.log(1 - chance + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_losses_of_a_learned_similarity_are_their_formulas(seed: int) -> None:
    logits, s = similar(seed)
    z, rows = logits.tolist(), range(len(logits))
    of_rows, of_columns = 0.0, 0.0
    positive, negative, weighted, rest, weights = [], [], [], [], []
    for i in rows:
        for j in rows:
            target = float(s[i, j])
            row = math.log(sum(math.exp(z[i][k]) for k in rows))
            column = math.log(sum(math.exp(z[k][j]) for k in rows))
            of_rows += target * (row - z[i][j]) / len(logits)
            of_columns += target * (column - z[i][j]) / len(logits)
            one, weight = entropy(z[i][j], target), min(1.0, max(0.0, target))
            (positive if target > 0.5 else negative).append(one)
            weighted.append(weight * one)
            rest.append((1 - weight) * one)
            weights.append(weight)
    assert float(ence(logits, s)) == pytest.approx((of_rows + of_columns) / 2)
    means = [sum(part) / (len(part) + 1e-6) for part in (positive, negative)]
    assert float(wbce(logits, s)) == pytest.approx(sum(means) / 2)
    total = sum(weights)
    split = sum(weighted) / (total + 1e-6) + sum(rest) / (len(weights) - total + 1e-6)
    assert float(soft_wbce(logits, s)) == pytest.approx(split / 2)


def test_with_the_identity_ence_is_infonce_and_wbce_is_not() -> None:
    logits, _ = similar(0)
    identity = torch.eye(5, dtype=torch.float64)
    assert float(ence(logits, identity)) == pytest.approx(float(contrastive(logits)), rel=1e-14)
    assert float(soft_wbce(logits, identity)) == pytest.approx(float(wbce(logits, identity)))
    assert abs(float(wbce(logits, identity) - contrastive(logits))) > 0.1


@pytest.mark.parametrize("loss", SOFT_LOSSES.values(), ids=SOFT_LOSSES)
def test_losses_do_not_depend_on_the_order_of_pairs(loss) -> None:
    logits, s = similar(1)
    order = torch.tensor([3, 1, 4, 0, 2])
    swapped = loss(logits[order][:, order], s[order][:, order])
    assert float(swapped) == pytest.approx(float(loss(logits, s)))


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_a_training_takes_a_loss_by_its_name(name: str) -> None:
    """It takes embeddings, at the published scale; info_nce has hard targets where given none."""
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 5, 3, generator=draw, dtype=torch.float64)
    targets = 1.4 * torch.rand(5, 5, generator=draw, dtype=torch.float64) - 0.2
    if name == "info_nce":
        assert training_loss(name) is info_nce
        return
    expected = SOFT_LOSSES[name](image @ text.T / 0.07, targets)
    torch.testing.assert_close(training_loss(name)(image, text, similarity=targets), expected)
