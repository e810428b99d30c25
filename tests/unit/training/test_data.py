"""Batches, augmentation and normalisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.training.data import TrainingPairs, augment, batches, caption_rows
from tests.support.tiny_training import PIXELS


def test_pixels_are_normalised_channel_by_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    found = PIXELS(torch.from_numpy(images)).numpy()
    for channel, (mean, std) in enumerate(zip(PIXELS.mean, PIXELS.std, strict=True)):
        np.testing.assert_allclose(
            found[:, channel], (images[:, channel] / 255 - mean) / std, atol=1e-6
        )
    features = torch.randn(4, 7)
    assert PIXELS(features) is features


@given(st.integers(2, 400), st.integers(2, 130), st.integers(0, 99), st.integers(0, 99))
def test_an_epoch_has_every_pair_once(pairs, size, seed, epoch):
    steps = batches(pairs, size, "epoch", seed, epoch)
    assert len(steps) == math.ceil(pairs / size)
    assert sorted(torch.cat(steps).tolist()) == list(range(pairs))
    lengths = [len(step) for step in steps]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(2, 400), st.integers(2, 130), st.integers(0, 99), st.integers(0, 99))
def test_independent_draws_are_fresh_permutations_cut(pairs, size, seed, epoch):
    steps = batches(pairs, size, "independent", seed, epoch)
    assert len(steps) == math.ceil(pairs / size)
    for step in steps:
        assert len(step) == min(pairs, size)
        assert len(set(step.tolist())) == len(step)
        assert 0 <= step.min() <= step.max() < pairs


@pytest.mark.parametrize(
    ("pairs", "published"), [(100, 100), (200, 87), (300, 81), (500, 69), (1000, 67)]
)
def test_share_of_the_pairs_that_independent_draws_see(pairs, published):
    shares = [
        len(torch.cat(batches(pairs, 128, "independent", 0, epoch)).unique()) / pairs
        for epoch in range(200)
    ]
    assert 100 * np.mean(shares) == pytest.approx(published, abs=1)


@pytest.mark.parametrize("sampling", ["epoch", "independent"])
def test_batches_differ_between_epochs_and_seeds_and_in_an_epoch(sampling):
    drawn = [
        tuple(torch.cat(batches(50, 20, sampling, seed, epoch)).tolist())
        for seed in range(3)
        for epoch in (0, 1)
    ]
    assert len(set(drawn)) == 6
    first, second, *_ = batches(50, 20, sampling, 0, 0)
    assert first.tolist() != second[: len(first)].tolist()
    assert (
        batches(50, 20, sampling, 1, 1)[2].tolist() == batches(50, 20, sampling, 1, 1)[2].tolist()
    )


def test_the_middle_draw_changes_nothing():
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(augment(images, torch.full((3, 3), 0.5)), images, atol=1e-5, rtol=0)


def test_augmentation_moves_but_never_mirrors_turns_or_recolours():
    """Dark left, light right, a gradient down, a constant channel: each stays so under any draw."""
    across = torch.where(torch.arange(64) < 32, 0.0, 1.0).expand(64, 64)
    down = torch.linspace(0, 1, 64)[:, None].expand(64, 64)
    image = torch.stack([across, down, torch.full((64, 64), 0.3)]).expand(200, 3, 64, 64)
    moved = augment(image, torch.rand(200, 3, generator=torch.Generator().manual_seed(0)))
    assert (moved[:, 0, :, :16] < 0.01).all()
    assert (moved[:, 0, :, -16:] > 0.99).all()
    assert (moved[:, 1].diff(dim=1) >= -1e-5).all()
    assert (moved[:, 1, :, 0] - moved[:, 1, :, -1]).abs().max() < 1e-5
    torch.testing.assert_close(moved[:, 2], image[:, 2])
    changed = (moved[:, 0] - image[:, 0]).abs().amax((1, 2))
    assert (changed > 0.05).float().mean() > 0.9, "images are moved"


@pytest.mark.parametrize(
    ("draws", "left", "right"), [([1.0, 0.5, 0.5], 16, 48), ([0.0, 0.5, 0.5], 16, 48)]
)
def test_an_image_moves_by_at_most_a_twelfth(draws, left, right):
    """An edge in the middle of an image of 64 moves by 0.08 of it, 5.12 pixels."""
    image = torch.where(torch.arange(64) < 32, 0.0, 1.0).expand(1, 3, 64, 64)
    moved = augment(image, torch.tensor([draws]))[0, 0, 32]
    assert (moved[:left] == 0).all()
    assert (moved[right:] == 1).all()
    shift = 32 - (64 - moved.sum().item())
    assert abs(shift) == pytest.approx(0.08 * 64, abs=0.05)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(0, 99))
def test_a_visit_draws_one_of_the_captions_of_its_image(counts, seed):
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pairs = TrainingPairs(torch.zeros(len(counts), 1), torch.zeros(len(owner), 1), owner)
    rows = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    drawn = caption_rows(pairs, rows, torch.Generator().manual_seed(seed))
    assert torch.equal(owner[drawn], rows)


def test_all_captions_of_an_image_are_drawn_alike():
    pairs = TrainingPairs(torch.zeros(2, 1), torch.zeros(5, 1), torch.tensor([0, 0, 1, 1, 1]))
    rows, draw = torch.tensor([0, 1]).repeat(3000), torch.Generator().manual_seed(0)
    share = caption_rows(pairs, rows, draw).bincount(minlength=5) / 3000
    np.testing.assert_allclose(share, [1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3], atol=0.05)
    one = TrainingPairs(torch.zeros(2, 1), torch.zeros(2, 1))
    assert caption_rows(one, rows, draw) is rows
