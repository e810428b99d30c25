"""Matching of adapters on the small transformer: its gradient, its progress, its bits."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from pds_ray.catalog import build_backbone, describe_backbone
from pds_ray.config import DistillConfig
from pds_ray.distillers import lora_matching
from pds_ray.distillers.base import Problem, prepared
from pds_ray.distillers.variables import Start, Variables
from pds_ray.stages.optimise import optimise
from pds_ray.store.flat import Layout, Snapshot
from pds_ray.training.loop import generator
from pds_ray.training.lora import adapt
from pds_ray.training.losses import info_nce
from pds_ray.training.two_towers import TwoTowers
from tests.support.tiny_distillation import Listed

SIDE, TEXT_WIDTH, PAIRS = 16, 5, 6
RATES = {"image_rate": 10.0, "text_rate": 10.0, "step_rate": 1e-3}


def student(dtype: torch.dtype) -> TwoTowers:
    torch.manual_seed(0)
    backbone = build_backbone(describe_backbone("small_vit"), SIDE)
    return TwoTowers(adapt(backbone, 2, 0), 64, TEXT_WIDTH, image_head=False).to(dtype)


def pairs(part: str, count: int, dtype: torch.dtype) -> Start:
    draw = generator("pairs", part)
    images = torch.randn(count, 3, SIDE, SIDE, generator=draw)
    text = torch.randn(count, TEXT_WIDTH, generator=draw)
    return Start(images.to(dtype), text.to(dtype))


@cache
def expert(dtype: torch.dtype) -> list[Snapshot]:
    """Train adapters and head on data; return the weights at the start and after each epoch."""
    model, data = student(dtype), pairs("real", 8, dtype)
    layout = Layout.of(model)
    snapshots = [layout.flatten(model)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        for _ in range(4):
            optimizer.zero_grad()
            info_nce(*model(data.images, data.text)).backward()
            optimizer.step()
        snapshots.append(layout.flatten(model))
    return snapshots


def make_problem(dtype: torch.dtype = torch.float32, **options) -> Problem:
    model = student(dtype)
    experts = Listed(Layout.of(model), {"0": expert(dtype)})
    config = DistillConfig(**{"steps": 2, "step_size": 0.1, **options})
    return prepared(Problem(model, experts, config, seed=3), lora_matching.DEFAULTS)


def make_variables(problem: Problem, dtype: torch.dtype = torch.float32) -> Variables:
    return lora_matching.variables(pairs("start", PAIRS, dtype), problem.config, problem.seed)


def test_only_adapters_and_the_text_head_are_matched():
    layout = make_problem().experts.layout
    assert len(layout.image) == 16
    assert all(entry.name.endswith((".up", ".down")) for entry in layout.image)
    assert {entry.name.partition(".")[0] for entry in layout.text} == {"text_head"}


@pytest.mark.parametrize("gradient", ["adjoint", "unrolled"])
def test_gradients_are_those_of_finite_differences(gradient):
    """The sum of both ratios by a pixel, a text vector and a step size, through attention."""
    problem = make_problem(torch.float64, gradient=gradient)
    variables = make_variables(problem, torch.float64)
    lora_matching.step(problem, variables, 1)
    grads = {name: p.grad.clone() for name, p in variables.named_parameters()}
    for name, place in (("images", (1, 2, 7, 4)), ("text", (3, 1)), ("step_sizes", (0,))):
        values = []
        for shift in (1e-5, -1e-5):
            moved = make_variables(problem, torch.float64)
            with torch.no_grad():
                moved.get_parameter(name)[place] += shift
            values.append(sum(lora_matching.step(problem, moved, 1).losses.values()))
        slope = (values[0] - values[1]) / 2e-5
        assert grads[name][place].item() == pytest.approx(slope, rel=1e-5), name
        assert abs(slope) > 1e-7, name


def test_the_student_comes_near_the_expert_as_the_set_is_learned():
    """Both ratios are about 1 at first: the student hardly moves, or past its target."""
    problem = make_problem(max_start=1, step_size=0.05, **RATES)
    variables = make_variables(problem)
    before = lora_matching.step(problem, variables, 0).losses
    optimizer = variables.optimizer(problem.config)
    for iteration in range(15):
        lora_matching.step(problem, variables, iteration)
        optimizer.step()
    after = lora_matching.step(problem, variables, 0).losses
    assert min(before.values()) > 0.9
    assert after["image"] < 0.3
    assert after["text"] < 0.6


def test_the_base_stays_and_gets_no_gradient():
    problem = make_problem()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    lora_matching.step(problem, make_variables(problem), 0)
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_six_iterations_are_three_and_three_more_to_the_bit():
    states: list[bytes] = []
    options = {**RATES, "step_size": 0.05, "iterations": 6}
    start = pairs("start", PAIRS, torch.float32)
    first = make_problem(**options)
    whole = optimise(first, lora_matching, start, save=states.append, save_every=3)
    torch.manual_seed(99)  # whatever the process did between them
    again = optimise(make_problem(**options), lora_matching, start, saved=states[1])
    assert again.history == whole.history
    for name, value in whole.tensors.items():
        assert torch.equal(again.tensors[name], value)
    assert not torch.equal(whole.tensors["images"], start.images)
