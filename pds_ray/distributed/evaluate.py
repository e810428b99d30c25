"""Evaluation on the cluster: trials run in parallel queues, each of them one TorchTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pds_ray.config import ConfigError, EvaluateConfig
from pds_ray.distributed import session, tasks, trials
from pds_ray.distributed.in_flight import InFlight
from pds_ray.distributed.trial_inputs import prepare
from pds_ray.distributed.trials import Queue
from pds_ray.stages import trial as core
from pds_ray.store.evaluation_folder import finished_trials
from pds_ray.store.storage import Folder
from pds_ray.telemetry.progress import Bar, progress_bar, waiting_for

POLL_S = 1.0


def run_trials(
    todo: list[core.Trial],
    sets: list[core.CheckedSet],
    splits: dict[str, core.Split],
    results: Folder,
    config: EvaluateConfig,
) -> None:
    """Run the trials. Each leaves KEY.json in `results`, written atomically."""
    use_gpu, room = trial_room(ray.cluster_resources(), config)
    inputs = ray.put(prepare(todo, sets, splits, config))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    records = ray.remote(trials.QueueRecords).options(num_cpus=0, scheduling_strategy=here)
    parts = share_out(todo, min(config.trials or room, len(todo)))
    epochs = sum(trial.protocol.epochs for trial in todo)
    with InFlight() as in_flight, progress_bar("evaluate", epochs, "epochs") as bar:
        shared = (inputs, results, records.remote(), config, use_gpu, in_flight)
        _run_queues([Queue(part, *shared) for part in parts], results, bar)
    trials.delete_states(todo, results)


def trial_room(resources: Mapping[str, float], config: EvaluateConfig) -> tuple[bool, int]:
    """Return whether trials take GPUs, and the number of trials there is room for.

    GPUs that an autoscaler brings are not there yet: trials ask for them if `ray.embed_gpus` says
    so. Raises ConfigError if there is no room.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    if not gpus and config.ray.embed_gpus:
        return True, max(1, config.trials)
    room = (gpus or cpus) // config.workers
    if room == 0:
        there = f"{gpus} GPUs" if gpus else f"{cpus} CPUs"
        raise ConfigError(
            f"{config.workers} workers per trial asked for, but the cluster has {there}; "
            "lower --workers"
        )
    return gpus > 0, room


def share_out(todo: list[core.Trial], count: int) -> list[list[core.Trial]]:
    """Share trials out to `count` queues by size, largest first.

    In a queue those of one backbone follow each other.
    """
    queues: list[list[core.Trial]] = [[] for _ in range(count)]
    load = [0] * count
    for trial in sorted(todo, key=lambda trial: -trial.pairs):
        place = load.index(min(load))
        queues[place].append(trial)
        load[place] += trial.pairs
    return [
        sorted(queue, key=lambda trial: (trial.backbone.name, trial.label, trial.seed))
        for queue in queues
    ]


def _run_queues(queues: list[Queue], results: Folder, bar: Bar) -> None:
    """Run queues side by side; one that is lost starts again with its unfinished trials."""
    epochs = {trial.key: trial.protocol.epochs for queue in queues for trial in queue.trials}
    pending = {_start(queue): (queue, tasks.RetryBudget()) for queue in queues}
    missing = set(epochs)
    waiting_for(lambda: under_way(queues, missing))
    bar.follow(queues[0].in_flight.reports(lambda trial: trial not in missing))
    try:
        while pending:
            ready, _ = ray.wait(list(pending), timeout=POLL_S)
            finished = missing & finished_trials(results)
            missing -= finished
            bar.update(sum(epochs[trial] for trial in finished))
            for reference in ready:
                queue, budget = pending.pop(reference)
                again = _after_end(reference, queue, budget, missing)
                if again:
                    pending[_start(again[0])] = again
    finally:
        for reference, (queue, _) in pending.items():
            ray.cancel(reference, force=True)
            trials.release(queue)


def _start(queue: Queue) -> ray.ObjectRef:
    return ray.remote(trials.run_queue).options(num_cpus=0, max_retries=0).remote(queue)


def _after_end(
    reference: Any, queue: Queue, budget: tasks.RetryBudget, missing: set[str]
) -> tuple[Queue, tasks.RetryBudget] | None:
    """Return the queue to start again if it was lost before its end; raise any other error.

    The budget starts afresh as long as the queue finishes trials. Deaths of its workers are Ray
    Train's to count.
    """
    try:
        with session.unwrapped_errors():
            ray.get(reference)
    except tasks.LOST as error:
        left = [trial for trial in queue.trials if trial.key in missing]
        if len(left) < len(queue.trials):
            budget = tasks.RetryBudget()
        if not budget.spend(error):
            raise
        trials.release(queue)
        return (replace(queue, trials=left), budget) if left else None
    return None


def under_way(queues: list[Queue], missing: set[str]) -> str:
    """Name the first trial of each queue that has left no result."""
    left = ([trial for trial in queue.trials if trial.key in missing] for queue in queues)
    return ", ".join(str(first) for first, *_ in filter(None, left))
