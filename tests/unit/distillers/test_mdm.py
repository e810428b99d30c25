"""MDM: its teachers, its loss, and steps that are functions of the iteration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pds_ray.config import DistillConfig
from pds_ray.distillers import mdm
from pds_ray.distillers.base import Problem, settled
from pds_ray.distillers.energy import energy
from pds_ray.distillers.variables import Start, Variables
from pds_ray.stages.optimise import optimise
from pds_ray.store.flat import Layout, Snapshot
from pds_ray.training.loop import generator, seed_of
from pds_ray.training.two_towers import ResidualHead
from tests.support.tiny_distillation import Listed
from tests.support.tiny_training import SIDE, TEXT_WIDTH, make_model

PAIRS, REAL = 6, 16


def wandering(model: nn.Module, count: int = 2, epochs: int = 3) -> Listed:
    """Return experts that start from the model's weights and take random steps, all a bit alike."""
    layout = Layout.of(model)
    start = layout.flatten(model)

    def walk(expert: str) -> list[Snapshot]:
        snapshots = [start]
        for epoch in range(epochs):
            moved = []
            for branch, flat in (("theta", snapshots[-1].theta), ("phi", snapshots[-1].phi)):
                own = torch.randn(flat.shape, generator=generator(expert, epoch, branch))
                common = torch.randn(flat.shape, generator=generator("all", epoch, branch))
                moved.append(flat + 0.05 * (own + common).to(flat))
            snapshots.append(Snapshot(*moved))
        return snapshots

    return Listed(layout, {name: walk(name) for name in map(str, range(count))})


