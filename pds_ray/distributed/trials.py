"""Queues of trials on Ray Train; the workers of a queue share each of its trials.

A queue is one TorchTrainer that runs its trials one after the other, because starting its workers
takes longer than a small trial. The first worker writes one result file per trial, and the state of
the trial under way: a queue that starts again skips finished trials and continues from the last
state. States are files of ours and not Ray's checkpoints, which are not written atomically and not
retried when a store fails.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
import safetensors
import torch
from ray.train.torch import TorchTrainer, get_device
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from pds_ray.config import EvaluateConfig
from pds_ray.distributed import TRAIN, environment, places, process, tasks
from pds_ray.distributed.in_flight import Doing, InFlight
from pds_ray.distributed.trial_inputs import Loader, TrialInputs, build_backbone
from pds_ray.errors import UserError, first_line
from pds_ray.stages import trial as core
from pds_ray.store.evaluation_folder import (
    STATE_SUFFIX,
    STATES,
    finished_trials,
    result_name,
    state_name,
)
from pds_ray.store.storage import Folder, StorageError
from pds_ray.training.workers import Workers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queue:
    """Trials that run one after the other, and all that their workers need."""

    trials: list[core.Trial]
    inputs: ray.ObjectRef
    """To a TrialInputs."""
    results: Folder
    records: Any
    """The actor of a QueueRecords."""
    config: EvaluateConfig
    use_gpu: bool
    in_flight: InFlight

    @property
    def name(self) -> str:
        return self.trials[0].key


def unfinished(trials: list[core.Trial], results: Folder) -> list[core.Trial]:
    """Return the trials without a result."""
    finished = finished_trials(results)
    return [trial for trial in trials if trial.key not in finished]


class QueueRecords:
    """An actor's state: of each queue, what its workers hold, and why it cannot go on.

    Ray gives a placement group back with the job, not when the queue dies; and Ray Train tries
    again whatever a worker raises.
    """

    def __init__(self) -> None:
        self._of_queue: dict[str, list[PlacementGroup]] = {}
        self._problems: dict[str, str] = {}

    def add(self, queue: str, group: PlacementGroup) -> None:
        self._of_queue.setdefault(queue, []).append(group)

    def take(self, queue: str) -> list[PlacementGroup]:
        return self._of_queue.pop(queue, [])

    def fail(self, queue: str, problem: str) -> None:
        """Record an error that the user can fix: it would come again."""
        self._problems[queue] = problem

    def problem(self, queue: str) -> str:
        """Return why a queue cannot go on; empty if it can."""
        return self._problems.get(queue, "")


def release(queue: Queue) -> None:
    """End the workers of a queue whose process or controller has died, and free what they hold."""
    for group in ray.get(queue.records.take.remote(queue.name)):
        remove_placement_group(group)


def run_queue(queue: Queue) -> None:
    """Train until all trials have results.

    Ray Train restarts workers that die `max_failures` times. After that, and after the death of its
    own process, a new trainer starts as long as the last one finished a trial or left a new state.
    """
    before, budget = _progress(queue), tasks.RetryBudget()
    while unfinished(queue.trials, queue.results):
        _await_inputs(queue)
        try:
            _fit(queue)
            _raise_problem(queue)
            return
        except ray.exceptions.RayActorError as error:  # Ray Train's own process
            now = _progress(queue)
            budget = tasks.RetryBudget() if now != before else budget
            before = now
            if not budget.spend(error):
                raise
            release(queue)
        except ray.train.TrainingFailedError:
            now = _progress(queue)
            if now == before:
                raise
            before = now


def _raise_problem(queue: Queue) -> None:
    """Raise what a worker found that the user can fix, as UserError."""
    problem = ray.get(queue.records.problem.remote(queue.name))
    if problem:
        raise UserError(problem)


def _await_inputs(queue: Queue) -> None:
    """Wait for inputs that were lost with a node, whose tasks need the CPUs that workers take."""
    tasks.await_all(ray.get(queue.inputs).references())


def _fit(queue: Queue) -> None:
    """Run one trainer on the queue. Raises what Ray Train raises."""
    resources = {"CPU": 1, **({"GPU": 1} if queue.use_gpu else {})}
    with tempfile.TemporaryDirectory() as place:  # Ray leaves a marker there, and nothing else
        trainer = TorchTrainer(
            _train_queue,
            train_loop_config={"queue": queue},
            scaling_config=ray.train.ScalingConfig(
                num_workers=queue.config.workers,
                use_gpu=queue.use_gpu,
                resources_per_worker=resources,
            ),
            run_config=ray.train.RunConfig(
                name=queue.name,
                storage_path=place,
                failure_config=ray.train.FailureConfig(max_failures=queue.config.max_failures),
            ),
        )
        with process.default_environment(environment(TRAIN)):
            trainer.fit()


def _progress(queue: Queue) -> tuple[set[str], dict[str, str]]:
    """Return the unfinished trials and the hashes of the states; they differ after any progress."""
    states = queue.results / STATES
    there = set(states.names(STATE_SUFFIX)) & {state_name(trial.key) for trial in queue.trials}
    left = {trial.key for trial in unfinished(queue.trials, queue.results)}
    return left, {name: _hash(states, name) for name in sorted(there)}


def _hash(states: Folder, name: str) -> str:
    try:
        return states.sha256(name)
    except FileNotFoundError:  # its trial has just ended
        return ""


def _train_queue(config: dict[str, Any]) -> None:
    """Run the trials of a queue; every worker of the queue calls this.

    An error that the user can fix is recorded and ends them, as Ray Train would try it again.
    """
    queue: Queue = config["queue"]
    workers = _this_worker()
    if workers.broadcast(ray.get(queue.records.problem.remote(queue.name))):
        return
    try:
        _run_trials(queue, workers)
    except (UserError, torch.OutOfMemoryError) as error:
        ray.get(queue.records.fail.remote(queue.name, first_line(error)))
        if workers.count > 1:  # the others may wait for this one: only Ray Train can end them
            raise


def _run_trials(queue: Queue, workers: Workers) -> None:
    inputs: TrialInputs = tasks.fetch(queue.inputs)
    if workers.rank == 0:
        places.require_shared(queue.results, "--out")
        ray.get(queue.records.add.remote(queue.name, get_current_placement_group()))
    # one worker's listing: all must go on with the same trial
    finished = workers.broadcast(finished_trials(queue.results))
    states = States(queue.results / STATES, workers, queue.config.save_every_s)
    loader, features = Loader(inputs), core.Features()
    for trial in queue.trials:
        if trial.key in finished:
            continue
        began = time.monotonic()
        with queue.in_flight.doing(f"the inputs of {trial}", trial.key) as doing:
            found = core.run_trial(
                trial,
                loader.load(trial),
                build_backbone,
                workers,
                features,
                states.read(trial),
                partial(states.report, trial),
                partial(_told, doing),
            )
        if workers.rank == 0:
            splits = inputs.counts(trial.text.cleaning)
            about = {"label": trial.label, "backbone": trial.backbone.name, "seed": trial.seed}
            seconds = round(time.monotonic() - began, 3)
            result = {**about, **found, "splits": splits, "seconds": seconds}
            queue.results.write_json(result_name(trial.key), result)
            states.delete(trial)


def _told(doing: Doing, what: str, epochs: float | None) -> None:
    doing.now(what)
    if epochs is not None:
        doing.reach(epochs)


def _this_worker() -> Workers:
    context, device = ray.train.get_context(), get_device()
    if device.type == "cpu":
        # the CPU it asked for; convolutions round by the number of threads
        torch.set_num_threads(1)
    return Workers(context.get_world_rank(), context.get_world_size(), device)


class States:
    """The states of trials under way, one file each, from which any later worker continues.

    They are not written at every evaluation: the state of a large model takes as long to write as
    many epochs on few pairs.
    """

    def __init__(self, folder: Folder, workers: Workers, every_s: float) -> None:
        self._folder, self._workers, self._every_s = folder, workers, every_s
        self._there = set(workers.broadcast(folder.names(STATE_SUFFIX)))
        self._last = time.monotonic()

    def read(self, trial: core.Trial) -> bytes:
        """Return the state that a trial was left in; empty if there is none."""
        if state_name(trial.key) not in self._there:
            return b""
        # the first worker's: all must go on from the same state
        return self._workers.broadcast(self._read(trial) if self._workers.rank == 0 else b"")

    def _read(self, trial: core.Trial) -> bytes:
        try:
            return self._folder.read_bytes(state_name(trial.key))
        except FileNotFoundError:
            return b""

    def report(
        self, trial: core.Trial, progress: core.Progress, state: Callable[[], bytes]
    ) -> None:
        """Write the state of a trial that is not at its end, if it is time to."""
        ended = progress.epochs_done == trial.protocol.epochs
        if self._workers.rank or ended or time.monotonic() - self._last < self._every_s:
            return
        try:
            self._folder.write_bytes(state_name(trial.key), state())
        except (StorageError, OSError, RuntimeError, safetensors.SafetensorError) as error:
            # the trial can do without; the line is in Ray's logs
            _log.warning("the state of %s cannot be saved: %s", trial, first_line(error))
        self._last = time.monotonic()

    def delete(self, trial: core.Trial) -> None:
        """Delete the state of a trial that has its result."""
        self._folder.delete(state_name(trial.key))


def delete_states(trials: list[core.Trial], results: Folder) -> None:
    """Delete the states of trials that have ended; those of another evaluation there stay."""
    states = results / STATES
    there = set(states.names(STATE_SUFFIX))
    done = {trial.key for trial in trials} | finished_trials(results)
    ended = there & set(map(state_name, done))
    states.delete_each(ended)
    if there == ended:
        states.delete_all()  # with what killed workers left of a file
