"""Losses against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.training.losses import contrastive, info_nce, soft_contrastive


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
