"""Parts of rows in processes of their own, their memory, and the command line of the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import __main__, noting_encoder, results
from benchmarks.data import Concepts
from benchmarks.measure import BASELINE, OURS, PREPARE, PartError, Row, Task, run_part, tree_memory
from benchmarks.null_encoder import NullEncoder, describe
from benchmarks.rows import ROWS, load_row
from pds_ray import catalog

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("number", ROWS)
def test_every_row_can_be_loaded(number):
    found = load_row(number)
    assert found.number == number
    assert found.sides


@pytest.mark.parametrize("then", ["pass", "del held"])
def test_memory_is_that_of_a_process_and_its_children_at_their_peaks(then):
    ballast = f"held = bytearray(300 << 20); {then}; print(flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ballast!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        total, worker = tree_memory(process.pid, {})
        process.stdin.write(b"\n")
        process.stdin.close()
        process.wait()
    assert 300 << 20 < total < 500 << 20
    assert worker == 0
    assert tree_memory(process.pid, {}) == (0, 0)


def test_shared_memory_is_counted_once():
    code = (
        "import os, sys; held = bytearray(b'1') * (300 << 20); os.fork(); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        total, _ = tree_memory(process.pid, {})
        process.stdin.close()
        process.wait()
    assert 300 << 20 < total < 400 << 20


def test_a_part_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(PartError, match="prepare took more than 0 s"):
        run_part(8, PREPARE, Task(tmp_path, tmp_path, quick=True), limit_s=0)
    left = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    assert not [command for command in left if "benchmarks.part" in command]


def test_a_row_whose_checks_fail_ends_no_other(tmp_path, monkeypatch, capsys):
    def run_row(row: Row, *_: Any) -> results.Result:
        if row.number != 8:
            raise KeyError("no such key")
        return results.result(row, {}, {}, [], "", quick=False)

    file = tmp_path / "found.json"
    monkeypatch.setattr(__main__, "run_row", run_row)
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "7", "8", "--work", str(tmp_path), "--json", str(file)]
    )
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code
    assert [one["row"] for one in json.loads(file.read_text())] == [8]
    assert "KeyError: 'no such key'\nbenchmarks: row 7 failed\n" in capsys.readouterr().err


def test_concepts_give_vectors_of_about_unit_length_in_clusters():
    concepts = Concepts(64, seed=0)
    of = concepts.draw(500)
    vectors = concepts.vectors(of)
    assert vectors.shape == (500, 64)
    assert np.linalg.norm(vectors, axis=1).mean() == pytest.approx(1, abs=0.1)
    apart = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    same = of[:, None] == of[None]
    assert apart[same & ~np.eye(500, dtype=bool)].mean() < 0.7 * apart[~same].mean()


def test_the_null_encoder_is_in_the_catalog():
    encoder = catalog.load_encoder(describe(), "fp32")
    assert isinstance(encoder, NullEncoder)
    assert (
        encoder.encode_captions(["a", "b"]).shape
        == encoder.encode_images(np.zeros((2, 16, 16, 3))).shape
        == (2, 16)
    )


def test_an_encoder_notes_when_it_is_first_loaded(tmp_path):
    info = noting_encoder.describe(describe(), tmp_path / "loaded")
    assert (info.dim, info.preprocess) == (describe().dim, describe().preprocess)
    assert isinstance(catalog.load_encoder(info, "fp32"), NullEncoder)
    os.utime(info.note, (1, 1))
    catalog.load_encoder(info, "fp32")
    assert info.note.stat().st_mtime == 1


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )


def test_a_row_runs_and_writes_json(tmp_path):
    file = tmp_path / "found.json"
    work = str(tmp_path / "work")
    arguments = ("--quick", "--repeats", "1", "--work", work, "--json", str(file))
    done = run_benchmark("benchmarks", "8", *arguments)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(file.read_text())
    assert found["sides"].keys() == {BASELINE, OURS}
    assert found["sides"][BASELINE]["found"][0]["recalls"] == pytest.approx(
        found["sides"][OURS]["found"][0]["recalls"]
    )
    assert all(
        side["seconds"]["median"] > 0 and side["peak_gib"]["median"] > 0
        for side in found["sides"].values()
    )
    assert "| 8 | recall" in done.stdout
    assert not (tmp_path / "work" / "8-quick").exists()


def test_an_unknown_row_is_refused_in_one_line():
    done = run_benchmark("benchmarks", "99")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "python -m benchmarks: error: rows are all, or of 1, 2"
    )


def test_quick_figures_are_not_written():
    done = run_benchmark("benchmarks", "8", "--quick", "--write")
    assert done.returncode == 2
    assert "--quick figures say nothing" in done.stderr


def test_without_a_gpu_its_part_says_so_in_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_benchmark("benchmarks.gpu", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["benchmarks.gpu: torch finds no GPU on this machine"]
    assert not (tmp_path / "gpu.json").exists()
