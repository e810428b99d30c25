"""Evaluation on Ray Train gives what the trials give one by one, whatever happens to the
workers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
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
import torch
from PIL import Image

from pds_ray import catalog, load_distilled
from pds_ray.config import EvaluateConfig, ProtocolConfig
from pds_ray.distributed import evaluate as distributed
from pds_ray.distributed import trial_inputs, trials
from pds_ray.distributed.trial_inputs import TrialInputs
from pds_ray.distributed.trials import Queue
from pds_ray.engine import evaluate as evaluation
from pds_ray.errors import UserError
from pds_ray.modalities.image import Preprocess
from pds_ray.sources.scenes import ScenesSource
from pds_ray.stages.trial import (
    Candidate,
    CheckedSet,
    Split,
    TextInput,
    Trial,
    TrialData,
    run_trial,
)
from pds_ray.store.storage import Folder
from pds_ray.training.data import Gallery, TrainingPairs
from pds_ray.training.loop import read_progress
from tests.support.hand_made_set import backbone, learned_file, learned_tensors, scenes_set
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
    images = [
        np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB").resize((64, 64)))
        for sample in samples
    ]
    owner = [image for image, sample in enumerate(samples) for _ in sample.captions]
    captions = [" ".join(caption.split()) for sample in samples for caption in sample.captions]
    stacked = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
    return Gallery(stacked, encoded(captions), torch.tensor(owner))


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
    planned: list[Trial] = evaluation.make_evaluation(
        [Candidate("x", str(path), config.protocol)], config
    ).trials
    data = TrialData(pairs, val, test)
    return [run_trial(trial, data, catalog.build_backbone) for trial in planned]


def trial_files(folder: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_mtime_ns
        for path in (folder / "evaluation" / "trials").glob("*.json")
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Two queues side by side; the first trial finds a state that is damaged."""
    path = scenes_set(tmp_path_factory.mktemp("evaluated") / "set")
    planned = evaluation.make_evaluation(
        [Candidate("x", str(path), CONFIG.protocol)], CONFIG
    ).trials
    states = path / "evaluation" / "trials" / "state"
    states.mkdir(parents=True)
    (states / f"{planned[0].key}.safetensors").write_bytes(b"half of a state")
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
    assert not (path / "evaluation" / "trials" / "state").exists(), "a damaged state is given up"


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


@pytest.mark.long
def test_two_workers_share_a_trial(evaluated, tmp_path: Path):
    path, result = evaluated
    shared = evaluation.evaluate(str(path), replace(CONFIG, workers=2), out=str(tmp_path))
    assert len(trial_files(tmp_path)) == 2
    for mine, alone in zip(
        shared["backbones"][0]["trials"], result["backbones"][0]["trials"], strict=True
    ):
        assert mine["recalls"] == pytest.approx(alone["recalls"], abs=2 * ONE_ITEM)
        assert mine["recalls"]["r_mean"] == pytest.approx(alone["recalls"]["r_mean"], abs=1)


def test_a_trial_gets_the_parts_of_a_set_that_its_protocol_wants(tmp_path: Path):
    """Captions one after the other with their images, soft targets, subjects, cropped squares."""
    path = scenes_set(tmp_path / "set", 4)
    distilled = load_distilled(str(path))
    soft = np.eye(4, dtype=np.float32) + 0.5
    records = [{**row, "captions": [row["text"], "one more", "  "]} for row in distilled.records]
    distilled = replace(distilled, similarity=soft, records=[distilled.records[0], *records[1:]])
    plain = ProtocolConfig(image_size=16)
    wanted = replace(
        plain, fit="crop", subjects="caption", targets="soft", captions_per_image="all"
    )
    sources = {"test": ScenesSource("scenes:6:7")}
    splits = {name: Split(s.uri, s, s.shards()) for name, s in sources.items()}
    encoder, text = catalog.describe_text_encoder("demo"), TextInput("captions", "", "basic")
    text = replace(text, encoder=encoder.identity)
    info = catalog.describe_backbone("small_mixer")
    sets, planned = [], []
    for label, protocol in (("plain", plain), ("all", wanted)):
        candidate = Candidate(label, str(path), protocol)
        sets.append(CheckedSet(candidate, distilled, encoder, text))
        planned.append(Trial(label, label, info, 16, 0, protocol, text, 4))
    inputs = trial_inputs.prepare(planned, sets, splits, CONFIG)
    loader = trial_inputs.Loader(inputs)
    before, data = (loader.load(trial) for trial in planned)
    assert (before.pairs.owner, before.pairs.similarity, before.test.subject) == (None,) * 3
    assert data.pairs.owner.tolist() == [0, 1, 1, 2, 2, 3, 3]
    further = encoded(["one more"]).expand(3, -1)
    torch.testing.assert_close(data.pairs.text[[2, 4, 6]], further, atol=1e-5, rtol=0)
    torch.testing.assert_close(data.pairs.text[[0, 1, 3, 5]], before.pairs.text, atol=1e-5, rtol=0)
    assert torch.equal(data.pairs.similarity, torch.from_numpy(soft))
    assert sorted(data.test.subject.tolist()) == [*range(6)], "six scenes, six first captions"
    assert torch.equal(data.test.images, before.test.images), "a square has nothing to crop"


