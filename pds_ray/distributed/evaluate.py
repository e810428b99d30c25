"""Evaluation on Ray Train: lanes of trials side by side; the workers of a lane share each of its trials.

A lane is one TorchTrainer that runs its trials one after the other, because starting its workers takes longer than a
small trial. Results are one file a trial, written by the first worker, and so is the state of a trial under way: a
lane that starts again skips what is there and takes up the trial it was in from the last state. The states are ours
and not Ray's checkpoints, because those are not written whole and not asked for again when a store fails.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import safetensors
import torch
from ray.train.torch import TorchTrainer, get_device
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pds_ray import catalog
from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError, EvaluateConfig
from pds_ray.distributed import TASK_RETRIES, TRAIN, environment, pools, process, session, tasks
from pds_ray.encoders.base import EncoderInfo, TextEncoderInfo
from pds_ray.errors import first_line
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.base import SourceError
from pds_ray.stages import trial as core
from pds_ray.store.evaluation_folder import (
    STATE_SUFFIX,
    STATES,
    finished_trials,
    result_name,
    state_name,
)
from pds_ray.store.storage import LOCK, Folder, StorageError, is_remote
from pds_ray.telemetry.progress import QUIET_S, progress_bar, waiting_for
from pds_ray.training.train import STATE, Gallery, Progress, TrainingPairs, Workers

_log = logging.getLogger(__name__)

POLL_S = 1.0


@dataclass(frozen=True)
class SplitData:
    """A held-out split that was read; pictures and vectors are in the object store."""

    pictures: dict[int, list[ray.ObjectRef]]
    """Size -> uint8 [n, 3, S, S] of each shard."""
    captions: list[str]
    owner: np.ndarray
    """int64 [m]: which image a caption belongs to."""
    chosen: np.ndarray
    """bool [n]: the images that make the gallery."""
    bad: dict[str, int]

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The captions of the chosen images, as rows of all, and their owners counted among the chosen. int64 [c]."""
        rows = np.flatnonzero(self.chosen[self.owner])
        return rows, (np.cumsum(self.chosen) - 1)[self.owner[rows]]

    def counts(self) -> dict[str, Any]:
        return {"images": int(self.chosen.sum()), "captions": len(self.rows()[0]), "bad": self.bad}


@dataclass(frozen=True)
class LaneData:
    """What trials need, by reference."""

    pictures: dict[tuple[str, int], ray.ObjectRef]
    """(set, size) -> uint8 [B, 3, S, S]."""
    text: dict[str, ray.ObjectRef]
    """Set -> float32 [B, t]."""
    splits: dict[tuple[str, str], SplitData]
    """(test or val, cleaning rule) -> split."""
    held_out_text: dict[tuple[str, str, str], ray.ObjectRef]
    """(test or val, cleaning rule, encoder) -> float32 [m, t]."""

    def references(self) -> list[ray.ObjectRef]:
        splits = [shards for split in self.splits.values() for shards in split.pictures.values()]
        return [
            *self.pictures.values(),
            *self.text.values(),
            *self.held_out_text.values(),
            *chain(*splits),
        ]


