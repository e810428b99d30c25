"""Queues of trials without Ray: how they are shared out, when they give up, and their states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.train
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.config import ConfigError, EvaluateConfig, ProtocolConfig, RayConfig
from pds_ray.distributed import places, trials
from pds_ray.distributed.evaluate import share_out, trial_room, under_way
from pds_ray.distributed.in_flight import InFlight
from pds_ray.distributed.trials import Queue, States
from pds_ray.stages.trial import Progress
from pds_ray.store.storage import Folder
from pds_ray.training.workers import Workers

PROTOCOL = ProtocolConfig(epochs=6)


def make_trial(key: str, pairs: int = 1, backbone: str = "", seed: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        pairs=pairs,
        label="set",
        seed=seed,
        backbone=SimpleNamespace(name=backbone),
        protocol=PROTOCOL,
    )


def make_queue(keys: str, results: Folder) -> Queue:
    every = [make_trial(key) for key in keys]
    return Queue(every, None, results, None, EvaluateConfig(), use_gpu=False, in_flight=InFlight())


# --- room and queues


@pytest.mark.parametrize(
    ("cluster", "config", "use_gpu", "room"),
    [
        ({"CPU": 8.0}, EvaluateConfig(), False, 8),
        ({"CPU": 8.0, "GPU": 4.0}, EvaluateConfig(workers=2), True, 2),
        ({"CPU": 8.0}, EvaluateConfig(ray=RayConfig(embed_gpus=1)), True, 1),
        ({"CPU": 8.0}, EvaluateConfig(ray=RayConfig(embed_gpus=0.5), trials=5), True, 5),
        ({"CPU": 8.0, "GPU": 2.0}, EvaluateConfig(ray=RayConfig(embed_gpus=1)), True, 2),
    ],
)
def test_trials_take_gpus_that_are_there_or_asked_for(
    cluster: dict[str, float], config: EvaluateConfig, use_gpu: bool, room: int
):
    assert trial_room(cluster, config) == (use_gpu, room)


@pytest.mark.parametrize(
    ("cluster", "there"), [({"CPU": 1.0}, "1 CPUs"), ({"CPU": 8.0, "GPU": 1.0}, "1 GPUs")]
)
def test_without_room_for_the_workers_of_one_trial_nothing_starts(
    cluster: dict[str, float], there: str
):
    with pytest.raises(ConfigError, match=f"the cluster has {there}; lower --workers"):
        trial_room(cluster, EvaluateConfig(workers=2))


@given(st.lists(st.tuples(st.integers(1, 500), st.sampled_from("abc")), max_size=30), st.data())
def test_queues_share_the_trials_evenly(kinds: list[tuple[int, str]], data: st.DataObject):
    """Each trial once; no queue is longer than another by more than the largest trial."""
    todo = [
        make_trial(str(number), pairs, backbone, number)
        for number, (pairs, backbone) in enumerate(kinds)
    ]
    count = data.draw(st.integers(1, max(1, len(todo))))
    queues = share_out(todo, count)
    assert len(queues) == count
    assert sorted(t.seed for queue in queues for t in queue) == list(range(len(todo)))
    loads = [sum(t.pairs for t in queue) for queue in queues]
    assert max(loads) - min(loads) <= max((t.pairs for t in todo), default=0)
    for queue in queues:
        names = [t.backbone.name for t in queue]
        assert names == sorted(names), "one backbone after the other"


def test_the_first_unfinished_trial_of_each_queue_is_under_way(tmp_path: Path):
    class Named(SimpleNamespace):
        def __str__(self) -> str:
            return f"trial {self.key}"

    queues = [
        replace(make_queue("a", Folder(str(tmp_path))), trials=[Named(key=key) for key in keys])
        for keys in ("abc", "de", "f")
    ]
    assert under_way(queues, set("abcdef")) == "trial a, trial d, trial f"
    assert under_way(queues, set("ce")) == "trial c, trial e"
    assert under_way(queues, set()) == ""


# --- giving up


def test_failures_without_progress_end_a_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It goes on after `max_failures` as long as it finishes trials or leaves new states."""
    fits: list[str] = []

    class Trainer:
        """Ray Train, whose workers die too often, each time but the last after some progress."""

        def __init__(self, *_: object, train_loop_config: dict, **__: object) -> None:
            self.results = train_loop_config["queue"].results

        def fit(self) -> None:
            done = [
                "b.json",
                "state/a.safetensors",
                "a.json",
                "state/c.safetensors",
                "state/c.safetensors",
            ]
            assert len(fits) <= len(done), "nothing gets further"
            for name in done[len(fits) :][:1]:
                self.results.write_json(name, len(fits))
            fits.append("fit")
            raise ray.train.TrainingFailedError("died")

    monkeypatch.setattr(trials, "TorchTrainer", Trainer)
    monkeypatch.setattr(trials, "_await_inputs", lambda _: None)
    with pytest.raises(ray.train.TrainingFailedError):
        trials.run_queue(make_queue("abc", Folder(str(tmp_path))))
    assert len(fits) == 6


