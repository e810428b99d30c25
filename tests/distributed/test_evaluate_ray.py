"""Evaluation on Ray Train gives what the trials give one by one, whatever happens to the workers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import psutil
import pytest
import ray
import ray.train
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from pds_ray import catalog, load_distilled
from pds_ray.config import EvaluateConfig, ProtocolConfig, RayConfig
from pds_ray.distributed import evaluate as distributed
from pds_ray.engine import evaluate as evaluation
from pds_ray.errors import UserError
from pds_ray.sources.scenes import ScenesSource
from pds_ray.stages.trial import Candidate, Split, Trial, run_trial
from pds_ray.store.storage import Folder
from pds_ray.training.train import STATE, Gallery, Progress, TrainingPairs, Workers
from tests.support.hand_made_set import scenes_set
from tests.support.object_store import KEY, SECRET, Faults, proxy, uri
from tests.support.tiny_models import save_text_model

pytestmark = pytest.mark.ray
PROTOCOL = ProtocolConfig(epochs=6, evaluate_every=2)
CONFIG = EvaluateConfig(test="scenes:60:7", backbones="small_mixer", seeds=2, protocol=PROTOCOL)
ONE_ITEM = 100 / 60  # percent of a gallery of 60; last bits may move an image by a rank


def encoded(captions: list[str]) -> torch.Tensor:
    return torch.from_numpy(
        catalog.load_text_encoder(catalog.describe_text_encoder("demo"), "fp32").encode_captions(
            captions
        )
    )


def gallery(uri: str) -> Gallery:
    """A split of scenes put together by hand."""
    source = ScenesSource(uri)
    samples = [sample for shard in source.shards() for sample in source.read(shard)]
    pictures = [
        np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB").resize((64, 64)))
        for sample in samples
    ]
    owner = [image for image, sample in enumerate(samples) for _ in sample.captions]
    captions = [" ".join(caption.split()) for sample in samples for caption in sample.captions]
    images = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
    return Gallery(images, encoded(captions), torch.tensor(owner))


def in_process(path: Path, config: EvaluateConfig) -> list[dict]:
    """The trials one after the other, without Ray."""
    torch.set_num_threads(1)
    distilled = load_distilled(str(path))
    images = torch.from_numpy(
        np.stack([np.asarray(distilled.image(pair)) for pair in range(len(distilled))])
        .transpose(0, 3, 1, 2)
        .copy()
    )
    pairs = TrainingPairs(images, encoded(distilled.captions))
    test, val = gallery(config.test), gallery(str(ScenesSource(config.test).validation))
    trials: list[Trial] = evaluation.plan(
        [Candidate("x", str(path), config.protocol)], config
    ).trials
    return [
        run_trial(trial, catalog.build_backbone, pairs, val, test, torch.device("cpu"))
        for trial in trials
    ]


def trial_files(folder: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_mtime_ns
        for path in (folder / "evaluation" / "trials").glob("*.json")
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = scenes_set(tmp_path_factory.mktemp("evaluated") / "set")
    return path, evaluation.evaluate(str(path), CONFIG)


def test_figures_are_those_of_the_trials_alone(evaluated):
    path, result = evaluated
    expected = in_process(path, CONFIG)
    trials = result["backbones"][0]["trials"]
    assert [trial["seed"] for trial in trials] == [0, 1]
    assert trials[0]["recalls"] != trials[1]["recalls"]
    for trial, alone in zip(trials, expected, strict=True):
        assert trial["recalls"] == pytest.approx(alone["recalls"], abs=ONE_ITEM)
        assert trial["recalls"]["r_mean"] == pytest.approx(alone["recalls"]["r_mean"], abs=0.3)
    assert json.loads(Path(result["file"]).read_text()) == {
        name: v for name, v in result.items() if name != "file"
    }
    assert result["test"] == {"source": "scenes:60:7", "images": 60, "captions": 300, "bad": {}}
    assert result["val"]["images"] == 60
    assert result["val"]["source"] != result["test"]["source"]


def test_finished_trials_are_never_run_again(evaluated, monkeypatch: pytest.MonkeyPatch):
    path, result = evaluated
    before = trial_files(path)
    assert len(before) == 2

    def none_to_run(*_: object) -> None:
        raise AssertionError("there is nothing to do")

    monkeypatch.setattr(distributed, "run_trials", none_to_run)
    monkeypatch.setattr("pds_ray.distributed.session.start", none_to_run)
    assert evaluation.evaluate(str(path), CONFIG) == result
    fewer = evaluation.evaluate(str(path), replace(CONFIG, seeds=1))
    assert fewer["backbones"][0]["trials"] == result["backbones"][0]["trials"][:1]
    assert trial_files(path) == before


def test_another_seed_runs_its_trial_alone(evaluated):
    path, result = evaluated
    before = trial_files(path)
    more = evaluation.evaluate(str(path), replace(CONFIG, seeds=3))
    after = trial_files(path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 3
    assert more["backbones"][0]["trials"][:2] == result["backbones"][0]["trials"]
    assert more["file"] != result["file"]
    assert not (path / "evaluation" / "trials" / "state").exists(), "what trials left to go on from"


def test_two_workers_share_a_trial(evaluated, tmp_path: Path):
    path, result = evaluated
    shared = evaluation.evaluate(str(path), replace(CONFIG, workers=2), out=str(tmp_path))
    assert len(trial_files(tmp_path)) == 2
    for mine, alone in zip(
        shared["backbones"][0]["trials"], result["backbones"][0]["trials"], strict=True
    ):
        assert mine["recalls"] == pytest.approx(alone["recalls"], abs=2 * ONE_ITEM)
        assert mine["recalls"]["r_mean"] == pytest.approx(alone["recalls"]["r_mean"], abs=1)


def test_sets_side_by_side(evaluated, tmp_path: Path):
    """The same trial under two labels runs once; another text encoder and another rule have a gallery of their own."""
    path, result = evaluated
    folder = save_text_model(tmp_path / "bert", "bert")
    with_bert = ProtocolConfig(
        train="heads",
        text_encoder=f"bert:{folder}",
        captions="paper",
        epochs=2,
        select="last",
        image_size=32,
    )
    one = replace(CONFIG, seeds=1)
    candidates = [Candidate("a", str(path), PROTOCOL), Candidate("b", str(path), PROTOCOL)]
    found = evaluation.evaluate_all(
        [*candidates, Candidate("c", str(path), with_bert)], one, Folder(str(tmp_path))
    )
    assert len(list((tmp_path / "trials").glob("*.json"))) == 2
    assert found["a"]["backbones"] == found["b"]["backbones"]
    expected = result["backbones"][0]["trials"][0]
    assert found["a"]["mean"] == pytest.approx(expected["recalls"], abs=ONE_ITEM)
    assert found["c"]["backbones"][0]["trials"][0]["epoch"] == 1
    assert found["c"]["protocol"]["text_encoder"] == f"bert:{folder}"
    assert found["c"]["val"] is None


@pytest.mark.parametrize("damaged", ["weights", "picture"])
def test_what_only_workers_find_is_one_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
):
    """No lane is started, which would try again what cannot succeed."""

    def lanes(*_: object) -> None:
        raise AssertionError("lanes were made")

    monkeypatch.setattr(distributed, "_lanes", lanes)
    path = scenes_set(tmp_path / "set", 4)
    weights = tmp_path / "junk.safetensors"
    weights.write_bytes(b"no weights" * 50)
    config, words = replace(CONFIG, backbones=f"resnet10t:{weights}"), "resnet10t.*cannot be built"
    if damaged == "picture":
        Image.new("RGB", (64, 64)).save(path / "imagefolder" / "000002.png")
        config, words = CONFIG, "000002.png is not the image that was written"
    with pytest.raises(UserError, match=words) as caught:
        evaluation.evaluate(str(path), config)
    assert "\n" not in str(caught.value)
    assert trial_files(path) == {}


class Killer(threading.Thread):
    """Kills `whom` with SIGKILL once a trial has left states of a few epochs; notes how far each was."""

    def __init__(self, states: Folder, after: int, whom: str = "RayTrainWorker") -> None:
        super().__init__(daemon=True)
        self.states, self.after, self.whom = states, after, whom
        self.reported: list[int] = []
        self.killed_at: int | None = None
        self.over = False

    def run(self) -> None:
        while not self.over:
            done = _epochs_done(self.states)
            if done and (not self.reported or done != self.reported[-1]):
                self.reported.append(done)
            if self.killed_at is None and self.reported and self.reported[-1] >= self.after:
                workers = [
                    p for p in psutil.Process().children(recursive=True) if self.whom in _title(p)
                ]
                for process in workers:
                    process.kill()
                if workers:
                    self.killed_at = self.reported[-1]
            time.sleep(0.02)


def _epochs_done(states: Folder) -> int:
    """Of the trial under way; 0 while there is no state of it."""
    # overwritten in the middle, an object on a store is read in two halves
    with (
        contextlib.suppress(FileNotFoundError, SafetensorError),
        tempfile.NamedTemporaryFile(suffix=".safetensors") as copy,
    ):
        for name in states.names(".safetensors"):
            Path(copy.name).write_bytes(states.read_bytes(name))
            with safe_open(copy.name, "pt") as opened:
                return json.loads(opened.metadata()["progress"])["epochs_done"]
    return 0


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def over(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_backbone_is_refused_before_any_split_is_read(
    evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def read(*_: object) -> None:
        raise AssertionError("this takes long with a large split")

    monkeypatch.setattr(distributed, "_read_split", read)
    config = replace(
        CONFIG, backbones="resnet10t:scratch", workers=2, protocol=replace(PROTOCOL, train="all")
    )
    with pytest.raises(UserError, match="resnet10t:scratch normalises over the batch"):
        evaluation.evaluate(str(evaluated[0]), config, out=str(tmp_path))


def test_a_held_out_picture_that_hangs_is_one_line(monkeypatch: pytest.MonkeyPatch):
    class Hanging(ScenesSource):
        """Whoever reads it hangs in C at the next picture, with the interpreter's lock held."""

        def read(self, shard):
            import ctypes

            from pds_ray.stages import trial as evaluate

            evaluate.decode_image = lambda _: ctypes.PyDLL(None).sleep(1_000)
            return super().read(shard)

    monkeypatch.setattr(distributed, "TASK_RETRIES", 0)
    source = Hanging("scenes:3:7")
    with pytest.raises(
        UserError,
        match=r"picture of shard scenes-00000 of there .* too much memory or more than 1 s \(--ray",
    ) as caught:
        distributed._read_split("test", Split("there", source, source.shards()), [8], "none", 1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "workers", "whom"),
    [
        ("disk", 1, "RayTrainWorker"),
        ("failing store", 2, "RayTrainWorker"),
        pytest.param("disk", 2, "TrainController", marks=pytest.mark.long),
        pytest.param("disk", 2, "_run_lane", marks=pytest.mark.long),
    ],
)
def test_a_killed_trial_goes_on_from_its_last_state(
    where: str, workers: int, whom: str, tmp_path: Path, s3_port: int
):
    """Two workers, that is, which are killed together, or what started them: that they hold all CPUs there are must
    not keep others from being started. The trials behind it feel nothing more of it."""
    path = scenes_set(tmp_path / "set")
    protocol = replace(PROTOCOL, epochs=15, evaluate_every=1)
    config = replace(
        CONFIG,
        seeds=4,
        trials=1,
        workers=workers,
        max_failures=1,
        save_every_s=0,
        protocol=protocol,
    )
    expected = in_process(path, config)
    faults, login = Faults(), f"{KEY}:{quote(SECRET, safe='')}@"
    with proxy(s3_port, faults) as port:
        out, states = str(tmp_path), "evaluation/trials/state"
        watched = Folder(str(tmp_path / states))
        if where != "disk":
            out, watched = (
                uri(port, "killed", login),
                Folder(uri(s3_port, f"killed/{states}", login)),
            )
            faults.errors = faults.cut_downloads = faults.cut_uploads = 0.05
        killer = Killer(watched, 4, whom)
        killer.start()
        try:
            with time_limit(300):  # it would wait for ever
                result = evaluation.evaluate(str(path), config, out=out)
        finally:
            killer.over = True
            killer.join()
    assert killer.killed_at is not None, "nobody was killed"
    assert killer.killed_at < 15
    drop = next(
        (i for i, (a, b) in enumerate(pairwise(killer.reported)) if b < a), len(killer.reported) - 1
    )
    assert killer.reported[drop] > killer.killed_at, "it began anew, or nobody looked on afterwards"
    for trial, undisturbed in zip(result["backbones"][0]["trials"], expected, strict=True):
        assert workers > 1 or trial["epoch"] == undisturbed["epoch"]
        assert trial["recalls"] == pytest.approx(undisturbed["recalls"], abs=workers * ONE_ITEM)
    assert watched.names(".safetensors") == [], "states of trials that have ended"
    assert where == "disk" or faults.struck > 5


