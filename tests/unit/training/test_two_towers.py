"""Heads and towers against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pds_ray.training.loop import generator
from pds_ray.training.two_towers import ResidualHead, dropout_masks
from tests.support.tiny_training import FEATURES, PIXELS, make_data, make_model


@pytest.mark.parametrize("with_dropout", [False, True])
def test_a_head_is_its_formula(with_dropout):
    """LayerNorm(a + mask * (W2 GELU(a) + c2)) with a = W1 x + c1, in matrices."""
    torch.manual_seed(0)
    head = ResidualHead(5, 9).double()
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    x = np.random.default_rng(0).normal(size=(4, 5))
    mask = (
        np.random.default_rng(1).integers(0, 2, (4, 9)) / 0.9 if with_dropout else np.ones((4, 9))
    )
    of = {name: value.numpy() for name, value in head.state_dict().items()}
    a = x @ of["project.weight"].T + of["project.bias"]
    gelu = a * 0.5 * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))
    y = a + mask * (gelu @ of["inner.weight"].T + of["inner.bias"])
    y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
    expected = y * of["norm.weight"] + of["norm.bias"]
    with torch.no_grad():
        found = head(torch.from_numpy(x), torch.from_numpy(mask) if with_dropout else None)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("width", "published"), [(1000, 1_772_000), (2304, 7_087_104)])
def test_a_head_has_the_published_size(width, published):
    assert (
        sum(parameter.numel() for parameter in ResidualHead(768, width).parameters()) == published
    )


def test_both_sides_are_unit_vectors_of_one_width():
    pairs, _ = make_data()
    for part in ("backbone", "all"):
        image, text = make_model(part)(PIXELS(pairs.images), pairs.text)
        assert image.shape == text.shape == (20, FEATURES)
        for rows in (image, text):
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))


def test_dropout_drops_a_tenth_and_keeps_the_mean():
    masks = dropout_masks(200, 300, generator("x"))
    assert masks.shape == (200, 2, 300)
    assert masks.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (masks == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert not torch.equal(masks[:, 0], masks[:, 1]), "the heads drop apart"
