"""Compare the two k-means, FAISS's and that over all nodes: `python -m benchmarks.solvers`.

Both fit the same vectors, at the defaults of a run, on this machine; prints a line of JSON with
seconds, CPU seconds of all processes and objective per vector. On a GPU `benchmarks.gpu --only
kmeans` has both.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from benchmarks.data import Concepts
from benchmarks.measure import Found
from pds_ray.config import ClusterConfig, RayConfig

PARTS = 20  # of the sample, as of so many shards


def with_faiss(vectors: np.ndarray, clusters: int, config: ClusterConfig) -> Found:
    """Fit on all CPUs, or GPUs, of this machine in one process."""
    from pds_ray.stages.cluster import fit

    weights = np.ones(len(vectors), np.float32)
    return _timed(lambda: fit(vectors, weights, clusters, 0, config))


def shared_out(vectors: np.ndarray, clusters: int, config: ClusterConfig) -> Found:
    """Fit on a Ray of this machine, which is started before and does not count."""
    import ray

    from pds_ray.distributed import lloyd, session
    from pds_ray.distributed.in_flight import InFlight

    gib = 4 * vectors.nbytes / 2**30 + 1
    session.start(RayConfig(object_store_gib=gib))
    try:
        parts = [
            (ray.put(part), ray.put(np.ones(len(part), np.float32)))
            for part in np.array_split(vectors, PARTS)
        ]
        with InFlight() as in_flight:

            def fitted() -> Any:
                work = lloyd.share_out(parts, "image", clusters, vectors.shape[1], in_flight)
                return lloyd.fit(work, 0, config, lambda _iterations: None)

            return _timed(fitted)
    finally:
        session.stop()


def _timed(fitted: Callable[[], Any]) -> Found:
    cpu, began = _cpu_seconds(), time.perf_counter()
    found = fitted()
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds() - cpu,
        "objective": found.objective / found.rows,
    }


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it started."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        total += times.user + times.system
    return total


SOLVERS: dict[str, Callable[[np.ndarray, int, ClusterConfig], Found]] = {
    "faiss": with_faiss,
    "distributed": shared_out,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers", description="Compare the two k-means."
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--clusters", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=ClusterConfig().iterations)
    parser.add_argument("--tolerance", type=float, default=ClusterConfig().tolerance)
    args = parser.parse_args()
    concepts = Concepts(args.dim, seed=0)
    vectors = concepts.vectors(concepts.draw(args.rows))
    config = ClusterConfig(iterations=args.iterations, tolerance=args.tolerance)
    found: Found = {**vars(args), "cpus": os.cpu_count()}
    for name, solver in SOLVERS.items():
        found[name] = solver(vectors, args.clusters, config)
        print(json.dumps({name: found[name]}), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