def test_a_damaged_state_is_given_up(evaluated, tmp_path: Path):
    config = replace(CONFIG, seeds=1)
    (trial,) = evaluation.plan([Candidate("x", str(evaluated[0]), config.protocol)], config).trials
    states = tmp_path / "evaluation" / "trials" / "state"
    states.mkdir(parents=True)
    (states / f"{trial.key}.safetensors").write_bytes(b"half of a state")
    result = evaluation.evaluate(str(evaluated[0]), config, out=str(tmp_path))
    assert (
        result["backbones"][0]["trials"][0]["recalls"]
        == evaluated[1]["backbones"][0]["trials"][0]["recalls"]
    )
    assert not states.exists()


def test_a_folder_that_the_workers_do_not_see_is_one_line(evaluated, tmp_path: Path):
    """Their results would be lost with the disks that they are on. What shows the folder is the driver's lock."""
    config = replace(CONFIG, seeds=1, max_failures=0)
    plan = evaluation.plan([Candidate("x", str(evaluated[0]), config.protocol)], config)
    with pytest.raises(UserError, match=f"^{tmp_path} is not to be seen on all nodes") as caught:
        distributed.run_trials(plan.trials, plan.sets, plan.splits, Folder(str(tmp_path)), config)
    assert "\n" not in str(caught.value)


