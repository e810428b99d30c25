"""Several processes that share a trial train as one does: same gradient, same weights, same
recalls.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ProtocolConfig
from pds_ray.stages.trial import TextInput, Trial, TrialData, run_trial, train_model
from pds_ray.training.workers import Workers
from tests.support.tiny_training import (
    PIXELS,
    SIDE,
    TinyBackbone,
    make_data,
    make_model,
    weights,
    with_extras,
)

INFO = BackboneInfo("tiny", "tiny 1", SIDE, PIXELS.mean, PIXELS.std, pretrained=True)
TEXT = TextInput("prototypes", "x", "basic")
ONE_STEP = ProtocolConfig(
    train="all", optimizer="sgd", learning_rate=1.0, momentum=0, weight_decay=0, schedule="step",
    epochs=1, batch_size=128, select="last",
)  # fmt: skip
CASES = {  # 20 pairs: batches of 20, of 7, 7, 6 and of 9 are even for neither 2 nor 3 workers
    "gradient": ONE_STEP,
    "epoch": replace(
        ONE_STEP, learning_rate=0.05, momentum=0.9, epochs=4, batch_size=8, select="test"
    ),
    "independent": replace(
        ONE_STEP, learning_rate=0.05, epochs=4, batch_size=9, sampling="independent", select="test"
    ),
    "fewer pairs than workers": replace(ONE_STEP, learning_rate=0.05, epochs=1, batch_size=2),
}


def run_cases(workers: Workers) -> dict[str, object]:
    """Return weights and recalls of every case, and of a trial with a frozen backbone."""
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    pairs, test = make_data()
    data = TrialData(pairs, None, test)
    for name, config in CASES.items():
        model = make_model()
        trial = Trial("key", "set", INFO, SIDE, 3, config, TEXT, 20)
        best = train_model(trial, model, data, workers)
        found[name] = weights(model), best
    model, trial = make_model(), Trial("key", "set", INFO, SIDE, 3, CASES["epoch"], TEXT, 20)
    extras = TrialData(with_extras(pairs), None, test)
    best = train_model(trial, model, extras, workers)
    found["several captions, soft targets"] = weights(model), best
    broadcast = workers.broadcast
    found["broadcast"] = broadcast(workers.rank == 0), broadcast(workers.rank > 0)
    config = replace(CASES["epoch"], train="heads")
    frozen = Trial("key", "set", INFO, SIDE, 0, config, TEXT, 20)
    found["frozen"] = {}, run_trial(frozen, data, lambda *_: TinyBackbone(), workers)
    return found


COUNTS = (3, 2)


def run_worker(rank: int, folder: str) -> None:
    """Run in one of three processes; two go on together: starting costs more than training."""
    for count in COUNTS:
        if rank < count:
            meeting = f"file://{folder}/meeting-{count}"
            torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=count)
            torch.save(run_cases(Workers(rank, count)), Path(folder) / f"{count}-{rank}.pt")
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def every_count() -> dict[int, list[dict]]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(run_worker, (folder,), nprocs=max(COUNTS))
        return {
            count: [torch.load(Path(folder) / f"{count}-{rank}.pt") for rank in range(count)]
            for count in COUNTS
        }


@pytest.fixture(params=COUNTS)
def shared(request: pytest.FixtureRequest, every_count: dict[int, list[dict]]) -> list[dict]:
    """The results of each of the workers."""
    return every_count[request.param]


@pytest.fixture(scope="module")
def alone() -> dict:
    return run_cases(Workers())


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_one_process(shared: list[dict], alone: dict, case: str):
    expected, _ = alone[case]
    start = weights(make_model())
    assert all(not torch.equal(start[name], value) for name, value in expected.items()), (
        "nothing was trained"
    )
    for found in shared:
        for name, value in found[case][0].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("case", [*CASES, "frozen"])
def test_recalls_are_those_of_one_process(shared: list[dict], alone: dict, case: str):
    """Every worker knows them, the same to the bit."""
    _, expected = alone[case]
    assert 0 < expected["recalls"]["r_mean"] < 100
    for found in shared:
        assert found[case][1] == shared[0][case][1]
        assert found[case][1]["epoch"] == expected["epoch"]
        assert found[case][1]["recalls"] == pytest.approx(expected["recalls"])


def test_all_have_the_value_of_the_first_one(shared: list[dict], alone: dict):
    assert alone["broadcast"] == (True, False)
    assert [found["broadcast"] for found in shared] == [(True, False)] * len(shared)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 20])
def test_the_workers_slices_make_the_batch(rows: int, count: int):
    batch = torch.randperm(rows)
    slices = [Workers(rank, count).mine(batch) for rank in range(count)]
    assert len({len(part) for part in slices}) == 1
    assert torch.cat(slices)[:rows].tolist() == batch.tolist()
