"""The wheel holds all that a run needs: it is built, installed beside the project and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command_line import DEMO

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pds_ray(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run the installed command in an empty folder; return what it prints."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site, empty = folder / "source", folder / "site", folder / "empty"
    empty.mkdir()
    # a copy, as a build leaves files beside the source, and takes up what another one left
    shutil.copytree(
        ROOT / "pds_ray", source / "pds_ray", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    wheels = folder / "wheels"
    for step in (
        ["wheel", *offline, "--no-build-isolation", "--wheel-dir", str(wheels), str(source)],
        ["install", *offline, "--find-links", str(wheels), "--target", str(site), "pds-ray"],
    ):
        subprocess.run([*pip, *step], check=True, cwd=empty)
    env = {**os.environ, "PYTHONPATH": str(site)}
    env.pop("VIRTUAL_ENV", None)

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, str(site / "bin" / "pds-ray"), *args],
            cwd=empty, env=env, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    place = [sys.executable, "-c", "import pds_ray; print(pds_ray.__file__)"]
    found = subprocess.run(place, cwd=empty, env=env, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(site)
    return run


def test_it_says_its_version(pds_ray: Callable[..., str]) -> None:
    assert pds_ray("--version") == "pds-ray 0.1.0\n"


def test_it_holds_the_demo_models(pds_ray: Callable[..., str]) -> None:
    assert pds_ray("doctor").count("demo models") == 2


def test_it_holds_the_figures_of_the_plans(pds_ray: Callable[..., str]) -> None:
    assert "assumed" in pds_ray("plan", "--pairs-in", "1M", "--gpus", "8xH100")


@pytest.mark.ray
def test_it_distils_reports_and_exports(pds_ray: Callable[..., str], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    small = ["--ray.num-cpus", "2", "--ray.object-store-gib", "0.3"]
    pds_ray("distill", *DEMO, *small, "--out", str(run))
    assert (run / "report.html").stat().st_size > 10_000
    pds_ray("export", str(run), "--format", "parquet", "--to", str(out))
    assert (out / "data" / "train-00000-of-00001.parquet").is_file()