def make_problem(experts: Listed | None = None, **options) -> Problem:
    model = make_model("backbone")
    pool = torch.randn(200, 3, SIDE, SIDE, generator=generator("pool")).cumsum(3) / 3
    captions = pool.mean((2, 3)) @ torch.randn(3, TEXT_WIDTH, generator=generator("captions"))

    def real(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randperm(len(pool), generator=draw)[:REAL]
        return pool[rows], captions[rows]

    config = settled(DistillConfig(**options), mdm.DEFAULTS)
    return Problem(model, experts or wandering(model), config, seed=5, real=real)


def weights_at(problem: Problem, epoch: int) -> dict[str, torch.Tensor]:
    """Return the weights of the first expert after some epochs, by name."""
    snapshot = problem.experts.snapshot("0", epoch)
    return problem.experts.layout.views(snapshot.theta, snapshot.phi)


def start() -> Start:
    draw = generator("start")
    images = torch.randn(PAIRS, 3, SIDE, SIDE, generator=draw)
    return Start(images, torch.randn(PAIRS, TEXT_WIDTH, generator=draw))


def make_variables(problem: Problem) -> Variables:
    return mdm.variables(start(), problem.config, problem.seed)


def mean_loss(problem: Problem, variables: Variables) -> float:
    """Return the loss as a mean over teachers and batches that no step has seen."""
    losses = [mdm.step(problem, variables, 1000 + i).losses["loss"] for i in range(8)]
    return sum(losses) / len(losses)


def test_its_loss_falls():
    problem = make_problem(image_rate=1, text_rate=1)
    variables = make_variables(problem)
    before = mean_loss(problem, variables)
    optimizer = variables.optimizer(problem.config)
    for iteration in range(40):
        mdm.step(problem, variables, iteration)
        optimizer.step()
    assert mean_loss(problem, variables) < 0.75 * before


def test_the_loss_is_its_formula_on_the_teacher_as_a_model():
    """All pairs are in the batch, so that their order does not matter."""
    problem = make_problem()
    variables = make_variables(problem)
    losses = mdm.step(problem, variables, 3).losses
    draw = generator(problem.seed, "mdm", 3)
    weights = mdm.teacher(problem, draw, seed_of(problem.seed, "mdm head", 3))
    model = make_model("backbone", seed=8)
    model.load_state_dict(weights)
    with torch.no_grad():
        image, text = model(*problem.real(draw))
        made_image, made_text = model(variables.images, variables.text)
    cosines = made_image @ made_text.T / 0.07
    right = -cosines.log_softmax(1).diag().mean() - cosines.log_softmax(0).diag().mean()
    assert losses["info_nce"] == pytest.approx(right.item() / 2, rel=1e-5)
    for name, sign in (("agreement", 1), ("discrepancy", -1)):
        found, made = (
            torch.nn.functional.normalize(one + sign * other, dim=1)
            for one, other in ((image, text), (made_image, made_text))
        )
        assert losses[name] == pytest.approx(0.8 * energy(found, made).item(), rel=1e-4)
        assert losses[name] > 0.01
    parts = losses["info_nce"] + losses["agreement"] + losses["discrepancy"]
    assert losses["loss"] == pytest.approx(parts, rel=1e-6)


def test_a_small_step_down_the_gradient_lowers_the_loss_of_the_same_iteration():
    problem = make_problem()
    variables = make_variables(problem)
    before = mdm.step(problem, variables, 3).losses["loss"]
    torch.optim.SGD(variables.parameters(), lr=0.01).step()
    assert mdm.step(problem, variables, 3).losses["loss"] < before


def test_the_gradient_of_both_together_is_cut_to_a_length(monkeypatch):
    problem = make_problem()
    gradients = []
    for longest in (1e9, 0.01):
        monkeypatch.setattr(mdm, "LONGEST", longest)
        variables = make_variables(problem)
        mdm.step(problem, variables, 0)
        gradients.append(torch.cat([p.grad.flatten() for p in variables.parameters()]))
    whole, cut = gradients
    assert whole.norm() > 0.02
    torch.testing.assert_close(cut, 0.01 * whole / whole.norm())


def test_gradients_are_those_of_the_step_alone():
    """Not of steps before, nor left in the model."""
    problem = make_problem()
    variables, again = make_variables(problem), make_variables(problem)
    mdm.step(problem, variables, 0)
    mdm.step(problem, variables, 1)
    mdm.step(problem, again, 1)
    for one, other in zip(variables.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_a_step_sees_as_many_pairs_as_the_batch_has():
    problem = make_problem(batch_size=4)
    variables = make_variables(problem)
    seen = set()
    for iteration in range(8):
        mdm.step(problem, variables, iteration)
        rows = variables.text.grad.abs().sum(1).nonzero().flatten().tolist()
        assert len(rows) == 4
        seen |= set(rows)
    assert seen == set(range(PAIRS))


def test_six_iterations_are_three_and_three_more_to_the_bit():
    states: list[bytes] = []
    options = {"image_rate": 1.0, "text_rate": 1.0, "iterations": 6}
    whole = optimise(make_problem(**options), mdm, start(), save=states.append, save_every=3)
    torch.manual_seed(99)  # whatever the process did between them
    again = optimise(make_problem(**options), mdm, start(), saved=states[1])
    assert [row["iteration"] for row in again.history] == [1, 2, 3, 4, 5, 6]
    assert again.history == whole.history
    for name, value in whole.tensors.items():
        assert torch.equal(again.tensors[name], value)
    assert not torch.equal(whole.tensors["images"], start().images)


def test_a_step_leaves_the_global_generator_and_the_model_as_they_were():
    problem = make_problem()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in problem.model.state_dict().items()}
    mdm.step(problem, make_variables(problem), 0)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_teachers_have_an_image_branch_between_start_and_experts_and_heads_of_their_own():
    problem = make_problem()
    start = weights_at(problem, 0)
    teachers = [mdm.teacher(problem, generator("t", i), i) for i in range(2)]
    for one in teachers:
        assert one.keys() == start.keys()
        assert not torch.equal(one["backbone.conv.weight"], start["backbone.conv.weight"])
    same = mdm.teacher(problem, generator("t", 0), 0)
    other_head = mdm.teacher(problem, generator("t", 0), 1)
    for name, value in teachers[0].items():
        assert torch.equal(same[name], value)
        if "norm" not in name:
            is_text = name.startswith("text_head.")
            assert torch.equal(other_head[name], value) != is_text, name


def test_the_reference_of_the_text_head_is_a_fresh_one():
    problem = make_problem()
    phi = mdm.head_like(problem, problem.experts.snapshot("0", 0), 8)
    torch.manual_seed(8)
    head = ResidualHead(TEXT_WIDTH, problem.model.width)
    layout = problem.experts.layout
    for entry in layout.text:
        expected = head.get_parameter(entry.name.removeprefix("text_head."))
        assert torch.equal(entry.view(phi), expected)
    assert len(phi) == layout.sizes[1]


def started_apart(count: int) -> Listed:
    """Return experts each of which starts from its own weights."""
    layout = Layout.of(make_model("backbone"))
    apart = {}
    for number in range(count):
        walked = wandering(make_model("backbone", seed=number)).snapshots["0"]
        apart[str(number)] = walked
    return Listed(layout, apart)


def owner(experts: Listed, snapshot: Snapshot) -> tuple[str, int]:
    for name, walked in experts.snapshots.items():
        for epoch, one in enumerate(walked):
            if one is snapshot:
                return name, epoch
    raise AssertionError


@pytest.mark.parametrize("apart", [False, True])
def test_experts_and_epochs_are_drawn(apart):
    """All of them, two snapshots at a time, none of epoch 0; never of experts that start apart."""
    experts = started_apart(3) if apart else wandering(make_model("backbone"), count=3)
    pairs = []
    for number in range(200):
        start, first, second = mdm.drawn(experts, generator("draw", number))
        pairs.append((owner(experts, first), owner(experts, second)))
        assert start is experts.snapshot(pairs[-1][0][0], 0)
    everything = {(name, epoch) for name in experts.names for epoch in (1, 2, 3)}
    assert {one for one, _ in pairs} == everything == {other for _, other in pairs}
    assert all(one != other for one, other in pairs)
    mixed = sum(one[0] != other[0] for one, other in pairs)
    assert mixed == 0 if apart else 100 < mixed < 170  # two thirds of 200


def test_one_expert_of_one_epoch_is_enough():
    """The teacher's image branch is then half of the way from its start to its end."""
    problem = make_problem(wandering(make_model("backbone"), count=1, epochs=1))
    found = mdm.teacher(problem, generator("t"), 0)["backbone.conv.weight"]
    start, end = (weights_at(problem, epoch)["backbone.conv.weight"] for epoch in (0, 1))
    torch.testing.assert_close(found, (start + end) / 2)