def test_a_row_of_trials_that_is_lost_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With those that it has not finished, and its deaths counted anew as long as it finishes some."""

    def lane(trials: list, _shared: object, results: Folder, *_: object) -> None:
        results.write_json(f"{'-'.join(trial.key for trial in trials)}.tried", {})
        if len(trials) > 1:
            results.write_json(f"{trials[0].key}.json", {})
            time.sleep(3 * distributed.POLL_S)  # until the driver has seen it
            os.kill(os.getpid(), signal.SIGKILL)
        results.write_json(f"{trials[0].key}.json", {})

    monkeypatch.setattr(distributed, "_run_lane", lane)
    monkeypatch.setattr(distributed, "_prepare", lambda *_: distributed.LaneData({}, {}, {}, {}))
    monkeypatch.setattr(distributed.tasks, "TASK_RETRIES", 1)
    trials = [
        SimpleNamespace(key=key, pairs=1, label="", seed=number, backbone=SimpleNamespace(name=""))
        for number, key in enumerate("abcd")
    ]
    distributed.run_trials(trials, [], {}, Folder(str(tmp_path)), replace(CONFIG, trials=1))
    tried = ["a-b-c-d.tried", "b-c-d.tried", "c-d.tried", "d.tried"]
    assert Folder(str(tmp_path)).names() == sorted([*tried, "a.json", "b.json", "c.json", "d.json"])


def test_deaths_that_bring_nothing_forward_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows of trials go on after `max_failures` as long as they finish trials or leave new states, and no longer."""
    fits: list[str] = []

    class Trainer:
        """Ray Train, whose workers die too often; each time something was done before, but for the last."""

        def __init__(self, *_: object, train_loop_config: dict, **__: object) -> None:
            self.config = train_loop_config

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
                self.config["results"].write_json(name, len(fits))
            fits.append("fit")
            raise ray.train.TrainingFailedError("died")

    monkeypatch.setattr(distributed, "TorchTrainer", Trainer)
    shared = [ray.put(distributed.LaneData({}, {}, {}, {}))]
    trials = [SimpleNamespace(key=key) for key in "abc"]
    with pytest.raises(ray.train.TrainingFailedError):
        distributed._run_lane(trials, shared, Folder(str(tmp_path)), None, CONFIG, False)
    assert len(fits) == 6