def test_a_trial_gets_the_learned_parts_that_fit(tmp_path: Path):
    """Images where the side is theirs, normalised anew; the pictures elsewhere; nothing if off."""
    tensors = learned_tensors(4, 32)
    path = scenes_set(tmp_path / "set", 4, learned=learned_file(tensors, mean=[0.1] * 3))
    config = replace(CONFIG, test="scenes:6:7", seeds=1)
    sides = {"small": ProtocolConfig(image_size=16), "same": ProtocolConfig(image_size=32)}
    sides["off"] = replace(sides["same"], learned="off")
    sets = [Candidate(label, str(path), protocol) for label, protocol in sides.items()]
    plan = evaluation.make_evaluation(sets, config)
    inputs = trial_inputs.prepare(plan.trials, plan.sets, plan.splits, config)
    loader = trial_inputs.Loader(inputs)
    found = {t.label: (t, loader.load(t).pairs) for t in plan.trials}
    parts = {label: trial.use.parts for label, (trial, _) in found.items()}
    assert parts == {
        "small": ("text", "similarity"),
        "same": ("images", "text", "similarity"),
        "off": (),
    }
    for label in ("small", "same"):
        np.testing.assert_array_equal(found[label][1].text, tensors["text"])
        np.testing.assert_array_equal(found[label][1].similarity, tensors["similarity"])
    assert [found[label][1].images.dtype for label in ("small", "off")] == [torch.uint8] * 2
    info, std = found["same"][0].backbone, np.reshape(backbone().std, (3, 1, 1))
    expected = (tensors["images"] * std + 0.1 - np.reshape(info.mean, (3, 1, 1))) / np.reshape(
        info.std, (3, 1, 1)
    )
    np.testing.assert_allclose(found["same"][1].images, expected, atol=1e-5)
    assert found["off"][1].similarity is None
    assert not np.allclose(found["off"][1].text, tensors["text"], atol=0.1), "those of captions"


@pytest.mark.long
def test_sets_of_one_call(evaluated, tmp_path: Path):
    """The same trial under two labels runs once, and another encoder has a gallery of its own.

    Both trials are of one queue.
    """
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
    one = replace(CONFIG, seeds=1, trials=1)
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


@pytest.mark.parametrize("damaged", ["weights", "image"])
def test_what_only_workers_find_is_one_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
):
    """No queue is started, which would try again what cannot succeed."""

    def queues(*_: object) -> None:
        raise AssertionError("queues were made")

    monkeypatch.setattr(distributed, "share_out", queues)
    path = scenes_set(tmp_path / "set", 4)
    weights = tmp_path / "junk.safetensors"
    weights.write_bytes(b"no weights" * 50)
    config, words = replace(CONFIG, backbones=f"resnet10t:{weights}"), "resnet10t.*damaged"
    if damaged == "image":
        Image.new("RGB", (64, 64)).save(path / "imagefolder" / "000002.png")
        config, words = CONFIG, "000002.png is not the image that was written"
    with pytest.raises(UserError, match=words) as caught:
        evaluation.evaluate(str(path), config)
    assert "\n" not in str(caught.value)
    assert trial_files(path) == {}


