"""The interface of a distiller: it learns the pixels and the text vectors of a set.

A distiller is given experts (models trained on all data, whose weights were kept after each epoch)
and a set to begin with. It computes one gradient per iteration; the optimizer's step, checkpoints,
validation and guards are the same for all (stages/optimise.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch

from pds_ray.config import DistillConfig
from pds_ray.distillers.smoothing import Smoothed, ranges
from pds_ray.distillers.variables import Start, Variables
from pds_ray.errors import ConfigError, UserError
from pds_ray.store.flat import Layout, Snapshot
from pds_ray.training.two_towers import TwoTowers

__all__ = [
    "DistillError",
    "Distiller",
    "Experts",
    "Layout",
    "Problem",
    "Snapshot",
    "Start",
    "Step",
    "Variables",
    "may_set",
    "prepared",
    "settled",
]


OF_LOOP = {"anchor", "evaluate_every"}
"""Options of which 0 is none, for every distiller."""


class DistillError(UserError, RuntimeError):
    """An optimisation that cannot go on: numbers that are none, or nothing that moves."""


class Experts(Protocol):
    """Models trained on all data: the weights of each at the start and after each epoch."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the experts."""
        ...

    @property
    def epochs(self) -> int:
        """Each expert has the snapshots 0 to `epochs`."""
        ...

    @property
    def layout(self) -> Layout:
        """The tensors of the flat vectors."""
        ...

    def snapshot(self, expert: str, epoch: int) -> Snapshot:
        """Return the weights of one expert after some epochs."""
        ...


@dataclass(frozen=True)
class Problem:
    """All that an iteration works on beside the variables."""

    model: TwoTowers
    """The student; its trained tensors are those of the experts."""
    experts: Experts
    config: DistillConfig
    """As given; `prepared` puts the distiller's own values in the place of 0 and auto."""
    seed: int
    real: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]] | None = None
    """Draws a batch of real pairs: images float32 [b, 3, S, S], normalised, and text [b, t]."""
    starts: tuple[int, int] = (1, 1)
    """The student starts from an expert after fewer epochs than these, image and text branch."""


@dataclass(frozen=True)
class Step:
    """The result of one iteration; the gradients stand in the `.grad` of the variables."""

    losses: dict[str, float]
    """By name. Methods of trajectories have the ratio of each branch, `image` and `text`."""


class Distiller(Protocol):
    """A module that the catalog names as a distiller."""

    TRAIN: Literal["all", "heads", "lora"]
    """The tensors that experts and student train."""
    DEFAULTS: Mapping[str, Any]
    """Its own values of the options of section `distill`, as published."""

    def variables(self, start: Start, config: DistillConfig, seed: int) -> Variables:
        """Return what is learned, at its start."""
        ...

    def step(self, problem: Problem, variables: Variables, iteration: int) -> Step:
        """Set the gradient of every variable for one iteration.

        All that is random is a function of the problem's seed and the iteration.
        """
        ...


def settled(config: DistillConfig, defaults: Mapping[str, Any]) -> DistillConfig:
    """Return the options with the distiller's own value where one is 0, auto or not given."""
    own = {name: value for name, value in defaults.items() if _is_open(getattr(config, name))}
    return replace(config, **own)


def may_set() -> set[str]:
    """Return the names of the options whose default leaves them to the distiller."""
    plain = DistillConfig()
    left = {field.name for field in fields(plain) if _is_open(getattr(plain, field.name))}
    return left - OF_LOOP


def prepared(problem: Problem, defaults: Mapping[str, Any]) -> Problem:
    """Return the problem with options settled, experts smoothed if asked for, and starts.

    The model is set to evaluate: dropout is drawn by the methods themselves, or not at all. Raises
    ConfigError if the experts were trained for too few epochs.
    """
    config, experts = settled(problem.config, defaults), problem.experts
    needed = config.max_start - 1 + config.expert_epochs
    if needed > experts.epochs:
        raise ConfigError(
            f"the experts have {experts.epochs} epochs, and starts and targets reach to epoch "
            f"{needed}; give --distill.max-start or --distill.expert-epochs a smaller number, or "
            "train the experts for longer"
        )
    problem.model.eval()
    if config.smooth:
        experts = Smoothed(experts)
    starts = (config.max_start, config.max_start)
    if config.independent_starts:
        starts = ranges(experts, config.max_start, config.expert_epochs)
    return replace(problem, config=config, experts=experts, starts=starts)


def _is_open(value: object) -> bool:
    return value in (None, "auto") or (value == 0 and not isinstance(value, bool))
