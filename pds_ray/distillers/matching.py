"""Bi-trajectory matching: train a student on the set for T steps, compare it with an expert.

The student starts from an expert's weights (theta_0 of the image branch, phi_0 of the text branch),
takes T steps of plain gradient descent with the step sizes b_v and b_l, and is to end where the
expert stood some epochs later (theta*, phi*):

    theta_{i+1} = theta_i - b_v g_v(theta_i, phi_i),   phi_{i+1} = phi_i - b_l g_l(theta_i, phi_i)
    L = |theta_T - theta*|^2 / |theta_0 - theta*|^2  +  the same for phi          (VL-Distill, TMLR)

L is 2 where the student did not move and 0 where it ended as the expert. Its gradient with respect
to the set and the step sizes can be had in three ways:

- `unrolled` keeps the graph of all T steps. Exact; memory grows with T.
- `adjoint` keeps only the T points, and walks back through them. With lambda_T = dL/dtheta_T,
  mu_T = dL/dphi_T, and from i = T - 1 down to 0 h = b_v lambda^T g_v + b_l mu^T g_l at point i:

      dL/dset -= dh/dset,   dL/db_v -= lambda^T g_v,   lambda -= dh/dtheta_i,   mu -= dh/dphi_i

  This is the same gradient, in the memory of one step.
- `tesla` leaves out the last two updates, as the code of TESLA (ICML 2023) and LoRS (ICML 2024)
  does: the points count as constants, the products (I - b H) of later steps are dropped. It is the
  exact gradient for T = 1 only, otherwise another direction; for comparison with published figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pds_ray.distillers.base import DistillError, Snapshot

Loss = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Loss of a step of the student: of theta [n], phi [m] and the number of the step.

It must be a function of them: whatever it draws comes from generators seeded with the step, since
`adjoint` and `tesla` compute each step twice.
"""

NO_DISTANCE = 1e-12
"""An expert that moved by less, squared, is no target."""


@dataclass(frozen=True)
class Matched:
    """The loss of one iteration and its gradients."""

    image: torch.Tensor
    """The ratio |theta_T - theta*|^2 / |theta_0 - theta*|^2, scalar."""
    text: torch.Tensor
    """The same of the text branch."""
    gradients: list[torch.Tensor]
    """With respect to each learned tensor."""
    step_gradients: tuple[torch.Tensor, torch.Tensor]
    """With respect to b_v and b_l."""


