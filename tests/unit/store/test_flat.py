"""Flat vectors hold every trained weight once, in the order of `parameters()`."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from pds_ray.errors import ConfigError
from pds_ray.store.flat import Layout
from tests.support.tiny_distillation import student


def test_flatten_and_views_are_inverse_and_in_the_order_of_parameters() -> None:
    model = student()
    layout = Layout.of(model)
    flat = layout.flatten(model)
    assert torch.equal(
        torch.cat([flat.theta, flat.phi]), torch.cat([p.flatten() for p in model.parameters()])
    )
    views = layout.views(flat.theta, flat.phi)
    assert list(views) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(views[name], p) for name, p in model.named_parameters())
    assert layout.sizes == (len(flat.theta), len(flat.phi))
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_a_snapshot_is_no_alias_of_the_weights() -> None:
    """On a CPU `detach().cpu()` copies nothing: all snapshots would be the live weights."""
    model = student()
    layout = Layout.of(model)
    before = layout.flatten(model)
    kept = before.theta.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(before.theta, kept)
    assert torch.equal(layout.flatten(model).theta, kept + 1)
    layout.load(model, before)
    assert torch.equal(layout.flatten(model).theta, kept)


def test_a_branch_of_one_tensor_is_copied_too() -> None:
    model = nn.Linear(2, 1, bias=False)
    flat = Layout.of(model).flatten(model)
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(flat.theta + 1, model.weight.flatten())
    assert len(flat.phi) == 0


def test_a_shared_tensor_is_held_once_and_a_frozen_one_not_at_all() -> None:
    one = nn.Linear(3, 3)
    model = nn.Sequential(one, one, nn.Linear(3, 2))
    assert Layout.of(model).sizes == (12 + 8, 0)
    model[2].requires_grad_(False)
    assert [entry.name for entry in Layout.of(model).image] == ["0.weight", "0.bias"]


def test_other_tensors_are_refused_by_name() -> None:
    model = student()
    layout = Layout.of(model)
    other = student("heads")
    with pytest.raises(ConfigError, match=r"other tensors than the model: backbone\.0\.bias, back"):
        layout.flatten(other)
    with pytest.raises(ConfigError, match=r"backbone\.0\.bias"):
        layout.load(other, layout.flatten(model))