def run_trials(
    trials: list[core.Trial],
    sets: list[core.CheckedSet],
    splits: dict[str, core.Split],
    results: Folder,
    config: EvaluateConfig,
) -> None:
    """Runs the trials. Each leaves KEY.json in `results`, whole or not at all."""
    on_gpu, room = _room(config)
    data = _prepare(trials, sets, splits, config)
    lanes = _lanes(trials, min(config.trials or room, len(trials)))
    shared = ray.put(data)
    task = ray.remote(_run_lane).options(num_cpus=0, max_retries=0)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    groups: Any = ray.remote(_Groups).options(num_cpus=0, scheduling_strategy=here).remote()

    def begin(lane: list[core.Trial]) -> ray.ObjectRef:
        return task.remote(lane, [shared], results, groups, config, on_gpu)

    pending = {begin(lane): (lane, tasks.RetryBudget()) for lane in lanes}
    missing = {trial.key for trial in trials}

    def under_way() -> str:
        """The first trial of each lane that has left no result."""
        open_ = ([trial for trial in lane if trial.key in missing] for lane in lanes)
        return ", ".join(str(left[0]) for left in open_ if left)

    with progress_bar("evaluate", len(trials), "trials") as bar:
        waiting_for(under_way)
        try:
            while pending:
                ready, _ = ray.wait(list(pending), timeout=POLL_S)
                finished = missing & finished_trials(results)
                missing -= finished
                bar.update(len(finished))
                for reference in ready:
                    lane, budget = pending.pop(reference)
                    try:
                        with session.unwrapped_errors():
                            ray.get(reference)
                    except (
                        tasks.LOST
                    ) as error:  # of the lane itself; losses of its workers are Ray Train's
                        left = [trial for trial in lane if trial.key in missing]
                        if len(left) < len(lane):
                            budget = tasks.RetryBudget()
                        if not budget.spend(error):
                            raise
                        _release(groups, lane)
                        if left:
                            pending[begin(left)] = left, budget
        finally:
            for running, (lane, _) in pending.items():
                ray.cancel(running, force=True)
                _release(groups, lane)
    _sweep(trials, results)


def _sweep(trials: list[core.Trial], results: Folder) -> None:
    """Removes the states of trials that have ended; those of another evaluation in the folder stay."""
    states = results / STATES
    there = set(states.names(STATE_SUFFIX))
    done = {trial.key for trial in trials} | finished_trials(results)
    ended = there & set(map(state_name, done))
    states.delete_each(ended)
    if there == ended:
        states.delete_all()  # with what killed workers left of a file


class _Groups:
    """An actor that knows what each lane's workers hold: Ray gives it back with the job, not when the lane dies."""

    def __init__(self) -> None:
        self._of: dict[str, list[PlacementGroup]] = {}

    def add(self, lane: str, group: PlacementGroup) -> None:
        self._of.setdefault(lane, []).append(group)

    def take(self, lane: str) -> list[PlacementGroup]:
        return self._of.pop(lane, [])


def _release(groups: Any, lane: list[core.Trial]) -> None:
    """Ends the workers of a lane whose process or controller has died, and gives back what they hold."""
    for group in ray.get(groups.take.remote(_lane_name(lane))):
        remove_placement_group(group)


def _lane_name(lane: list[core.Trial]) -> str:
    return lane[0].key


