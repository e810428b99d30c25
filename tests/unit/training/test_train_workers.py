"""Several processes that share a trial train as one does: same gradient, same weights, same recalls."""

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
from pds_ray.stages.trial import TextInput, Trial, run_trial
from pds_ray.training import train as core
from pds_ray.training.train import Workers
from tests.support.tiny_training import PIXELS, SIDE, TinyBackbone, make_data, make_model, weights

CPU = torch.device("cpu")
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
    """Every case: weights at the end and what was measured; then one trial with a frozen backbone."""
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    pairs, test = make_data()
    for name, config in CASES.items():
        model = make_model()
        best = core.train(model, pairs, None, test, PIXELS, config, 3, CPU, workers)
        found[name] = weights(model), best
    found["told"] = workers.told(workers.rank == 0), workers.told(workers.rank > 0)
    info = BackboneInfo("tiny", "tiny 1", SIDE, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), pretrained=True)
    config = replace(CASES["epoch"], train="heads")
    frozen = Trial("key", "set", info, SIDE, 0, config, TextInput("prototypes", "x", "basic"), 20)
    found["frozen"] = (
        {},
        run_trial(frozen, lambda *_: TinyBackbone(), pairs, None, test, CPU, workers),
    )
    return found


COUNTS = (3, 2)


def run_worker(rank: int, folder: str) -> None:
    """One of three processes; two of them go on together, because starting costs more than training."""
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
    """What each of the workers found."""
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


def test_all_are_told_what_the_first_one_says(shared: list[dict], alone: dict):
    assert alone["told"] == (True, False)
    assert [found["told"] for found in shared] == [(True, False)] * len(shared)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 20])
def test_the_workers_slices_make_the_batch(rows: int, count: int):
    batch = torch.randperm(rows)
    slices = [Workers(rank, count).mine(batch) for rank in range(count)]
    assert len({len(part) for part in slices}) == 1
    assert torch.cat(slices)[:rows].tolist() == batch.tolist()