class Killer(threading.Thread):
    """Kills `whom` with SIGKILL once a trial has left states of a few epochs; notes their
    epochs.
    """

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
    """Return the epochs of the trial under way; 0 while there is no state of it."""
    with contextlib.suppress(FileNotFoundError):
        for name in states.names(".safetensors"):
            # overwritten in the middle, an object on a store is read in two halves
            progress = read_progress(states.read_bytes(name))
            return progress["epochs_done"] if progress else 0
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

    monkeypatch.setattr(trial_inputs, "read_split", read)
    config = replace(
        CONFIG, backbones="resnet10t:scratch", workers=2, protocol=replace(PROTOCOL, train="all")
    )
    with pytest.raises(UserError, match="resnet10t:scratch normalises over the batch"):
        evaluation.evaluate(str(evaluated[0]), config, out=str(tmp_path))


def test_a_held_out_image_that_hangs_is_one_line(monkeypatch: pytest.MonkeyPatch):
    class Hanging(ScenesSource):
        """Reading hangs in C at the next image, with the interpreter's lock held."""

        def read(self, shard):
            import ctypes

            from pds_ray.stages import trial as evaluate

            evaluate.decode_image = lambda _, **__: ctypes.PyDLL(None).sleep(1_000)
            return super().read(shard)

    monkeypatch.setattr(trial_inputs, "TASK_RETRIES", 0)
    source = Hanging("scenes:3:7")
    with pytest.raises(
        UserError,
        match=r"image of shard scenes-00000 of there .* too much memory or more than 1 s \(--ray",
    ) as caught:
        trial_inputs.read_split(
            "test", Split("there", source, source.shards()), [Preprocess(8)], "none", 1.0
        )
    assert "\n" not in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "workers", "whom"),
    [
        ("disk", 1, "RayTrainWorker"),
        ("failing store", 2, "RayTrainWorker"),
        ("disk", 2, "TrainController"),
        ("disk", 2, "run_queue"),
    ],
)
def test_a_killed_trial_goes_on_from_its_last_state(
    where: str, workers: int, whom: str, tmp_path: Path, s3_port: int
):
    """The trials behind it are not affected.

    Two workers are killed together, or the process that started them: that they hold all CPUs must
    not keep others from being started.
    """
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
    assert killer.reported[drop] > killer.killed_at, "it began again, or nobody watched"
    for trial, undisturbed in zip(result["backbones"][0]["trials"], expected, strict=True):
        assert workers > 1 or trial["epoch"] == undisturbed["epoch"]
        assert trial["recalls"] == pytest.approx(undisturbed["recalls"], abs=workers * ONE_ITEM)
    assert watched.names(".safetensors") == [], "states of trials that have ended"
    assert where == "disk" or faults.struck > 5


@pytest.mark.long
def test_a_folder_that_the_workers_do_not_see_is_one_line(evaluated, tmp_path: Path):
    """Their results would be lost with their disks. The driver's lock shows that it is the
    folder.
    """
    config = replace(CONFIG, seeds=1, max_failures=1_000)  # such an error is not tried again
    plan = evaluation.make_evaluation([Candidate("x", str(evaluated[0]), config.protocol)], config)
    with pytest.raises(UserError, match=f"^{tmp_path} is not to be seen on all nodes") as caught:
        distributed.run_trials(plan.trials, plan.sets, plan.splits, Folder(str(tmp_path)), config)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_a_queue_that_is_lost_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With its unfinished trials; losses are counted afresh as long as it finishes some."""

    def run(queue: Queue) -> None:
        keys = [trial.key for trial in queue.trials]
        queue.results.write_json(f"{'-'.join(keys)}.tried", {})
        queue.results.write_json(f"{keys[0]}.json", {})
        if len(keys) > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(trials, "run_queue", run)
    monkeypatch.setattr(distributed, "prepare", lambda *_: TrialInputs())
    monkeypatch.setattr(distributed.tasks, "TASK_RETRIES", 1)
    about = {
        "pairs": 1,
        "label": "",
        "backbone": SimpleNamespace(name=""),
        "protocol": SimpleNamespace(epochs=1),
    }
    todo = [SimpleNamespace(key=key, seed=number, **about) for number, key in enumerate("abcd")]
    distributed.run_trials(todo, [], {}, Folder(str(tmp_path)), replace(CONFIG, trials=1))
    tried = ["a-b-c-d.tried", "b-c-d.tried", "c-d.tried", "d.tried"]
    assert Folder(str(tmp_path)).names() == sorted([*tried, "a.json", "b.json", "c.json", "d.json"])
