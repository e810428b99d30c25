"""Settings of one process."""

from __future__ import annotations

import gc
import os

import pytest

from pds_ray.distributed import process


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (4, 4), (64, 4)])
def test_a_model_has_no_more_threads_than_cores(monkeypatch, cores, threads):
    import torch

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    before = torch.get_num_threads()
    try:
        assert process.load_model(lambda model: (model, torch.get_num_threads()), "model") == (
            "model",
            threads,
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("collecting", [True, False])
def test_loading_a_model_leaves_garbage_collection_as_it_was(collecting):
    import torch

    threads = torch.get_num_threads()
    if not collecting:
        gc.disable()
    try:
        assert not process.load_model(gc.isenabled)
        assert gc.isenabled() == collecting
        with pytest.raises(ZeroDivisionError):
            process.load_model(divmod, 1, 0)
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def test_an_error_while_loading_is_raised_when_the_model_is_used():
    """In a constructor it would start the actor again."""
    loaded = process.keeping_error(divmod, 7, 2)
    assert loaded() == (3, 1)
    failed = process.keeping_error(divmod, 1, 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failed()
