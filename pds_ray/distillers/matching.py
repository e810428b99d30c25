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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pds_ray.distillers.base import DistillError, Snapshot

Loss = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Loss of a step of the student: of theta [n], phi [m] and the number of the step.

It must be a function of them: whatever it draws comes from generators seeded with the step, since
`adjoint` and `tesla` compute each step twice.
"""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A tensor of the image branch and the same of the text branch."""

NO_DISTANCE = 1e-12
"""An expert that moved by less, squared, is no target."""


@dataclass(frozen=True)
class Matched:
    """The loss of one iteration and its gradients."""

    ratios: Pair
    """|theta_T - theta*|^2 / |theta_0 - theta*|^2, and the same of the text branch; scalars."""
    gradients: list[torch.Tensor]
    """With respect to each learned tensor."""
    step_gradients: Pair
    """With respect to b_v and b_l."""


@dataclass(frozen=True)
class _Goal:
    """The target, and the distances that the remaining ones are divided by."""

    target: Pair
    own: Pair
    """The squared distances from start to target of each branch."""
    merge: bool

    @property
    def divisors(self) -> Pair:
        """The divisors in L: a branch's own distance, or the sum of both where they are merged."""
        both = self.own[0] + self.own[1]
        return (both, both) if self.merge else self.own

    def left(self, point: Pair) -> Pair:
        """Return the squared distances that remain."""
        return _pair((x - y).square().sum() for x, y in zip(point, self.target, strict=True))

    def ratios(self, point: Pair) -> Pair:
        """Return the remaining share of each branch's distance, without a graph."""
        return _pair(n.detach() / d for n, d in zip(self.left(point), self.own, strict=True))

    def loss(self, point: Pair) -> torch.Tensor:
        """Return L of the last point of the student."""
        image, text = (n / d for n, d in zip(self.left(point), self.divisors, strict=True))
        return image + text

    def pull(self, point: Pair) -> Pair:
        """Return the gradient of L with respect to the last point: lambda and mu."""
        parts = zip(point, self.target, self.divisors, strict=True)
        return _pair(2 * (x - y) / d for x, y, d in parts)


def match(
    loss: Loss,
    learned: Sequence[torch.Tensor],
    steps: Pair,
    start: Snapshot,
    target: Snapshot,
    count: int,
    gradient: str,
    merge: bool = False,
) -> Matched:
    """Return the ratios and gradients of `count` steps of the student.

    `loss` closes over the `learned` tensors; `steps` are b_v and b_l, scalars; `gradient` is
    unrolled, adjoint or tesla. With `merge` L is one ratio, of the sums over both branches.

    Raises DistillError if the expert does not move from start to target.
    """
    goal = _goal(start, target, merge)
    point = (start.theta.detach(), start.phi.detach())
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention have no second derivative
        if gradient == "unrolled":
            return _unrolled(loss, learned, steps, point, goal, count)
        return _walked_back(loss, learned, steps, point, goal, count, exact=gradient == "adjoint")


def _goal(start: Snapshot, target: Snapshot, merge: bool) -> _Goal:
    ends = ((start.theta, target.theta), (start.phi, target.phi))
    own = _pair((x - y).square().sum() for x, y in ends)
    for distance, branch in zip(own, ("image", "text"), strict=True):
        if distance < NO_DISTANCE:
            raise DistillError(
                f"the {branch} branch of an expert does not move from start to target; train "
                "experts at a higher rate, or give --distill.expert-epochs a larger number"
            )
    return _Goal((target.theta, target.phi), own, merge)


def _unrolled(
    loss: Loss, learned: Sequence[torch.Tensor], steps: Pair, point: Pair, goal: _Goal, count: int
) -> Matched:
    """Return the gradient through the graph of all steps."""
    here = _pair(x.clone().requires_grad_() for x in point)
    for step in range(count):
        pushes = torch.autograd.grad(loss(*here, step), here, create_graph=True)
        here = _pair(x - b * g for x, b, g in zip(here, steps, pushes, strict=True))
    *gradients, on_v, on_l = _gradients(goal.loss(here), [*learned, *steps])
    return Matched(goal.ratios(here), gradients, (on_v, on_l))


def _walked_back(
    loss: Loss,
    learned: Sequence[torch.Tensor],
    steps: Pair,
    point: Pair,
    goal: _Goal,
    count: int,
    exact: bool,
) -> Matched:
    """Return the gradient of `adjoint` (exact) or of `tesla`."""
    points = _walk(loss, steps, point, count)
    pull = goal.pull(points[-1])
    gradients = [torch.zeros_like(x) for x in learned]
    on_steps = _pair(torch.zeros_like(b) for b in steps)
    for step in reversed(range(count)):
        here = _pair(x.requires_grad_() for x in points[step])
        pushes = torch.autograd.grad(loss(*here, step), here, create_graph=True)
        along = _pair((way * g).sum() for way, g in zip(pull, pushes, strict=True))
        h = steps[0].detach() * along[0] + steps[1].detach() * along[1]
        on_learned = _gradients(h, [*learned, *here] if exact else learned)
        if exact:
            *on_learned, on_theta, on_phi = on_learned
            pull = (pull[0] - on_theta, pull[1] - on_phi)
        gradients = [total - part for total, part in zip(gradients, on_learned, strict=True)]
        on_steps = _pair(t - part.detach() for t, part in zip(on_steps, along, strict=True))
    if not exact:  # as published: the loss of a step size is the ratio of its own branch
        scales = zip(on_steps, goal.divisors, goal.own, strict=True)
        on_steps = _pair(total * divisor / own for total, divisor, own in scales)
    return Matched(goal.ratios(points[-1]), gradients, on_steps)


def _walk(loss: Loss, steps: Pair, point: Pair, count: int) -> list[Pair]:
    """Return the points of the student, start and end among them, without a graph."""
    points = [point]
    for step in range(count):
        here = _pair(x.detach().requires_grad_() for x in points[-1])
        pushes = torch.autograd.grad(loss(*here, step), here)
        moves = zip(here, steps, pushes, strict=True)
        points.append(_pair((x - b * g).detach() for x, b, g in moves))
    return points


def _pair(tensors: Iterable[torch.Tensor]) -> Pair:
    image, text = tensors
    return image, text


def _gradients(value: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of a scalar, zeros for what it does not depend on."""
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, found, strict=True)]
