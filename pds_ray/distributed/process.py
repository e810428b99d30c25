"""Settings of one process: threads of models, garbage collection, a time limit. No Ray here."""

from __future__ import annotations

import faulthandler
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")

Model = TypeVar("Model")

MODEL_THREADS = 4  # of each model, however many CPUs there are beyond: results round by how the work is shared out


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], None]]:
    """Ends the process, even one stuck in C code, when the block takes longer; what is given starts the clock anew."""

    def begin() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True)

    begin()
    try:
        yield begin
    finally:
        faulthandler.cancel_dump_traceback_later()


def load_model(load: Callable[..., Model], *args: Any) -> Model:
    """Gives torch MODEL_THREADS threads from here on, fewer if this process may use fewer cores; then `load(*args)`.

    With more than that, kernels wait for threads that have no core to run on: a ViT-B-32 takes tens of times as long.
    """
    with without_collections():
        import torch

        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        torch.set_num_threads(min(MODEL_THREADS, cores))
        return load(*args)


@contextmanager
def without_collections() -> Iterator[None]:
    """For large imports: what they make lives on, and looking through it for garbage again and again takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def with_faiss_threads(threads: int, function: Callable[..., Result], *args: Any) -> Result:
    """A reused worker keeps the thread count it began with: it is set anew."""
    import faiss

    faiss.omp_set_num_threads(threads)
    return function(*args)