def test_a_state_that_cannot_be_saved_costs_no_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "file"
    file.write_text("where the folder should be")
    states = distributed._States(Folder(str(tmp_path)), Workers(), 0)
    states._folder = Folder(str(file))
    trial = SimpleNamespace(key="a", protocol=PROTOCOL)
    states.report(
        trial, Progress(epochs_done=1), lambda folder: (folder / STATE).write_bytes(b"") and None
    )
    assert "cannot be saved" in caplog.text


def test_only_states_of_trials_that_have_ended_are_swept(tmp_path: Path):
    results = Folder(str(tmp_path))
    states = results / "state"
    for name in ("a.safetensors", "b.safetensors", "c.safetensors", "c.safetensors.0123abcd.part"):
        states.write_bytes(name, b"")
    results.write_json("b.json", {})
    distributed._sweep([SimpleNamespace(key="a")], results)
    assert states.names(".safetensors") == ["c.safetensors"]
    results.write_json("c.json", {})
    distributed._sweep([], results)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("cluster", "config", "on_gpu", "room"),
    [
        ({"CPU": 8.0}, EvaluateConfig(), False, 8),
        ({"CPU": 8.0, "GPU": 4.0}, EvaluateConfig(workers=2), True, 2),
        ({"CPU": 8.0}, EvaluateConfig(ray=RayConfig(embed_gpus=1)), True, 1),
        ({"CPU": 8.0}, EvaluateConfig(ray=RayConfig(embed_gpus=0.5), trials=5), True, 5),
        ({"CPU": 8.0, "GPU": 2.0}, EvaluateConfig(ray=RayConfig(embed_gpus=1)), True, 2),
    ],
)
def test_trials_take_gpus_that_are_there_or_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, float],
    config: EvaluateConfig,
    on_gpu: bool,
    room: int,
):
    monkeypatch.setattr("ray.cluster_resources", lambda: cluster)
    assert distributed._room(config) == (on_gpu, room)
