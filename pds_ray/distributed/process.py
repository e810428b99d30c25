"""Settings of one process: environment, threads, garbage collection, a time limit. No Ray here."""

from __future__ import annotations

import faulthandler
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pds_ray.distributed import limits

Result = TypeVar("Result")

Model = TypeVar("Model")

# Threads of each model, however many CPUs there are beyond: results round by their number.
MODEL_THREADS = 4


@contextmanager
def default_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set those environment variables that are not set; unset them afterwards."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], None]]:
    """End the process, even one stuck in C code, if the block takes longer.

    Calling what it gives restarts the clock.
    """

    def begin() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True)

    begin()
    try:
        yield begin
    finally:
        faulthandler.cancel_dump_traceback_later()


def load_model(load: Callable[..., Model], *args: Any) -> Model:
    """Give torch its threads and return `load(*args)`.

    They are MODEL_THREADS, or fewer if this job may use fewer CPUs. With more threads than
    cores, kernels wait for threads that have no core to run on: a ViT-B-32 takes tens of times as
    long.
    """
    with without_collections():
        import torch

        torch.set_num_threads(min(MODEL_THREADS, limits.cpus()))
        return load(*args)


def keeping_error(load: Callable[..., Model], *args: Any) -> Callable[[], Model]:
    """Call `load(*args)` now; return a function that returns its result or raises its error.

    For constructors of actors: Ray starts an actor whose constructor raises again and again, and
    shows the trace each time, though weights that do not load will not load then either.
    """
    try:
        model = load(*args)
    except Exception as error:
        kept = error

        def fail() -> Model:
            raise kept

        return fail
    return lambda: model


@contextmanager
def without_collections() -> Iterator[None]:
    """Switch garbage collection off for large imports, as all that they make lives on."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def with_faiss_threads(threads: int, function: Callable[..., Result], *args: Any) -> Result:
    """Return `function(*args)`, run with `threads` threads for FAISS.

    They are set each time, because a reused worker keeps the count of its last task.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    return function(*args)


def with_gpu_emptied(function: Callable[..., Result], *args: Any) -> Result:
    """Return `function(*args)`, after which torch keeps no memory of the GPU for a next call.

    The process stays for the next task, and idle, while other work needs the GPU.
    """
    import torch

    try:
        return function(*args)
    finally:
        torch.cuda.empty_cache()
