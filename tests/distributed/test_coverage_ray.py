"""Whitening and coverage on Ray, against the same on the gathered arrays in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pds_ray.config import ConfigError, CoverConfig, RunConfig, replace
from pds_ray.distributed import pools
from pds_ray.methods.base import Counts
from pds_ray.stages import cover
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.stage_run import do, stage_run
from tests.support.synthetic_store import Gathered, make_store

pytestmark = pytest.mark.ray
DIM, PAIRS = 8, 12
CONFIG = RunConfig(method="coverage", pairs=PAIRS, seed=3, cover=CoverConfig(candidates=90))
ROWS = [40, 1, 120, 39]


def run_stages(
    folder: Path, rows_per_shard: list[int] = ROWS, config: RunConfig = CONFIG
) -> tuple[RunFolder, Gathered, dict[str, Counts]]:
    store, data = make_store(folder / "store", rows_per_shard)
    run = RunFolder(Folder(str(folder / "run")))
    return run, data, do(stage_run(store, run, config, DIM), "prune", "whiten", "cover")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Gathered, dict]:
    return run_stages(tmp_path_factory.mktemp("coverage"))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def kept_rows(data: Gathered) -> np.ndarray:
    order = np.argsort(data.similarity, kind="stable")
    return np.sort(order[int(0.2 * len(order)) :])


def white(vectors: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Whiten by the definition, along principal axes."""
    rows = unit(vectors.astype(np.float64))
    mean, covariance = rows[kept].mean(axis=0), np.cov(rows[kept].T, bias=True)
    variances, axes = np.linalg.eigh(covariance)
    return unit((rows - mean) @ axes / np.sqrt(variances + 0.1 * variances.mean()))


def expected_picks(data: Gathered) -> list[int]:
    """The picks, as pairs: candidates by rank, then both greedy choices by brute force."""
    kept = kept_rows(data)
    best: dict[str, int] = {}
    for row in kept:
        key = data.keys[row]
        if key not in best or data.similarity[row] > data.similarity[best[key]]:
            best[key] = row
    drawn = sorted(best.values(), key=lambda row: cover.rank(3, data.keys[row], data.captions[row]))
    rows = np.array(drawn[:90])
    x = np.concatenate([white(data.image, kept), white(data.text, kept)], axis=1)[rows]
    similarity = x @ x.T / 2
    outer = np.einsum("nd,ne->nde", x[:, :DIM], x[:, DIM:])
    picks: list[int] = []
    for count in range(1, PAIRS // 2 + 1):
        away = outer[picks].sum(axis=0) + outer - count * outer.mean(axis=0)
        distance = np.linalg.norm(away, axis=(1, 2))
        distance[picks] = np.inf
        picks.append(int(distance.argmin()))
    for _ in range(PAIRS - len(picks)):
        covered = similarity[:, picks].max(axis=1, initial=-1)
        gains = np.maximum(similarity - covered[:, None], 0).sum(axis=0)
        gains[picks] = -np.inf
        picks.append(int(gains.argmax()))
    return rows[picks].tolist()


def test_the_pairs_are_those_of_the_gathered_arrays(
    finished: tuple[RunFolder, Gathered, dict],
) -> None:
    run, data, counts = finished
    table = run.prototypes()
    picks = expected_picks(data)
    assert table.column("pair").to_pylist() == list(range(PAIRS))
    assert table.column("caption").to_pylist() == [data.captions[pick] for pick in picks]
    assert table.column("nearest_key").to_pylist() == [data.keys[pick] for pick in picks]
    kept = kept_rows(data)
    assert counts["whiten"] == {"pairs": len(kept)}
    assert counts["cover"] == {
        "prototypes": PAIRS,
        "candidates": 90,
        "duplicate_captions": 0,
        "mean_cosine": pytest.approx(float(data.similarity[picks].astype(np.float64).mean())),
    }


@pytest.mark.parametrize("rows", [[200], [50, 50, 50, 50], [1, 198, 1]])
def test_shards_do_not_matter(
    finished: tuple[RunFolder, Gathered, dict], tmp_path: Path, rows: list[int]
) -> None:
    before = finished[0].prototypes()
    again = run_stages(tmp_path, rows)[0].prototypes()
    for column in ("caption", "nearest_key", "image_prototype", "text_prototype"):
        assert again.column(column) == before.column(column)


def test_parts_pick_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cover, "PART", 25)
    run, data, counts = run_stages(tmp_path)
    keys = run.prototypes().column("nearest_key").to_pylist()
    assert len(set(keys)) == PAIRS
    assert keys != [data.keys[pick] for pick in expected_picks(data)]
    assert counts["cover"]["candidates"] == 90


def test_fewer_images_than_pairs(tmp_path: Path) -> None:
    config = replace(CONFIG, {"pairs": 50})
    run, _, counts = run_stages(tmp_path, [30], config)
    images = counts["prune"]["images_kept"]
    assert run.prototypes().num_rows == images < 50
    why = f"{images} of the 50 pairs asked for: pruning leaves no more images"
    assert counts["cover"]["fewer"] == why


def test_candidates_that_no_node_can_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "most_memory", lambda: 90 * 2 * DIM * 4 - 1)
    with pytest.raises(ConfigError, match="method coverage holds 90 candidates at once"):
        run_stages(tmp_path)
