"""The files that an optimisation leaves, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pds_ray.config import RunConfig
from pds_ray.distillers.base import Problem, Start
from pds_ray.distributed import optimise as distributed
from pds_ray.distributed.optimise import Job, _counts, _history, _write
from pds_ray.errors import UserError
from pds_ray.stages.optimise import Optimised
from pds_ray.stages.optimise_inputs import Prepared, learned_for
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.tiny_experts import MadeUpEncoder, begin, wanted
from tests.support.tiny_training import PIXELS, SIDE

HISTORY = [
    {"iteration": 0, "score": 7.0},
    {"iteration": 1, "image": 0.9, "text": 0.8},
    {"iteration": 2, "image": 0.7, "text": 0.6, "score": 8.0},
]


def test_what_is_learned_is_written_for_people_and_for_training(tmp_path: Path) -> None:
    experts = wanted(tmp_path / "experts")
    begin(experts)
    config = RunConfig(method="mdm")
    captions = experts.store.captions(experts.shards[1].name)[:3]
    text = torch.from_numpy(MadeUpEncoder().encode_captions(captions))
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = Optimised({"images": 2 * images - 1, "text": text}, 2, HISTORY)
    folder = RunFolder(Folder(str(tmp_path / "run")))
    problem: Problem = None  # type: ignore[assignment]  # what is written does not depend on it
    targets = torch.eye(3) / 2
    prepared = Prepared(problem, Start(images, text, targets), learned_for(config, experts))
    _write(Job(config, experts, folder, captions, None), prepared, found)
    learned, pixels = folder.learning.result()
    assert np.array_equal(pixels, found.tensors["images"].numpy())
    assert (learned.similarity, learned.step_sizes) == (None, None)
    before, of_start = folder.learning.start()
    assert np.array_equal(of_start, images.numpy())
    assert np.array_equal(before.similarity, targets.numpy())
    nearest = folder.learning.captions()
    assert [names[0] for names in nearest.column("learned_captions").to_pylist()] == captions
    cosines = [each[0] for each in nearest.column("learned_cosines").to_pylist()]
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    for pair in range(3):
        shown = np.asarray(Image.open(tmp_path / "run" / "learned" / f"{pair:06d}.png"))
        exact = pixels[pair].transpose(1, 2, 0) * np.array(PIXELS.std) + np.array(PIXELS.mean)
        assert np.abs(shown - (255 * exact).clip(0, 255)).max() <= 0.51


def test_the_history_has_a_row_per_iteration_and_nulls_where_nothing_was_measured() -> None:
    table = _history(HISTORY)
    assert table.column("iteration").to_pylist() == [0, 1, 2]
    assert table.column("score").to_pylist() == [7.0, None, 8.0]
    assert table.column("image").to_pylist() == [None, 0.9, 0.7]
    counted = _counts(Optimised({}, 2, HISTORY))
    assert counted == {
        "iterations": 2, "kept": 2, "image_ratio": 0.7, "text_ratio": 0.6,
        "score_of_start": 7.0, "score": 8.0,
    }  # fmt: skip


def test_a_gpu_that_is_too_small_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    monkeypatch.setattr(distributed, "_improved", full)
    with pytest.raises(UserError, match=r"^the optimisation does not fit on the GPU; [^\n]+$"):
        distributed._improve(None, None)  # type: ignore[arg-type]
