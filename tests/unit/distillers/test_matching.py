"""Gradients of matching against finite differences, each other, and what they leave out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pds_ray.distillers import bi_trajectory, lors, repblend
from pds_ray.distillers.base import DistillError, Layout, Problem, Snapshot, Variables
from pds_ray.distillers.matching import Matched, match
from pds_ray.distillers.repblend import blended
from pds_ray.distillers.trajectory import endpoints, student_loss, two_towers
from pds_ray.training.two_towers import TwoTowers
from tests.support.tiny_distillation import FEATURES, SIDE, TEXT_WIDTH, problem, start


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def numbers(tensors: Sequence[torch.Tensor]) -> list[float]:
    return [float(x) for x in tensors]


class Case:
    """One iteration of a distiller on a toy, as a function of all that is learned."""

    def __init__(self, distiller: Any, **options: Any) -> None:
        self.problem: Problem = problem(distiller, **options)
        self.variables: Variables = distiller.variables(start(), self.problem.config, 0)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():  # away from points where a gradient is zero
            for parameter in self.variables.similarity.parameters():
                noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
                parameter.add_(0.1 * noise)
        self.student = blended if self.problem.config.mix else two_towers
        sizes = torch.tensor([0.1, 0.07], dtype=torch.float64).requires_grad_()
        self.sizes = (sizes[0], sizes[1])

    @property
    def learned(self) -> list[torch.Tensor]:
        v = self.variables
        return [v.images, v.text, *v.similarity.parameters()]

    def __call__(self, gradient: str, **other: Any) -> Matched:
        config = self.problem.config
        options = {
            "loss": student_loss(self.problem, self.variables, 0, self.student),
            "steps": self.sizes,
            "count": config.steps,
            "merge": bool(config.merge_branches),
            **other,
        }
        first, target = endpoints(self.problem, 0)
        return match(learned=self.learned, start=first, target=target, gradient=gradient, **options)

    def value(self, sizes: Sequence[torch.Tensor]) -> float:
        """Return L from steps of plain gradient descent, one by one."""
        config = self.problem.config
        loss = student_loss(self.problem, self.variables, 0, self.student)
        first, target = endpoints(self.problem, 0)
        here, ends = [first.theta, first.phi], [target.theta, target.phi]
        for step in range(config.steps):
            here = [x.detach().requires_grad_() for x in here]
            pushes = torch.autograd.grad(loss(here[0], here[1], step), here)
            here = [x - b * g for x, b, g in zip(here, sizes, pushes, strict=True)]
        left = [float((x - y).detach().square().sum()) for x, y in zip(here, ends, strict=True)]
        begin = zip((first.theta, first.phi), ends, strict=True)
        own = [float((x - y).square().sum()) for x, y in begin]
        if config.merge_branches:
            return sum(left) / sum(own)
        return left[0] / own[0] + left[1] / own[1]


CASES = {
    "bi_trajectory": (bi_trajectory, {}),
    "chunks": (bi_trajectory, {"sampling": "chunks", "batch_size": 3, "steps": 5}),
    "lors": (lors, {}),
    "lors_soft": (lors, {"loss": "soft_wbce"}),
    "lors_full_ence_merged": (lors, {"similarity": "full", "loss": "ence", "merge_branches": True}),
    "lors_dropout": (lors, {"dropout": "replay"}),
    "lors_augmented": (lors, {"augment": True}),
    "repblend": (repblend, {}),
    "repblend_apart": (repblend, {"merge_branches": False, "dropout": "replay"}),
}


def case(name: str, **options: Any) -> Case:
    distiller, own = CASES[name]
    return Case(distiller, **{**own, **options})


@pytest.mark.parametrize("gradient", ["unrolled", "adjoint"])
@pytest.mark.parametrize(
    "name", ["bi_trajectory", "lors", "lors_full_ence_merged", "lors_augmented", "repblend"]
)
def test_gradients_are_those_of_finite_differences(name: str, gradient: str) -> None:
    made = case(name)
    found, step = made(gradient), 1e-6
    draw = torch.Generator().manual_seed(2)
    for tensor, exact in zip(made.learned, found.gradients, strict=True):
        # the steepest entry, and one at random
        places = {int(exact.abs().argmax()), int(torch.randint(exact.numel(), (), generator=draw))}
        for place in places:
            flat, values = tensor.data.view(-1), []
            kept = float(flat[place])
            for change in (step, -step):
                flat[place] = kept + change
                values.append(made.value(made.sizes))
            flat[place] = kept
            slope = (values[0] - values[1]) / (2 * step)
            assert slope == pytest.approx(float(exact.view(-1)[place]), rel=1e-6, abs=1e-8)
    for branch in (0, 1):
        values = []
        for change in (step, -step):
            sizes = [size.detach().clone() for size in made.sizes]
            sizes[branch] += change
            values.append(made.value(sizes))
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(found.step_gradients[branch]), rel=1e-6)


def all_gradients(matched: Matched) -> list[torch.Tensor]:
    return [*matched.gradients, *matched.step_gradients]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("name", CASES)
def test_adjoint_is_unrolled(name: str, count: int) -> None:
    made = case(name, steps=count)
    one, other = made("unrolled"), made("adjoint")
    assert numbers(one.ratios) == pytest.approx(numbers(other.ratios), rel=1e-12)
    for x, y in zip(all_gradients(one), all_gradients(other), strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


def detached(made: Case) -> list[torch.Tensor]:
    """Return the gradients of the set when each point of the student counts as a constant."""
    loss = student_loss(made.problem, made.variables, 0, made.student)
    first, target = endpoints(made.problem, 0)
    here, sums = [first.theta, first.phi], [torch.zeros(()), torch.zeros(())]
    for step in range(made.problem.config.steps):
        here = [x.detach().requires_grad_() for x in here]
        pushes = torch.autograd.grad(loss(here[0], here[1], step), here, create_graph=True)
        moves = [-size.detach() * g for size, g in zip(made.sizes, pushes, strict=True)]
        sums = [total + move for total, move in zip(sums, moves, strict=True)]
        here = [x + move for x, move in zip(here, moves, strict=True)]
    ends = ((first.theta, target.theta), (first.phi, target.phi))
    value = sum(
        (x + way - y).square().sum() / (x - y).square().sum()
        for (x, y), way in zip(ends, sums, strict=True)
    )
    return list(torch.autograd.grad(value, made.learned))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_tesla_takes_the_points_of_the_student_for_constants(count: int) -> None:
    made = case("lors", steps=count)
    for x, y in zip(made("tesla").gradients, detached(made), strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-14)


def test_tesla_is_exact_for_one_step_and_biased_for_four() -> None:
    one = case("lors", steps=1)
    for x, y in zip(all_gradients(one("tesla")), all_gradients(one("unrolled")), strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-14)
    four = case("lors", steps=4)
    tesla, exact = four("tesla"), four("unrolled")
    assert numbers(tesla.ratios) == pytest.approx(numbers(exact.ratios))
    gaps = [off(x, y) for x, y in zip(all_gradients(tesla), all_gradients(exact), strict=True)]
    assert min(gaps) > 0.01, "every part of the gradient is another one"


def test_tesla_gives_a_step_size_the_ratio_of_its_own_branch() -> None:
    apart, merged = case("lors", merge_branches=False), case("lors", merge_branches=True)
    one, other = apart("tesla"), merged("tesla")
    assert numbers(one.step_gradients) == pytest.approx(numbers(other.step_gradients))
    assert off(one.gradients[0], other.gradients[0]) > 0.1


@pytest.mark.parametrize("gradient", ["unrolled", "adjoint", "tesla"])
def test_a_student_that_stays_has_ratio_one_and_one_that_arrives_zero(gradient: str) -> None:
    made = case("lors")
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert made(gradient, steps=(zero, zero)).ratios == (1, 1)
    loss = student_loss(made.problem, made.variables, 0)
    first, _ = endpoints(made.problem, 0)
    here = [first.theta.clone().requires_grad_(), first.phi.clone().requires_grad_()]
    pushes = torch.autograd.grad(loss(here[0], here[1], 0), here)
    ends = [(x - b * g).detach() for x, b, g in zip(here, made.sizes, pushes, strict=True)]
    arrived = match(loss, made.learned, made.sizes, first, Snapshot(ends[0], ends[1]), 1, gradient)
    assert max(map(float, arrived.ratios)) < 1e-24
    assert max(float(g.abs().max()) for g in all_gradients(arrived)) < 1e-12


@pytest.mark.parametrize("branch", ["image", "text"])
def test_an_expert_that_stands_still_is_no_target(branch: str) -> None:
    made = case("lors")
    first, target = endpoints(made.problem, 0)
    still = (
        Snapshot(first.theta + 1e-9, target.phi)
        if branch == "image"
        else Snapshot(target.theta, first.phi + 1e-9)
    )
    loss = student_loss(made.problem, made.variables, 0)
    with pytest.raises(DistillError, match=f"the {branch} branch of an expert does not move"):
        match(loss, made.learned, made.sizes, first, still, 2, "adjoint")


def test_what_a_step_draws_is_the_same_in_both_passes() -> None:
    """Masks that were drawn from a generator that runs on would differ, and so the gradients."""
    made = case("lors_dropout")
    loss = student_loss(made.problem, made.variables, 0)
    first, _ = endpoints(made.problem, 0)
    assert torch.equal(loss(first.theta, first.phi, 2), loss(first.theta, first.phi, 2))
    plain = student_loss(case("lors").problem, made.variables, 0)
    assert not torch.equal(loss(first.theta, first.phi, 2), plain(first.theta, first.phi, 2))
    runs_on = torch.Generator().manual_seed(0)

    def redrawn(theta: torch.Tensor, phi: torch.Tensor, _step: int) -> torch.Tensor:
        rows = torch.randperm(8, generator=runs_on)[:4]
        weights = made.problem.experts.layout.views(theta, phi)
        image, text = two_towers(
            made.problem.model, weights, made.variables.images[rows], made.variables.text[rows],
            None, runs_on,
        )  # fmt: skip
        return -(image @ text.T).log_softmax(1).diagonal().mean()

    runs_on.manual_seed(0)
    exact = made("unrolled", loss=redrawn)
    runs_on.manual_seed(0)
    assert off(made("adjoint", loss=redrawn).gradients[0], exact.gradients[0]) > 0.1


def test_attention_has_a_second_derivative_within_the_matching() -> None:
    """The fused kernels have none: torch refuses to differentiate their backward pass."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=SIDE, patch_size=3, embed_dim=FEATURES * 2, depth=1, num_heads=2, num_classes=0,
        global_pool="avg",
    )  # fmt: skip
    model = TwoTowers(vit, FEATURES * 2, TEXT_WIDTH, image_head=False).double().eval()
    layout, made = Layout.of(model), start()
    images, text = made.images.clone().requires_grad_(), made.text.clone().requires_grad_()
    first = layout.flatten(model)
    target = Snapshot(first.theta + 0.01, first.phi + 0.01)

    def loss(theta: torch.Tensor, phi: torch.Tensor, _step: int) -> torch.Tensor:
        embedded = torch.func.functional_call(model, layout.views(theta, phi), (images, text))
        return -(embedded[0] @ embedded[1].T).log_softmax(1).diagonal().mean()

    size = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    results = [
        match(loss, [images, text], (size, size), first, target, 2, gradient)
        for gradient in ("adjoint", "unrolled")
    ]
    for x, y in zip(results[0].gradients, results[1].gradients, strict=True):
        assert torch.allclose(x, y, rtol=1e-8, atol=1e-14)
    assert float(results[0].gradients[0].norm()) > 0
    theta, phi = first.theta.clone().requires_grad_(), first.phi
    (push,) = torch.autograd.grad(loss(theta, phi, 0), theta, create_graph=True)
    with pytest.raises(RuntimeError, match=r"not implemented|derivative"):
        torch.autograd.grad(push.sum(), images)
