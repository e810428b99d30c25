"""Losses against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.training.losses import contrastive, ence, info_nce, soft_contrastive, training_loss


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


def pairs_and_targets(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return unit embeddings, and similarities of which some leave 0 to 1."""
    rng = np.random.default_rng(seed)
    image, text = (rng.normal(size=(5, 3)) for _ in range(2))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    targets = rng.uniform(-0.3, 1.3, (5, 5))
    return torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(targets)


def test_ence_takes_similarity_as_it_is():
    image, text, targets = pairs_and_targets(0)
    logits, total = (image @ text.T / 0.07).numpy(), 0.0
    for table, weights in ((logits, targets.numpy()), (logits.T, targets.numpy().T)):
        for row, of_row in zip(table, weights, strict=True):
            total -= sum(of_row * (row - math.log(np.exp(row).sum())))
    assert ence(image @ text.T / 0.07, targets).item() == pytest.approx(total / 10, rel=1e-9)
    hard = ence(image @ text.T / 0.07, torch.eye(5, dtype=torch.float64))
    assert hard.item() == pytest.approx(info_nce(image, text).item(), rel=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_wbce_is_the_mean_of_two_means(soft):
    image, text, targets = pairs_and_targets(1)
    sums, counts = [0.0, 0.0], [1e-6, 1e-6]
    for i in range(5):
        for j in range(5):
            s, p = targets[i, j].item(), 1 / (1 + math.exp(-(image[i] @ text[j]).item() / 0.07))
            entropy = -s * math.log(p + 1e-6) - (1 - s) * math.log(1 - p + 1e-6)
            match = min(max(s, 0), 1) if soft else float(s > 0.5)
            for side, weight in enumerate((match, 1 - match)):
                sums[side] += weight * entropy
                counts[side] += weight
    expected = sum(a / b for a, b in zip(sums, counts, strict=True)) / 2
    found = training_loss("soft_wbce" if soft else "wbce")(image, text, targets)
    assert found.item() == pytest.approx(expected, rel=1e-9)