def _room(config: EvaluateConfig) -> tuple[bool, int]:
    """Whether trials take GPUs, and how many trials there is room for.

    GPUs that an autoscaler brings are not there yet: they are asked for where `ray.embed_gpus` says so. Raises
    ConfigError if there is no room.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    if not gpus and config.ray.embed_gpus:
        return True, max(1, config.trials)
    room = (gpus or cpus) // config.workers
    if room == 0:
        there = f"{gpus} GPUs" if gpus else f"{cpus} CPUs"
        raise ConfigError(
            f"{config.workers} workers a trial asked for, but the cluster has {there}; lower --workers"
        )
    return gpus > 0, room


def _prepare(
    trials: list[core.Trial],
    sets: list[core.CheckedSet],
    splits: dict[str, core.Split],
    config: EvaluateConfig,
) -> LaneData:
    """Reads pictures and encodes captions on the cluster, once every backbone has been built there."""
    kinds = {
        (trial.backbone.name, trial.image_size, trial.protocol.train): trial for trial in trials
    }
    with (
        session.unwrapped_errors(),
        progress_bar("build", len(kinds), "backbones", delay_s=QUIET_S) as bar,
    ):
        for _ in tasks.map_in_order(_try_backbone, kinds.values(), config.workers):
            bar.update()
    sizes = sorted({trial.image_size for trial in trials})
    wanted = {trial.label for trial in trials}
    sets = [checked for checked in sets if checked.candidate.label in wanted]
    encoders = {checked.encoder.identity: checked.encoder for checked in sets}
    data = LaneData({}, {}, {}, {})
    actors = pools.pool(config.ray.embed_actors)

    def encode(encoder: str, captions: list[str]) -> ray.ObjectRef:
        return pools.start_model(actors, _encode, encoders[encoder], captions)

    for name, split in splits.items():
        for rule in sorted({checked.text.cleaning for checked in sets}):
            data.splits[name, rule] = read = _read_split(
                name, split, sizes, rule, config.ray.sample_timeout_s
            )
            for encoder in sorted(
                {checked.text.encoder for checked in sets if checked.text.cleaning == rule}
            ):
                data.held_out_text[name, rule, encoder] = encode(encoder, read.captions)
    for checked in sets:
        label, distilled = checked.candidate.label, checked.distilled
        for size in sizes:
            task = ray.remote(core.set_pictures).options(num_cpus=pools.SMALL_TASK_CPUS)
            data.pictures[label, size] = task.remote(distilled, size)
        if checked.text.of_set == "prototypes":
            data.text[label] = ray.put(distilled.text_prototypes)
        else:
            clean = CLEANERS[checked.text.cleaning]
            data.text[label] = encode(
                checked.text.encoder, [clean(caption) for caption in distilled.captions]
            )
    # before there are lanes: they leave no CPU and no GPU to these tasks, and try again what cannot succeed
    count = ray.remote(_count).options(num_cpus=pools.SMALL_TASK_CPUS)
    with (
        session.unwrapped_errors(),
        progress_bar("prepare", None, "inputs", delay_s=QUIET_S) as bar,
    ):
        made: dict[Any, ray.ObjectRef] = {**data.pictures, **data.text, **data.held_out_text}
        for of, reference in made.items():
            tasks.wait_for(count.remote(reference), f"the inputs of {of}")
            bar.update()
    return data


def _read_split(
    name: str, split: core.Split, sizes: list[int], rule: str, seconds: float
) -> SplitData:
    """Reads a split on the cluster. A picture may take so many `seconds` to decode.

    Raises in one line ConfigError if nothing in it can be used, UserError if not all of it can be read.
    """
    task = ray.remote(core.read_split).options(
        num_cpus=pools.SMALL_TASK_CPUS, num_returns=3, max_retries=TASK_RETRIES
    )
    pick = ray.remote(_pick).options(num_cpus=0)
    limit = partial(process.time_limit, seconds)
    pending: list[Any] = [
        task.remote(split.source, shard, sizes, rule, limit) for shard in split.shards
    ]
    texts: list[list[str]] = []
    bad: Counter[str] = Counter()
    with progress_bar(f"read {name}", len(pending), "shards") as bar:
        for shard, (_, captions, faults) in zip(split.shards, pending, strict=True):
            try:
                with session.unwrapped_errors():
                    texts += ray.get(captions)
                    bad.update(ray.get(faults))
            except tasks.LOST as error:
                raise SourceError(
                    f"a picture of shard {shard.name} of {split.uri} ends the process that decodes it, takes too much "
                    f"memory or more than {seconds:g} s (--ray.sample-timeout-s), or its machine was lost; recalls "
                    "would leave it out"
                ) from error
            bar.update()
    if not texts:
        raise ConfigError(f"no sample of {split.uri} can be used: {dict(bad)}")
    return SplitData(
        pictures={
            size: [pick.remote(pictures, size) for pictures, _, _ in pending] for size in sizes
        },
        captions=[caption for captions in texts for caption in captions],
        owner=np.repeat(np.arange(len(texts)), [len(captions) for captions in texts]),
        chosen=split.chosen(len(texts)),
        bad=dict(bad),
    )


def _pick(pictures: dict[int, np.ndarray], size: int) -> np.ndarray:
    return pictures[size]


def _count(rows: np.ndarray) -> int:
    return len(rows)


def _try_backbone(trial: core.Trial, workers: int) -> None:
    """Finds weights that cannot be had or do not fit, and backbones that workers cannot share."""
    core.check_shared(trial, _build_backbone(trial.backbone, trial.image_size), workers)


def _build_backbone(info: BackboneInfo, image_size: int) -> torch.nn.Module:
    with process.without_collections():
        return catalog.build_backbone(info, image_size)


def _encode(info: EncoderInfo | TextEncoderInfo, captions: list[str]) -> np.ndarray:
    return core.encode(process.load_model(catalog.load_text_encoder, info, "fp32"), captions)


def _lanes(trials: list[core.Trial], count: int) -> list[list[core.Trial]]:
    """The trials shared out by size, largest first; in a lane those of one backbone together."""
    lanes: list[list[core.Trial]] = [[] for _ in range(count)]
    load = [0] * count
    for trial in sorted(trials, key=lambda trial: -trial.pairs):
        lane = load.index(min(load))
        lanes[lane].append(trial)
        load[lane] += trial.pairs
    return [
        sorted(lane, key=lambda trial: (trial.backbone.name, trial.label, trial.seed))
        for lane in lanes
    ]


def _run_lane(
    trials: list[core.Trial],
    shared: list[ray.ObjectRef],
    results: Folder,
    groups: Any,
    config: EvaluateConfig,
    use_gpu: bool,
) -> None:
    """Trains until all trials have results.

    Gives up when workers have died `max_failures` times and more, and neither a trial was finished nor a state left.
    """
    states, budget = results / STATES, tasks.RetryBudget()

    def left() -> set[str]:
        return {trial.key for trial in trials} - finished_trials(results)

    def progress() -> tuple[set[str], dict[str, str]]:
        there = set(states.names(STATE_SUFFIX)) & {state_name(trial.key) for trial in trials}
        return left(), {name: _hash(states, name) for name in sorted(there)}

    before = progress()
    while left():
        tasks.await_all(ray.get(shared[0]).references())
        with tempfile.TemporaryDirectory() as place:  # Ray leaves a marker there, and nothing else
            trainer = TorchTrainer(
                _train_lane,
                train_loop_config={
                    "trials": trials,
                    "shared": shared,
                    "results": results,
                    "groups": groups,
                    "save_every_s": config.save_every_s,
                },
                scaling_config=ray.train.ScalingConfig(
                    num_workers=config.workers,
                    use_gpu=use_gpu,
                    resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})},
                ),
                run_config=ray.train.RunConfig(
                    name=_lane_name(trials),
                    storage_path=place,
                    failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                ),
            )
            try:
                with process.default_environment(environment(TRAIN)):
                    trainer.fit()
                return
            except ray.exceptions.RayActorError as error:  # Ray Train's own process
                now = progress()
                budget = tasks.RetryBudget() if now != before else budget
                before = now
                if not budget.spend(error):
                    raise
                _release(groups, trials)
            except ray.train.TrainingFailedError:
                now = progress()
                if now == before:
                    raise
                before = now


def _hash(states: Folder, name: str) -> str:
    try:
        return states.sha256(name)
    except FileNotFoundError:  # its trial has just ended
        return ""


def _train_lane(config: dict[str, Any]) -> None:
    """What each worker of a lane runs."""
    context = ray.train.get_context()
    workers = Workers(context.get_world_rank(), context.get_world_size())
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(
            1
        )  # the CPU it asked for; convolutions round by the number of threads
    data: LaneData = tasks.fetch(config["shared"][0])
    results: Folder = config["results"]
    if workers.rank == 0 and not is_remote(results.path) and not results.exists(LOCK):
        raise ConfigError(
            f"{results.shown} is not to be seen on all nodes; give an --out on a disk that they share, or on a store"
        )
    if workers.rank == 0:
        ray.get(
            config["groups"].add.remote(_lane_name(config["trials"]), get_current_placement_group())
        )
    done = set(
        workers.told(finished_trials(results))
    )  # a store may list late, and all must go on with the same trial
    states = _States(results / STATES, workers, config["save_every_s"])
    features: core.Features = {}
    galleries: Galleries = {}
    for trial in config["trials"]:
        if trial.key in done:
            continue
        began = time.monotonic()
        val, test = (_gallery(data, name, trial, galleries) for name in ("val", "test"))
        assert test is not None
        with tempfile.TemporaryDirectory() as scratch:
            found = core.run_trial(
                trial,
                _build_backbone,
                _pairs(data, trial),
                val,
                test,
                device,
                workers,
                features,
                resume=states.found(trial, Path(scratch)),
                report=partial(states.report, trial),
            )
        if workers.rank == 0:
            splits = {
                name: split.counts()
                for (name, rule), split in data.splits.items()
                if rule == trial.text.cleaning
            }
            about = {"label": trial.label, "backbone": trial.backbone.name, "seed": trial.seed}
            seconds = round(time.monotonic() - began, 3)
            results.write_json(
                result_name(trial.key), {**about, **found, "splits": splits, "seconds": seconds}
            )
            states.forget(trial)


def _pairs(data: LaneData, trial: core.Trial) -> TrainingPairs:
    pictures = tasks.fetch(data.pictures[trial.label, trial.image_size])
    return TrainingPairs(_tensor(pictures), _tensor(tasks.fetch(data.text[trial.label])))


Galleries = dict[tuple[str, int, str, str], Gallery]


def _gallery(data: LaneData, name: str, trial: core.Trial, made: Galleries) -> Gallery | None:
    """The gallery of a split as the trial wants it, from `made` if it is there; None if there is no such split."""
    rule, encoder = trial.text.cleaning, trial.text.encoder
    split = data.splits.get((name, rule))
    if split is None:
        return None
    key = (name, trial.image_size, rule, encoder)
    if key not in made:
        shards = [tasks.fetch(shard) for shard in split.pictures[trial.image_size]]
        pictures = (
            shards[0] if len(shards) == 1 else np.concatenate(shards)
        )  # one shard stays where it is shared
        if not split.chosen.all():
            pictures = pictures[split.chosen]
        rows, owner = split.rows()
        text = tasks.fetch(data.held_out_text[name, rule, encoder])[rows]
        made[key] = Gallery(_tensor(pictures), _tensor(text), torch.from_numpy(owner))
    return made[key]


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # arrays of the object store are read-only, and only read
        return torch.from_numpy(array)


class _States:
    """How far trials are, one file each, for whoever takes them up: `found` reads it, `report` writes it.

    Not at every evaluation: the state of a large model takes as long to write as many epochs on few pairs.
    """

    def __init__(self, folder: Folder, workers: Workers, every_s: float) -> None:
        self._folder, self._workers, self._every_s = folder, workers, every_s
        self._there = set(workers.told(folder.names(STATE_SUFFIX)))
        self._last = time.monotonic()

    def found(self, trial: core.Trial, scratch: Path) -> Path | None:
        """A folder, `scratch`, with the state that a trial was left in; None if there is none to go on from."""
        name = state_name(trial.key)
        if name not in self._there:
            return None
        path = scratch / STATE
        # the first worker's, lest a store show an older one to another
        state = self._workers.told(self._read(name, path) if self._workers.rank == 0 else b"")
        if self._workers.rank and state:
            path.write_bytes(state)
        return scratch if state else None

    def _read(self, name: str, path: Path) -> bytes:
        """A state, also as a file; empty if it is gone, or damaged, as one is that is overwritten while it is read."""
        try:
            state = self._folder.read_bytes(name)
            path.write_bytes(state)
            with safetensors.safe_open(path, "pt"):
                return state
        except (FileNotFoundError, safetensors.SafetensorError):
            return b""

    def report(self, trial: core.Trial, progress: Progress, save: Callable[[Path], None]) -> None:
        """Leaves the state of a trial that is not at its end, if it is time to; `save` writes it into a folder."""
        ended = progress.epochs_done == trial.protocol.epochs
        if self._workers.rank or ended or time.monotonic() - self._last < self._every_s:
            return
        try:
            with tempfile.TemporaryDirectory() as scratch:
                save(Path(scratch))
                self._folder.write_bytes(
                    state_name(trial.key), (Path(scratch) / STATE).read_bytes()
                )
        except (
            StorageError,
            OSError,
            RuntimeError,
            safetensors.SafetensorError,
        ) as error:  # the trial can do without
            _log.warning(
                "the state of %s cannot be saved: %s", trial, first_line(error)
            )  # in Ray's logs
        self._last = time.monotonic()

    def forget(self, trial: core.Trial) -> None:
        """Of a trial that has left its result."""
        self._folder.delete(state_name(trial.key))
