"""Schedules, optimizers and measuring of the protocols."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pds_ray.config import ProtocolConfig
from pds_ray.recipes import protocol
from pds_ray.training.retrieval import evaluate, make_optimizer, schedule
from pds_ray.training.workers import Workers
from tests.support.tiny_training import PIXELS, equal, make_data, make_model, weights


def test_the_published_schedule():
    paper = protocol("paper").protocol
    factor = schedule(paper)
    rates = [
        paper.learning_rate * factor(epoch + share) for epoch in range(101) for share in (0.0, 0.9)
    ]
    assert rates == pytest.approx([0.2] * 2 * 51 + [0.02] * 2 * 50)


def test_the_cosine_falls_from_the_start_to_zero():
    factor = schedule(ProtocolConfig(epochs=10, schedule="cosine"))
    factors = [factor(epoch + share) for epoch in range(10) for share in (0, 0.5)]
    assert factors[0] == 1.0
    assert factor(5) == pytest.approx(0.5)
    assert factor(10) == pytest.approx(0, abs=1e-12)
    assert (np.diff(factors) < 0).all()


def test_optimizers_are_those_of_the_protocol():
    model = make_model()
    sgd = make_optimizer(model.parameters(), protocol("paper").protocol)
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (
        0.2,
        0.9,
        5e-4,
        False,
    )
    adamw = make_optimizer(model.parameters(), ProtocolConfig(learning_rate=0.3, weight_decay=0.2))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (0.3, 0.2)


def test_parameter_groups_keep_what_they_set():
    model = make_model()
    head = {"params": model.text_head.parameters(), "lr": 0.5, "weight_decay": 0.0}
    groups = [head, {"params": model.image_head.parameters()}]
    found = make_optimizer(groups, ProtocolConfig(learning_rate=0.3, weight_decay=0.2)).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in found] == [(0.5, 0.0), (0.3, 0.2)]


def test_measuring_leaves_the_model_as_it_was():
    _, test = make_data()
    model = make_model().train()
    before = weights(model)
    evaluate(model, test, PIXELS, Workers())
    assert model.training
    assert equal(weights(model), before)
