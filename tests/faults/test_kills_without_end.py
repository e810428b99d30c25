"""A kill every few seconds until the run is through: the bytes of one never disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.command_line import check_same, command

pytestmark = [pytest.mark.ray, pytest.mark.long]
ARGS = ["distill", "--preset", "demo", "--source", "scenes:300:0:0:15", "--pairs", "8",
        "--decode.steps", "2", "--decode.batch_size", "2"]  # fmt: skip
NODE = {"num_cpus": 2, "object_store_memory": 200 << 20}
KILLS = ("worker", "node", "worker", "driver", "worker")
"""Kinds of what is killed, one after the other and then from the first on; chance says which.

A driver that has written nothing yet is spared in its turn: on a busy machine none might begin.
"""
SPARED = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Workers that would not be missed, and processes that take their raylet with them."""
FIRST_WAIT_S, LONGER = 3.0, 1.08
"""Seconds to the first kill, and how much longer each wait is than the one before.

However slow the machine is, one wait is long enough for a model to load and to do some work.
"""
LEAST_KILLS, NODE_ATTEMPTS = 8, 5
PATIENCE_S = 900


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*ARGS, "--out", str(out), *more),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)


def busy_workers(nodes: list[Any]) -> list[psutil.Process]:
    """Return the processes of tasks and actors on nodes."""
    found = []
    for node in nodes:
        for child in psutil.Process(raylet(node)).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except psutil.NoSuchProcess:
                continue
            if title.startswith("ray::") and not title.startswith(SPARED):
                found.append(child)
    return sorted(found, key=lambda child: child.pid)


def joined(cluster: Any) -> Any:
    """Return a new node of a cluster; on a busy machine one may take longer than Ray waits."""
    for _ in range(NODE_ATTEMPTS - 1):
        try:
            return cluster.add_node(**NODE)
        except Exception as error:  # Ray raises no narrower one
            if "timed out during startup" not in str(error):
                raise
    return cluster.add_node(**NODE)


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def made(out: Path) -> int:
    """Return how many files a run has."""
    return sum(path.is_file() for path in out.rglob("*"))


def ended(process: subprocess.Popen[str], wait_s: float) -> bool:
    try:
        process.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_one_kill_every_few_seconds(tmp_path: Path) -> None:
    """Workers, nodes and the driver; other nodes come, and the same command is repeated."""
    from ray.cluster_utils import Cluster

    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    alone = start(undisturbed, "--ray.num-cpus", "2", "--ray.object-store-gib", "0.2")
    _, errors = alone.communicate(timeout=PATIENCE_S)
    assert alone.returncode == 0, errors

    chance, wait_s = random.Random(1), FIRST_WAIT_S
    killed: list[str] = []
    turn = begun = 0
    pools = ("--ray.embed-workers", "3", "--ray.decode-workers", "3")
    with ExitStack() as ends:
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        ends.callback(cluster.shutdown)
        nodes = [joined(cluster) for _ in range(2)]
        process = start(out, "--address", cluster.address, *pools)
        ends.callback(lambda: kill(process))
        deadline = time.monotonic() + PATIENCE_S
        while not ended(process, wait_s):
            assert time.monotonic() < deadline, killed
            what = KILLS[turn % len(KILLS)]
            if what == "driver" and made(out) <= begun:
                what = "worker"
            else:
                turn += 1
            workers = busy_workers([cluster.head_node, *nodes])
            if what == "worker" and workers:
                with suppress(psutil.NoSuchProcess):
                    chance.choice(workers).kill()
            elif what == "node":
                node = nodes.pop(chance.randrange(len(nodes)))
                os.kill(raylet(node), signal.SIGKILL)
                cluster.remove_node(node, allow_graceful=False)
                nodes.append(joined(cluster))
            elif what == "driver":
                kill(process)
                begun = made(out)
                process = start(out, "--address", cluster.address, *pools)
            else:
                continue
            killed.append(what)
            wait_s *= LONGER
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, (killed, errors)
    check_same(out, undisturbed)
    assert len(killed) >= LEAST_KILLS
    assert set(killed) == set(KILLS)
