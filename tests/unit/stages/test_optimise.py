"""The loop over any distiller: resume to the bit, guards, validation, the pull of the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pds_ray.config import DistillConfig
from pds_ray.distillers import bi_trajectory, lors, repblend
from pds_ray.distillers.base import DistillError, Problem, Start, Step, Variables
from pds_ray.stages.optimise import Optimised, optimise
from pds_ray.training.loop import read_progress
from tests.support.tiny_distillation import problem, start, student, wandering


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Scripted:
    """A distiller whose losses and gradients are written down."""

    losses: Callable[[int], dict[str, float]] = lambda _: {"image": 0.5, "text": 0.5}
    gradient: Callable[[int], float] = lambda _: 1.0
    step_gradient: float = 0.0
    DEFAULTS: Mapping[str, Any] = field(default_factory=lambda: {"image_rate": 1.0})
    TRAIN: str = "all"

    def variables(self, start: Start, config: DistillConfig, _seed: int) -> Variables:
        return Variables(start.images, start.text, None, config.step_size)

    def step(self, _problem: Problem, variables: Variables, iteration: int) -> Step:
        variables.images.grad = torch.full_like(variables.images, self.gradient(iteration))
        variables.step_sizes.grad = torch.full_like(variables.step_sizes, self.step_gradient)
        return Step(self.losses(iteration))


def scripted_problem(**options: Any) -> Problem:
    model = student()
    config = DistillConfig(
        **{"max_start": 1, "expert_epochs": 1, "step_size": 0.1, "momentum": 0.0, **options}
    )
    return Problem(model, wandering(model), config, 0)


def equal(one: Optimised, other: Optimised) -> bool:
    assert one.tensors.keys() == other.tensors.keys()
    same = all(torch.equal(x, other.tensors[name]) for name, x in one.tensors.items())
    return same and (one.iteration, one.history) == (other.iteration, other.history)


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("distiller", [bi_trajectory, lors, repblend], ids=lambda d: d.__name__)
def test_ten_iterations_are_five_and_a_kill_and_five(distiller: Any, validated: bool) -> None:
    options = {"iterations": 10, "steps": 2, "similarity_rate": 0.1}
    options |= {"evaluate_every": 2, "patience": 9}
    made = problem(distiller, **options)
    judge = {"validate": lambda tensors: float(tensors["text"].sum())} if validated else {}
    whole_states: list[bytes] = []
    whole = optimise(made, distiller, start(), save=whole_states.append, save_every=5, **judge)
    states: list[bytes] = []

    def kill(done: int) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        optimise(made, distiller, start(), save=states.append, save_every=5, step=kill, **judge)
    assert read_progress(states[-1])["history"][-1]["iteration"] == 5
    done: list[int] = []
    rest = optimise(
        made, distiller, start(), saved=states[-1], save=states.append, save_every=5,
        step=done.append, **judge,
    )  # fmt: skip
    assert done == [6, 7, 8, 9, 10]
    assert equal(rest, whole)
    assert states[-1] == whole_states[-1], "variables, momenta and history"
    assert [row["iteration"] for row in whole.history][-10:] == list(range(1, 11))
    again = optimise(made, distiller, start(), saved=states[-1], step=done.append, **judge)
    assert equal(again, whole)
    assert len(done) == 5, "a finished one is done"


@pytest.mark.parametrize("saved", [b"damaged", b""])
def test_a_damaged_state_is_as_none(saved: bytes) -> None:
    made = problem(lors, iterations=2)
    assert equal(optimise(made, lors, start(), saved=saved), optimise(made, lors, start()))


def test_a_state_of_other_variables_is_as_none() -> None:
    states: list[bytes] = []
    optimise(problem(bi_trajectory, iterations=2), bi_trajectory, start(), save=states.append)
    made = problem(lors, iterations=2)
    assert equal(optimise(made, lors, start(), saved=states[-1]), optimise(made, lors, start()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["image", "text", "images"])
def test_numbers_that_are_none_end_it_and_the_last_state_is_kept(where: str, value: float) -> None:
    """In either branch, or in a gradient alone."""

    def losses(iteration: int) -> dict[str, float]:
        return {"image": 0.5, "text": 0.5, **({where: value} if iteration == 3 else {})}

    distiller = Scripted(losses)
    if where == "images":
        distiller = Scripted(gradient=lambda iteration: value if iteration == 3 else 1.0)
    states: list[bytes] = []
    made = scripted_problem(iterations=9)
    with pytest.raises(
        DistillError, match=f"iteration 4 gives no finite number for {where}; give lower rates"
    ):
        optimise(made, distiller, start(), save=states.append)
    rest = optimise(scripted_problem(iterations=3), distiller, start(), saved=states[-1])
    assert rest.iteration == 3
    assert torch.allclose(rest.tensors["images"], start().images - 3)


def test_a_step_too_far_is_not_saved() -> None:
    distiller = Scripted(gradient=lambda iteration: 1e300 if iteration == 3 else 0.0)
    states: list[bytes] = []
    made = scripted_problem(iterations=9, image_rate=1e300)
    with pytest.raises(DistillError, match="iteration 4 made images infinite"):
        optimise(made, distiller, start(), save=states.append, save_every=2)
    progress = [read_progress(state)["history"] for state in states]
    assert [len(history) for history in progress] == [0, 2]


def test_a_step_size_at_its_floor_ends_it() -> None:
    made = scripted_problem(iterations=9, step_rate=1.0, step_floor=0.02)
    with pytest.raises(
        DistillError, match=r"fell to 0\.01 in iteration 3, its floor is 0\.02; give a lower"
    ):
        optimise(made, Scripted(step_gradient=0.03), start())


def test_an_expert_that_stands_still_ends_it() -> None:
    made = problem(lors, iterations=3)
    for walk in made.experts.snapshots.values():
        walk[:] = walk[:1] * len(walk)
    states: list[bytes] = []
    with pytest.raises(DistillError, match="the image branch of an expert does not move"):
        optimise(made, lors, start(), save=states.append)
    assert read_progress(states[-1])["history"] == []


def test_a_branch_that_does_not_move_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    def losses(iteration: int) -> dict[str, float]:
        return {"image": 0.995, "text": 0.5 if iteration == 250 else 0.999}

    optimise(scripted_problem(iterations=460), Scripted(losses), start())
    said = capsys.readouterr().err.splitlines()
    assert ["image" in line for line in said] == [True, False, False]
    assert all("has hardly moved towards its target for 200 iterations" in line for line in said)


@pytest.mark.parametrize(
    ("scores", "kept", "ended"),
    [
        ([5, 4, 3, 2, 1, 0, 0], 0, 6),  # the start was best: three worse ones end it
        ([5, 6, 6, 7, 1, 1, 1, 9], 6, 12),  # an equal one is no better
        ([1, 2, 3, 4, 5, 6, 7], 12, 12),
        ([5, 1, 1, 6, 1, 1, 8], 12, 12),
    ],
)
@pytest.mark.parametrize("kill_at", [0, 5])
def test_validation_keeps_the_best_and_ends_in_time(
    scores: list[float], kept: int, ended: int, kill_at: int
) -> None:
    made = scripted_problem(iterations=12, evaluate_every=2, patience=3)
    seen: list[torch.Tensor] = []

    def validate(tensors: Mapping[str, torch.Tensor]) -> float:
        seen.append(tensors["images"])
        done = int((start().images - tensors["images"]).mean().round())
        return scores[done // 2]

    states: list[bytes] = []

    def kill(done: int) -> None:
        if done == kill_at:
            raise Killed

    common = {"save": states.append, "save_every": 1, "validate": validate}
    if kill_at:
        with pytest.raises(Killed):
            optimise(made, Scripted(), start(), step=kill, **common)
    found = optimise(made, Scripted(), start(), saved=states[-1] if states else None, **common)
    assert found.iteration == kept
    assert torch.allclose(found.tensors["images"], start().images - kept)
    assert found.history[-1]["iteration"] == ended
    judged = {row["iteration"]: row["score"] for row in found.history if "score" in row}
    assert judged == {2 * n: scores[n] for n in range(ended // 2 + 1)}
    assert len(seen) == len(judged), "no validation is repeated"


def test_the_start_pulls_as_far_as_it_is_asked_to() -> None:
    """Gradient 1 and eta |X - X0|^2 are in balance at X0 - 1 / (2 eta)."""
    made = scripted_problem(iterations=200, anchor=2.0, image_rate=0.1)
    found = optimise(made, Scripted(), start())
    assert torch.allclose(found.tensors["images"], start().images - 0.25)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize(("share", "ends_near"), [(0.95, True), (1.05, False)])
def test_an_anchor_holds_below_the_bound_that_is_checked(
    momentum: float, share: float, ends_near: bool
) -> None:
    """One push, then the anchor alone: near the start below rate x anchor = 1 + momentum."""
    pushed = Scripted(gradient=lambda iteration: float(iteration == 0))
    made = scripted_problem(iterations=150, momentum=momentum, anchor=share * (1 + momentum))
    found = optimise(made, pushed, start())
    away = float((found.tensors["images"] - start().images).abs().max())
    assert (away < 0.1) == ends_near
    assert ends_near or away > 10


def test_the_tensors_of_a_set() -> None:
    found = optimise(problem(lors, iterations=1), lors, start()).tensors
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "images": (8, 3, 6, 6), "text": (8, 4), "similarity": (8, 8), "step_sizes": (2,),
    }  # fmt: skip
    plain = optimise(problem(bi_trajectory, iterations=1), bi_trajectory, start()).tensors
    assert plain.keys() == {"images", "text", "step_sizes"}
