"""The loop against a torch loop written out, and its states against uninterrupted training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional

from pds_ray.training import loop
from tests.support.tiny_training import equal, weights

EPOCHS, STEPS = 4, 3


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def groups(model: nn.Sequential) -> list[dict]:
    """Two groups with a learning rate and a weight decay of their own."""
    return [
        {"params": model[0].parameters(), "lr": 0.05, "weight_decay": 0.1},
        {"params": model[2].parameters(), "lr": 0.02},
    ]


OPTIMIZERS: dict[str, Callable[[list[dict]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.01),
    "fused": lambda groups: torch.optim.AdamW(groups, weight_decay=0.01, fused=True),
}


def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = loop.generator("data", epoch)
    return [
        (torch.randn(6, 5, generator=draw), torch.randn(6, 2, generator=draw)) for _ in range(STEPS)
    ]


def rate(position: float) -> float:
    return 1 - position / EPOCHS


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, done: int = 0, **options: object
) -> None:
    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.huber_loss(model(batch[0]), batch[1])

    loop.train(optimizer, batches, loss, range(done, EPOCHS), rate, **options)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_loop_written_out(optimizer: str, max_norm: float | None):
    """Loss, parameter groups, schedule, clipping and the hook of each epoch, to the bit."""
    ours, plain = make_model(), make_model()
    snapshots: list[dict[str, torch.Tensor]] = []
    losses: list[torch.Tensor] = []
    numbers: list[int] = []

    def after_epoch(epoch: int, loss: torch.Tensor) -> None:
        numbers.append(epoch)
        losses.append(loss)
        snapshots.append(weights(ours))

    clip = partial(nn.utils.clip_grad_norm_, list(ours.parameters()), max_norm or math.inf)
    train(ours, OPTIMIZERS[optimizer](groups(ours)), after_epoch=after_epoch, before_step=clip)

    theirs = OPTIMIZERS[optimizer](groups(plain))
    for epoch in range(EPOCHS):
        for step, (x, y) in enumerate(batches(epoch)):
            share = 1 - (epoch + step / STEPS) / EPOCHS
            theirs.param_groups[0]["lr"] = 0.05 * share
            theirs.param_groups[1]["lr"] = 0.02 * share
            theirs.zero_grad()
            loss = functional.huber_loss(plain(x), y)
            loss.backward()
            if max_norm is not None:
                norms = [p.grad.norm() for p in plain.parameters()]
                assert torch.stack(norms).norm() > max_norm, "there is something to cut"
                nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
            theirs.step()
        assert equal(snapshots[epoch], weights(plain))
        assert torch.equal(losses[epoch], loss.detach())
        assert not losses[epoch].requires_grad
    assert numbers == list(range(EPOCHS))
    assert not equal(snapshots[0], snapshots[-1])


def test_without_a_schedule_the_rates_stay():
    model = make_model()
    optimizer = torch.optim.SGD(groups(model), lr=1.0)
    loop.train(optimizer, batches, lambda batch: model(batch[0]).square().mean(), range(2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.02]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_training_ends_with_the_same_bits(optimizer: str):
    whole = make_model()
    inner = OPTIMIZERS[optimizer](groups(whole))
    states: list[bytes] = []
    train(
        whole,
        inner,
        after_epoch=lambda epoch, _: states.append(loop.save_state(whole, inner, {"done": epoch})),
    )
    for epoch, state in enumerate(states):
        resumed = make_model(seed=9)
        outer = OPTIMIZERS[optimizer](groups(resumed))
        progress = loop.read_progress(state)
        assert progress == {"done": epoch}
        assert loop.load_state(state, resumed, outer)
        train(resumed, outer, epoch + 1)
        assert equal(weights(resumed), weights(whole))
        assert loop.save_state(resumed, outer, {"done": EPOCHS - 1}) == states[-1]


def test_a_state_names_its_tensors_by_what_they_belong_to():
    model = make_model()
    optimizer = torch.optim.SGD(groups(model), lr=1.0, momentum=0.9)
    train(model, optimizer)
    tensors = load(loop.save_state(model, optimizer, {}))
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    kinds = ("model", "optimizer/momentum_buffer")
    assert set(tensors) == {f"{kind}/{name}" for kind in kinds for name in names}
    assert torch.equal(tensors["model/2.bias"], model[2].bias)
    buffer = optimizer.state[model[0].weight]["momentum_buffer"]
    assert torch.equal(tensors["optimizer/momentum_buffer/0.weight"], buffer)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "another model"])
def test_a_state_that_does_not_fit_changes_nothing(damage: str):
    model = make_model()
    optimizer = torch.optim.SGD(groups(model), lr=1.0, momentum=0.9)
    train(model, optimizer)
    good = loop.save_state(model, optimizer, {"done": 1})
    other = nn.Linear(5, 7)
    state = {
        "empty": b"",
        "text": b"half of a state",
        "cut": good[:-1],
        "another model": loop.save_state(other, torch.optim.SGD(other.parameters()), {}),
    }[damage]
    before, moments = weights(model), copy.deepcopy(optimizer.state_dict())
    assert not loop.load_state(state, model, optimizer)
    assert equal(weights(model), before)
    for place, moment in optimizer.state_dict()["state"].items():
        assert torch.equal(moment["momentum_buffer"], moments["state"][place]["momentum_buffer"])


@pytest.mark.parametrize("state", [b"", b"half of a state", (1 << 60).to_bytes(8, "little")])
def test_a_damaged_state_has_no_progress(state: bytes):
    assert loop.read_progress(state) is None


def test_draws_are_functions_of_what_they_are_for():
    def draw(*parts: object) -> list[float]:
        return torch.rand(3, generator=loop.generator(*parts)).tolist()

    assert draw(1, "dropout", 2) == draw(1, "dropout", 2)
    assert len({tuple(draw(*parts)) for parts in [(1, 2), (2, 1), (1, "a"), (12,)]}) == 4
