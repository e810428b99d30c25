"""Optimise a set with any distiller: iterations, validation, checkpoints and guards.

A state is the variables, the optimizer's momenta and the history. All that is random in an
iteration is a function of its number, so a run that goes on from a state ends with the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import takewhile

import torch
from torch import nn

from pds_ray.distillers.base import Distiller, DistillError, Problem, Start, Variables, prepared
from pds_ray.telemetry import log
from pds_ray.training.loop import load_state, read_progress, save_state

STILL, STILL_FOR = 0.99, 200
"""A branch whose ratio stays above this for so many iterations is reported: it does not move."""

Row = dict[str, float]
Validate = Callable[[Mapping[str, torch.Tensor]], float]
"""Takes the tensors of a set (`Variables.tensors`), returns a score; more is better."""


@dataclass
class Progress:
    """The course of an optimisation so far."""

    history: list[Row] = field(default_factory=list)
    """Rows of the iterations: number, losses, step sizes, and the score where it was validated.

    With validation the start has a row, number 0.
    """
    best_iteration: int = 0
    best_score: float | None = None
    """None before the first validation."""
    since_best: int = 0
    """Validations since the best one."""

    @property
    def iteration(self) -> int:
        """The number of iterations done."""
        return int(self.history[-1]["iteration"]) if self.history else 0


@dataclass(frozen=True)
class Optimised:
    """The result of an optimisation."""

    tensors: dict[str, torch.Tensor]
    """As `Variables.tensors`: after the last iteration, or the best one if there is validation."""
    iteration: int
    """The iteration that they are of; 0 is the start, where nothing was better."""
    history: list[Row]


def optimise(
    problem: Problem,
    distiller: Distiller,
    start: Start,
    *,
    saved: bytes | None = None,
    save: Callable[[bytes], object] = lambda _state: None,
    save_every: int = 50,
    validate: Validate | None = None,
    step: Callable[[int], object] = lambda _done: None,
) -> Optimised:
    """Improve the set `start` and return it.

    `saved` is a state that `save` was given: the work goes on there; one that is damaged, or of
    other variables, is as none. `save` is called at the start, every `save_every` iterations, at
    the end, and when the gradients of an iteration are of no use. `step` is called after each
    iteration with the number done.

    Raises DistillError where numbers are none or a step size has come to its floor; what was saved
    last is sound. Raises ConfigError if the experts do not fit.
    """
    problem = prepared(problem, distiller.DEFAULTS)
    work = _Work(problem, distiller, start, judged=validate is not None)
    if saved is None or not work.load(saved):
        work.judge(validate)
        save(work.state())
    while not work.done:
        try:
            losses = work.gradients()
        except DistillError:
            save(work.state())  # nothing has been changed by the iteration that failed
            raise
        work.move(losses)
        if work.due:
            work.judge(validate)
        if work.done or work.progress.iteration % save_every == 0:
            save(work.state())
        step(work.progress.iteration)
    return work.result()


class _Work:
    """The variables on their way, with their optimizer and progress."""

    def __init__(self, problem: Problem, distiller: Distiller, start: Start, judged: bool) -> None:
        self.problem, self.distiller, self.start = problem, distiller, start
        self.config = problem.config
        self.variables = distiller.variables(start, self.config, problem.seed)
        self.best = copy.deepcopy(self.variables) if judged else None
        self.optimizer = self.variables.optimizer(self.config)
        self.progress = Progress()

    @property
    def _modules(self) -> nn.ModuleDict:
        best = {} if self.best is None else {"best": self.best}
        return nn.ModuleDict({"now": self.variables, **best})

    def state(self) -> bytes:
        return save_state(self._modules, self.optimizer, asdict(self.progress))

    def load(self, state: bytes) -> bool:
        """Go on from a state; return False, with nothing changed, if it is of no use."""
        progress = read_progress(state)
        if progress is None or progress.keys() != asdict(self.progress).keys():
            return False
        if not load_state(state, self._modules, self.optimizer):
            return False
        self.progress = Progress(**progress)
        return True

    @property
    def done(self) -> bool:
        waited = self.best is not None and self.progress.since_best >= self.config.patience
        return waited or self.progress.iteration >= self.config.iterations

    @property
    def due(self) -> bool:
        """True where this iteration is followed by a validation: every so many, and the last."""
        done, every = self.progress.iteration, self.config.evaluate_every
        return done == self.config.iterations or (every > 0 and done % every == 0)

    def gradients(self) -> dict[str, float]:
        """Set the gradients of the next iteration and return its losses. Raises DistillError."""
        self.optimizer.zero_grad()
        done = self.progress.iteration
        losses = self.distiller.step(self.problem, self.variables, done).losses
        bad = [name for name, loss in losses.items() if not torch.tensor(loss).isfinite()]
        bad += _not_finite((n, p.grad) for n, p in self.variables.named_parameters())
        if bad:
            raise DistillError(
                f"iteration {done + 1:,} gives no finite number for {', '.join(bad)}; give lower "
                "rates, such as a tenth of --distill.image-rate and --distill.text-rate, or a "
                "smaller --distill.step-size"
            )
        if self.config.anchor:
            images = self.variables.images
            pull = 2 * self.config.anchor * (images.detach() - self.start.images.to(images))
            images.grad = pull if images.grad is None else images.grad + pull
        return losses

    def move(self, losses: dict[str, float]) -> None:
        """Take the optimizer's step and note it. Raises DistillError if it went too far."""
        self.optimizer.step()
        number, sizes = self.progress.iteration + 1, self.variables.step_sizes
        if bad := _not_finite(self.variables.named_parameters()):
            raise DistillError(
                f"iteration {number:,} made {', '.join(bad)} infinite; give lower rates, such as "
                "a tenth of --distill.image-rate and --distill.text-rate"
            )
        if sizes is not None and float(sizes.detach().min()) <= self.config.step_floor:
            raise DistillError(
                f"a step size of the student fell to {float(sizes.detach().min()):.2g} in "
                f"iteration {number:,}, its floor is {self.config.step_floor:g}; give a lower "
                "--distill.step-rate, or a larger --distill.step-size"
            )
        row = {"iteration": number, **losses, **_named_sizes(self.variables)}
        self.progress.history.append(row)
        for branch in ("image", "text"):
            _warn_if_still(self.progress.history, branch)

    def judge(self, validate: Validate | None) -> None:
        """Validate the variables and keep them if none before were better."""
        if validate is None or self.best is None:
            return
        progress, score = self.progress, validate(self.variables.tensors())
        if not progress.history:
            progress.history.append({"iteration": 0})
        progress.history[-1]["score"] = score
        if progress.best_score is not None and not score > progress.best_score:
            progress.since_best += 1
            return
        progress.best_iteration, progress.best_score = progress.iteration, score
        progress.since_best = 0
        self.best.load_state_dict(self.variables.state_dict())

    def result(self) -> Optimised:
        progress = self.progress
        if self.best is None:
            return Optimised(self.variables.tensors(), progress.iteration, progress.history)
        return Optimised(self.best.tensors(), progress.best_iteration, progress.history)


def _not_finite(tensors: Iterable[tuple[str, torch.Tensor | None]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinite number."""
    return [name for name, x in tensors if x is not None and not bool(x.detach().isfinite().all())]


def _named_sizes(variables: Variables) -> dict[str, float]:
    if variables.step_sizes is None:
        return {}
    image, text = variables.step_sizes.tolist()
    return {"image_step": image, "text_step": text}


def _warn_if_still(history: list[Row], branch: str) -> None:
    """Log a warning, once, when a branch has not moved for long."""
    latest = reversed(history[-STILL_FOR - 1 :])
    still = sum(1 for _ in takewhile(lambda row: row.get(branch, 0.0) > STILL, latest))
    if still == STILL_FOR:
        log.event(
            "branch_still",
            f"pds-ray: the {branch} branch has hardly moved towards its target for {STILL_FOR} "
            "iterations; give a larger --distill.step-size or other rates",
            "warning",
            branch=branch,
            iteration=int(history[-1]["iteration"]),
        )
