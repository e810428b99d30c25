"""Losses of processes, machines and space: what they are counted as and what is said of them."""

from __future__ import annotations

import pytest
import ray

from pds_ray.distributed import tasks, watch


def test_lost_machines_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work may crash its process, but spot machines go whatever it does."""
    monkeypatch.setattr(tasks, "TASK_RETRIES", 2)
    monkeypatch.setattr(tasks, "MACHINES_LOST", 5)
    crash, gone = ray.exceptions.WorkerCrashedError(), ray.exceptions.NodeDiedError("")
    late = ray.exceptions.GetTimeoutError("what was on the machine has to be made anew")
    budget = tasks.RetryBudget()
    assert [budget.spend(error) for error in [gone] * 4 + [late] + [crash] * 3] == [True] * 7 + [
        False
    ]
    assert str(budget) == "processes lost: 3, machines lost: 5"
    budget = tasks.RetryBudget()
    assert [budget.spend(gone) for _ in range(6)] == [True] * 5 + [False]


def test_the_node_named_as_full_is_where_space_ran_out() -> None:
    """Ray names first the task that waits for a value of another."""

    class Nested(ray.exceptions.OutOfDiskError):
        def __str__(self) -> str:
            return (
                "ray::count() (pid=1, ip=10.0.0.1)\n"
                "  ray::encode() (pid=2, ip=10.0.0.2)\nLocal disk is full"
            )

    assert "full on node 10.0.0.2;" in watch.no_space(Nested(""))
    assert "full here;" in watch.no_space(ray.exceptions.ObjectStoreFullError("no space"))
    assert watch.no_space(OSError("ip=10.0.0.1")) == ""