def test_a_queue_whose_controller_dies_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its workers' resources are given back first; the budget starts afresh after progress."""
    calls: list[str] = []

    def fit(queue: Queue) -> None:
        calls.append("fit")
        if calls.count("fit") in (2, 4):
            queue.results.write_json(f"{calls.count('fit')}.json", {})
        if calls.count("fit") != 6:
            raise ray.exceptions.RayActorError

    monkeypatch.setattr(trials, "_fit", fit)
    monkeypatch.setattr(trials, "_await_inputs", lambda _: calls.append("wait"))
    monkeypatch.setattr(trials, "release", lambda _: calls.append("release"))
    monkeypatch.setattr(trials, "_raise_problem", lambda _: None)
    monkeypatch.setattr(trials.tasks, "TASK_RETRIES", 2)
    trials.run_queue(make_queue("24x", Folder(str(tmp_path))))
    assert calls == ["wait", "fit", "release"] * 5 + ["wait", "fit"]
    calls.clear()
    with pytest.raises(ray.exceptions.RayActorError):
        trials.run_queue(make_queue("x", Folder(str(tmp_path))))
    assert calls.count("fit") == 3


def test_what_the_user_can_fix_is_recorded_by_queue():
    records = trials.QueueRecords()
    records.fail("a", "no such weights")
    assert (records.problem("a"), records.problem("b")) == ("no such weights", "")


def test_a_folder_without_the_drivers_lock_is_not_the_same_folder(tmp_path: Path):
    results = Folder(str(tmp_path))
    words = f"^{tmp_path} is not to be seen on all nodes; give an --out on a disk"
    with pytest.raises(ConfigError, match=words):
        places.require_shared(results, "--out")
    with results.lock():
        places.require_shared(results, "--out")


# --- states


def test_a_state_is_read_by_whoever_comes_next(tmp_path: Path):
    folder, trial = Folder(str(tmp_path)), make_trial("a")
    States(folder, Workers(), 0).report(trial, Progress(epochs_done=1), lambda: b"state")
    assert folder.names() == ["a.safetensors"]
    later = States(folder, Workers(), 0)
    assert later.read(trial) == b"state"
    assert later.read(make_trial("b")) == b""
    later.delete(trial)
    assert folder.names() == []
    assert later.read(trial) == b"", "deleted since it was listed"


def test_states_are_written_when_it_is_time_and_by_one_worker(tmp_path: Path):
    folder, trial = Folder(str(tmp_path)), make_trial("a")

    def never() -> bytes:
        raise AssertionError("a state costs time")

    States(folder, Workers(), 1e6).report(trial, Progress(epochs_done=1), never)
    at_once = States(folder, Workers(), 0)
    at_once.report(trial, Progress(epochs_done=PROTOCOL.epochs), never)  # its result follows
    another = States(folder, Workers(), 0)
    another._workers = Workers(rank=1, count=2)
    another.report(trial, Progress(epochs_done=1), never)
    assert folder.names() == []


def test_a_state_that_cannot_be_saved_costs_no_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "file"
    file.write_text("where the folder should be")
    states = States(Folder(str(tmp_path)), Workers(), 0)
    states._folder = Folder(str(file))
    states.report(make_trial("a"), Progress(epochs_done=1), lambda: b"")
    assert "cannot be saved" in caplog.text


def test_only_states_of_trials_that_have_ended_are_deleted(tmp_path: Path):
    results = Folder(str(tmp_path))
    states = results / "state"
    for name in ("a.safetensors", "b.safetensors", "c.safetensors", "c.safetensors.0123abcd.part"):
        states.write_bytes(name, b"")
    results.write_json("b.json", {})
    trials.delete_states([make_trial("a")], results)
    assert states.names(".safetensors") == ["c.safetensors"]
    results.write_json("c.json", {})
    trials.delete_states([], results)
    assert not (tmp_path / "state").exists()