@dataclass(frozen=True)
class _Goal:
    """The target, and the distances that the remaining ones are divided by."""

    target: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor]
    """The squared distances from start to target of each branch."""
    merge: bool

    @property
    def divisors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The divisors in L: a branch's own distance, or the sum of both where they are merged."""
        both = self.own[0] + self.own[1]
        return (both, both) if self.merge else self.own

    def left(self, point: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [(x - y).square().sum() for x, y in zip(point, self.target, strict=True)]

    def ratios(self, point: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [n.detach() / d for n, d in zip(self.left(point), self.own, strict=True)]

    def loss(self, point: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = [n / d for n, d in zip(self.left(point), self.divisors, strict=True)]
        return parts[0] + parts[1]


def match(
    loss: Loss,
    learned: Sequence[torch.Tensor],
    steps: tuple[torch.Tensor, torch.Tensor],
    start: Snapshot,
    target: Snapshot,
    count: int,
    gradient: str,
    merge: bool = False,
) -> Matched:
    """Return loss and gradients of `count` steps of the student.

    `loss` closes over the `learned` tensors; `steps` are b_v and b_l, scalars; `gradient` is
    unrolled, adjoint or tesla. With `merge` L is one ratio, of the sums over both branches. Raises DistillError if the expert does not move.
    """
    goal = _goal(start, target, merge)
    point = (start.theta.detach(), start.phi.detach())
    # fused kernels of attention have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        if gradient == "unrolled":
            return _unrolled(loss, learned, steps, point, goal, count)
        return _walked_back(loss, learned, steps, point, goal, count, exact=gradient == "adjoint")


def _goal(start: Snapshot, target: Snapshot, merge: bool) -> _Goal:
    own = [(start.theta - target.theta).square().sum(), (start.phi - target.phi).square().sum()]
    for distance, branch in zip(own, ("image", "text"), strict=True):
        if distance < NO_DISTANCE:
            raise DistillError(
                f"the {branch} branch of an expert does not move from start to target; train "
                "experts at a higher rate, or give --distill.expert-epochs a larger number"
            )
    return _Goal((target.theta, target.phi), (own[0], own[1]), merge)


def _unrolled(
    loss: Loss,
    learned: Sequence[torch.Tensor],
    steps: tuple[torch.Tensor, torch.Tensor],
    point: tuple[torch.Tensor, torch.Tensor],
    goal: _Goal,
    count: int,
) -> Matched:
    theta, phi = (x.requires_grad_() for x in (point[0].clone(), point[1].clone()))
    for step in range(count):
        g_v, g_l = torch.autograd.grad(loss(theta, phi, step), (theta, phi), create_graph=True)
        theta, phi = theta - steps[0] * g_v, phi - steps[1] * g_l
    *gradients, on_v, on_l = _gradients(goal.loss((theta, phi)), [*learned, *steps])
    return Matched(*goal.ratios((theta, phi)), gradients, (on_v, on_l))


def _walked_back(
    loss: Loss,
    learned: Sequence[torch.Tensor],
    steps: tuple[torch.Tensor, torch.Tensor],
    point: tuple[torch.Tensor, torch.Tensor],
    goal: _Goal,
    count: int,
    exact: bool,
) -> Matched:
    """Return the result of `adjoint` (exact) or of `tesla`."""
    points = _walk(loss, steps, point, count)
    pull = [
        2 * (x - y) / d for x, y, d in zip(points[-1], goal.target, goal.divisors, strict=True)
    ]  # lambda and mu
    gradients = [torch.zeros_like(x) for x in learned]
    on_steps = [torch.zeros_like(x) for x in steps]
    for step in reversed(range(count)):
        here = [x.requires_grad_() for x in points[step]]
        pushes = torch.autograd.grad(loss(here[0], here[1], step), here, create_graph=True)
        along = [(way * push).sum() for way, push in zip(pull, pushes, strict=True)]
        h = steps[0].detach() * along[0] + steps[1].detach() * along[1]
        *on_learned, on_theta, on_phi = _gradients(h, [*learned, *here])
        gradients = [total - part for total, part in zip(gradients, on_learned, strict=True)]
        on_steps = [total - part.detach() for total, part in zip(on_steps, along, strict=True)]
        if exact:
            pull = [pull[0] - on_theta, pull[1] - on_phi]
    if not exact:  # as published: whatever the loss, a step size has the ratio of its own branch
        scales = [d / own for d, own in zip(goal.divisors, goal.own, strict=True)]
        on_steps = [total * scale for total, scale in zip(on_steps, scales, strict=True)]
    return Matched(*goal.ratios(points[-1]), gradients, (on_steps[0], on_steps[1]))


def _walk(
    loss: Loss,
    steps: tuple[torch.Tensor, torch.Tensor],
    point: tuple[torch.Tensor, torch.Tensor],
    count: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the points of the student, start and end among them, without a graph."""
    points = [point]
    for step in range(count):
        theta, phi = (x.detach().requires_grad_() for x in points[-1])
        pushes = torch.autograd.grad(loss(theta, phi, step), (theta, phi))
        moved = [
            x.detach() - b.detach() * g for x, b, g in zip((theta, phi), steps, pushes, strict=True)
        ]
        points.append((moved[0], moved[1]))
    return points


def _gradients(value: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of a scalar, zeros for what it does not depend on."""
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, found, strict=True)]
