"""A set is optimised from the command line, killed on the way, and continued."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from pds_ray import load_distilled
from tests.support.command_line import Run, check_same, command, stages

pytestmark = [pytest.mark.ray, pytest.mark.long]
PATIENCE_S = 600
SMALL = [
    "--preset", "scenes", "--source", "scenes:60", "--pairs", "8", "--method", "lors",
    "--experts.count", "2", "--experts.epochs", "2", "--distill.iterations", "30",
    "--distill.steps", "2", "--distill.max-start", "1", "--distill.step-rate", "1e-5",
    "--distill.image-rate", "0.1", "--distill.text-rate", "0.1",
    "--distill.similarity-rate", "0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pds_ray: Run) -> Path:
    out = tmp_path_factory.mktemp("optimised") / "run"
    done = pds_ray("distill", *SMALL, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_the_result_is_a_set_with_what_was_learned(finished: Path) -> None:
    found = load_distilled(str(finished))
    assert found.learned is not None
    assert found.learned.about.distiller == "lors"
    images = found.learned_images()
    assert images.shape[:2] == (8, 3)
    start = load_distilled_start(finished)
    assert not np.array_equal(images, start)
    side = found.learned.about.image_size
    for pair in range(8):
        shown = np.asarray(found.image(pair)).transpose(2, 0, 1)
        exact = (images[pair] * 0.5 + 0.5) * 255
        assert np.abs(shown - exact.clip(0, 255)).max() <= 0.51
        assert shown.shape == (3, side, side)
    assert "lors" in (finished / "distilled" / "README.md").read_text()
    assert not (finished / "optimisation.safetensors").exists()


def load_distilled_start(run: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(run / "start.safetensors")["images"]


def test_a_killed_optimisation_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        command("distill", *SMALL, "--ray.object_store_gib", "0.3", "--out", str(out)),
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    while not (out / "optimisation.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no state"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # Ray's processes too
    process.communicate(timeout=PATIENCE_S)
    assert stages(out)["optimise"] == "running"
    experts = {path: path.stat().st_mtime_ns for path in out.glob("experts/experts/*/*")}
    again = command("distill", *SMALL, "--ray.object_store_gib", "0.3", "--out", str(out))
    done = subprocess.run(again, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    check_same(out, finished)
    assert experts == {path: path.stat().st_mtime_ns for path in experts}, "trained again"


def test_another_run_begins_with_it(finished: Path, tmp_path: Path, pds_ray: Run) -> None:
    """On the experts of the first; nothing is trained again."""
    out, store = tmp_path / "run", finished / "experts"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    own = ["--method", "mdm", "--init", str(finished), "--distill.iterations", "2"]
    done = pds_ray("distill", *SMALL, *own, "--experts.store", str(store), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert list(stages(out)) == ["embed", "start", "experts", "optimise", "materialize"]
    assert "\nout           8 pairs, " in done.stdout
    first, second = load_distilled(str(finished)), load_distilled(str(out))
    assert second.captions == first.captions
    assert (out / "images" / "000000.png").read_bytes() == first.image_bytes(0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
