"""A run killed at any instant and started again ends with the bytes of one never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.command_line import check_same, command, times

pytestmark = [pytest.mark.ray, pytest.mark.long]
ARGS = ["distill", "--preset", "demo", "--source", "scenes:3000", "--pairs", "20",
        "--decode.steps", "2", "--decode.batch_size", "4"]  # fmt: skip
PATIENCE_S = 600
STAGES = ("embed", "prune", "cluster", "match", "prototypes", "decode", "caption", "materialize")


def start(out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*ARGS, "--out", str(out), *more),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def progress(out: Path) -> str:
    """Return the stage that is under way."""
    try:
        stages = json.loads((out / "run.json").read_text())["stages"]
    except (FileNotFoundError, ValueError):
        return "starting"
    running = [name for name, entry in stages.items() if entry["status"] == "running"]
    return running[-1] if running else "between"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(out)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    return out


def wait_for(stage: str, out: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while progress(out) != stage and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, f"ended before {stage}"


def check_finished(process: subprocess.Popen, out: Path, undisturbed: Path) -> None:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    check_same(out, undisturbed)


def finished_work(out: Path) -> dict[Path, int]:
    """Return when each shard was committed and each image written."""
    done = {*(out / "embeddings").glob("*.json"), *(out / "images").glob("*.png")}
    return {path: when for path, when in times(out).items() if path in done}


def check_kept(finished: dict[Path, int]) -> None:
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, (
        "finished work was redone"
    )


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, 130),
        (signal.SIGINT, 130),
    ],
)
def test_killed_again_and_again(
    undisturbed: Path, tmp_path: Path, how: signal.Signals, expected: int
) -> None:
    """Killed once in each of two stages, at a random moment of it; finished work is not redone.

    SIGINT and SIGKILL reach Ray's processes too, as from a terminal; SIGTERM reaches the driver
    alone, as when a job is stopped: Ray's processes would end at once by it, and Ray ends a driver
    that has lost them.
    """
    out = tmp_path / "run"
    moments = random.Random(int(how))
    finished: dict[Path, int] = {}
    for stage in ("embed", "decode"):
        process = start(out)
        wait_for(stage, out, process)
        time.sleep(moments.uniform(0, 3))
        (os.kill if how == signal.SIGTERM else os.killpg)(process.pid, how)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == expected, errors
        if how != signal.SIGKILL:
            assert "the same command continues" in errors
        check_kept(finished)
        finished = finished_work(out)
    process = start(out)
    check_finished(process, out, undisturbed)
    check_kept(finished)


def workers(process: psutil.Process, name: str) -> list[psutil.Process]:
    """Return the Ray workers below a process whose title has a name."""
    found = []
    for child in process.children(recursive=True):
        try:
            found += [child] if name in " ".join(child.cmdline()) else []
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize(
    ("stage", "worker"),
    [("embed", "EmbedWorker"), ("decode", "SynthesizeWorker")],
)
def test_an_actor_is_killed(undisturbed: Path, tmp_path: Path, stage: str, worker: str) -> None:
    """Once while its model loads and once when it has begun to work; the run itself goes on."""
    out = tmp_path / "run"
    process = start(out)
    wait_for(stage, out, process)
    killed: set[int] = set()
    for wait_s in (0.0, 5.0):
        deadline = time.monotonic() + PATIENCE_S
        while not (
            alive := [
                w for w in workers(psutil.Process(process.pid), worker) if w.pid not in killed
            ]
        ):
            assert process.poll() is None, f"ended before there was another {worker}"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(wait_s)
        if process.poll() is None and alive[0].is_running():
            alive[0].kill()
            killed.add(alive[0].pid)
    assert killed
    check_finished(process, out, undisturbed)


def test_killed_twenty_times(undisturbed: Path, tmp_path: Path) -> None:
    """In every stage at a random moment of it, then at random instants.

    A run that ends before it is killed is followed by a new one.
    """
    out, moments, instants = tmp_path / "0", random.Random(20), 20
    finished: dict[Path, int] = {}
    for number in range(instants):
        process = start(out)
        if number < len(STAGES):
            stage, deadline = STAGES[number], time.monotonic() + PATIENCE_S
            while progress(out) != stage and process.poll() is None:
                assert time.monotonic() < deadline, f"{stage} was not reached"
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.3))
        else:
            time.sleep(moments.uniform(1, 60))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)
        check_kept(finished)
        finished = finished_work(out)
        if process.returncode == 0:
            check_finished(start(out), out, undisturbed)
            check_kept(finished)
            out, finished = tmp_path / str(number + 1), {}
    check_finished(start(out), out, undisturbed)
    check_kept(finished)


def node_with(worker: str, nodes: list[Any], process: subprocess.Popen) -> Any:
    """Return a node on which such an actor works; no other would be missed."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        for node in nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            if workers(raylet, worker):
                return node
        assert process.poll() is None, f"ended before there was a {worker} on a node that may die"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nodes_die_and_others_come(undisturbed: Path, tmp_path: Path) -> None:
    """One of three nodes dies while it embeds, another while it decodes; new ones join."""
    from ray.cluster_utils import Cluster

    store = 300 << 20
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": store}
    )
    try:
        nodes = [cluster.add_node(num_cpus=2, object_store_memory=store) for _ in range(2)]
        out = tmp_path / "run"
        pools = ("--ray.embed_workers", "3", "--ray.decode_workers", "3")
        process = start(out, "--address", cluster.address, *pools)
        for stage, worker in (("embed", "EmbedWorker"), ("decode", "SynthesizeWorker")):
            wait_for(stage, out, process)
            node = node_with(worker, nodes, process)
            time.sleep(2)
            nodes.remove(node)
            cluster.remove_node(node, allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=2, object_store_memory=store))
        check_finished(process, out, undisturbed)
    finally:
        cluster.shutdown()
