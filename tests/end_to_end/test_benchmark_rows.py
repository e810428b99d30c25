"""Every row of the side-by-side table runs, at tiny sizes whose figures say nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rows import ROWS, load_row

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600


@pytest.mark.parametrize("number", ROWS)
def test_a_row_runs_to_its_verdicts(number: int, tmp_path: Path):
    if lacking := load_row(number).lacking():
        pytest.skip(lacking)
    command = [sys.executable, "-m", "benchmarks", str(number), "--quick", "--repeats", "1"]
    places = ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(
        [*command, *places], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["row"] == number
    assert found["checks"]
    assert all(side["process_seconds"]["min"] > 0 for side in found["sides"].values())
