"""Commands as jobs of a real Ray cluster: a head and its nodes, the Jobs API, a token."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pds_ray.distributed.metrics import COUNTERS
from tests.support.cluster_files import dashboard, metrics_of
from tests.support.command_line import DEMO, Run, check_same, command, stages
from tests.support.poisoned import write_shard

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
START_S = 600
"""A node, a job or a metric that is not there by then never comes, however busy the machine is."""
# nodes are told apart by what they offer, as those with and without GPUs are
POOLS = ["--ray.read-resources", "reader=1", "--ray.embed-resources", "encoder=1",
         "--ray.embed-workers", "2", "--ray.embed-min-workers", "2",
         "--ray.decode-resources", "painter=1", "--ray.decode-workers", "1"]  # fmt: skip


@dataclass
class Cluster:
    """A head that takes jobs; nodes are added one by one."""

    gcs: str
    address: str
    metrics: str
    env: dict[str, str]
    folder: Path
    agents: list[int] = field(default_factory=list)
    """The port of each node's agent; the head's takes jobs."""
    _nodes: list[subprocess.Popen] = field(default_factory=list)

    def call(self, *args: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(args), capture_output=True, text=True, env=self.env, check=False, cwd=ROOT,
            timeout=3 * START_S,
        )  # fmt: skip

    def submit(self, *args: str) -> subprocess.CompletedProcess:
        return self.call(*command("submit", "--address", self.address, *args))

    def listed(self, what: str) -> list[dict[str, Any]]:
        """Return the cluster's nodes or actors, by its state API; none while it does not answer."""
        request = urllib.request.Request(
            f"{self.address}/api/v0/{what}?limit=1000",
            headers={"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["data"]["result"]["result"]
        except (OSError, KeyError):
            return []

    def actors(self) -> dict[str, set[str]]:
        """Return class -> the nodes that its actors are or were on; some never got so far."""
        found: dict[str, set[str]] = {}
        for actor in self.listed("actors"):
            if actor["node_id"]:
                found.setdefault(actor["class_name"], set()).add(actor["node_id"])
        return found

    def node(self, resource: str) -> str:
        (node,) = [
            each["node_id"] for each in self.listed("nodes") if resource in each["resources_total"]
        ]
        return node

    def start(self, *args: str) -> None:
        """Start a node and wait until it is listed.

        Each has a folder and ports of its own, as on machines of their own: a node that sets up a
        job's files removes those it finds, be they in use by another node's processes; and an agent
        whose port is taken, by any Ray on this machine, takes no jobs and says so in a log only.
        """
        own = self.folder / str(len(self._nodes))
        own.mkdir()
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--temp-dir", own]
        self.agents.append(free_port())
        ports = ["--dashboard-agent-listen-port", str(self.agents[-1])]
        whole = [*ray, *ports, "--object-store-memory", "120000000", *args]
        with (own / "node.log").open("w+") as log:
            self._nodes.append(
                subprocess.Popen(
                    whole, env=self.env, stdout=log, stderr=log, start_new_session=True
                )
            )
            wait_until(
                lambda: len(self.listed("nodes")) == len(self._nodes),
                lambda: (self._nodes[-1].poll() is None, (own / "node.log").read_text()),
            )

    def add(self, resource: str) -> None:
        """Start a node of two CPUs that offers a resource."""
        offered = json.dumps({resource: 10})
        self.start("--address", self.gcs, "--num-cpus", "2", "--resources", offered)

    def takes_jobs(self) -> bool:
        (head,) = [each for each in self.listed("nodes") if each["is_head_node"]] or [None]
        with socket.socket() as probe:
            return head is not None and not probe.connect_ex((head["node_ip"], self.agents[0]))

    def kill(self) -> None:
        for node in self._nodes:
            with suppress(ProcessLookupError):  # it ended by itself, which the test has said
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def wait_until(
    condition: Callable[[], Any], alive: Callable[[], tuple[bool, str]] = lambda: (True, "")
) -> None:
    """Wait for a fact, as long as what it depends on is alive."""
    deadline = time.monotonic() + START_S
    while not condition():
        lives, why = alive()
        assert lives, why
        assert time.monotonic() < deadline, f"it never came; {why}"
        time.sleep(0.2)


def free_port() -> int:
    """Return a port above those that Ray gives its workers."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Yield a cluster of a head that takes no tasks, a node that reads and one that encodes."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: paths of sockets have 107 characters
    gcs, jobs, metrics = free_port(), free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": str(START_S),
    }
    running = Cluster(
        f"127.0.0.1:{gcs}",
        f"http://127.0.0.1:{jobs}",
        f"http://127.0.0.1:{metrics}/metrics",
        environment,
        folder,
    )
    try:
        running.start(
            "--head", "--port", str(gcs), "--dashboard-port", str(jobs),
            "--metrics-export-port", str(metrics), "--num-cpus", "0",
        )  # fmt: skip
        running.add("reader")
        running.add("encoder")
        yield running
    finally:
        running.kill()
        shutil.rmtree(folder)


@pytest.mark.long
def test_a_stopped_job_continues_where_it_was(
    cluster: Cluster,
    tmp_path: Path,
    pds_ray: Run,
    finished: tuple[Path, subprocess.CompletedProcess],
) -> None:
    """Submitted, refused a second time, stopped, submitted again: the set is a local run's.

    The first job cannot end before it is stopped: the node that decodes joins afterwards.
    """
    out, config = tmp_path / "run", tmp_path / "local.yaml"
    config.write_text(yaml.safe_dump({"out": str(out)}))
    job = ["--", "distill", *DEMO, "--config", str(config), *POOLS]
    first = cluster.submit("--no-wait", *job)
    assert first.returncode == 0, first.stderr
    name = re.search(r"submitted job (\S+)", first.stderr)[1]
    wait_until(lambda: list(out.glob("embeddings/scenes-*.json")))
    second = cluster.submit(*job)
    assert second.returncode == 2
    assert f"job {name} already works on {out}" in second.stderr
    seen = pds_ray("status", str(out), "--json")
    assert json.loads(seen.stdout)["state"] == "running"
    cluster.call("ray", "job", "stop", "--address", cluster.address, name)
    seen = pds_ray("status", str(out), "--json")
    assert (seen.returncode, json.loads(seen.stdout)["state"]) == (2, "interrupted")
    committed = {path: path.stat().st_mtime_ns for path in out.glob("embeddings/scenes-*.json")}

    cluster.add("painter")
    again = cluster.submit(*job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.rstrip().endswith("pds-ray: distill done")
    assert "24 pairs" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in committed} == committed, (
        "committed shards were embedded again"
    )
    check_same(out, finished[0])
    assert json.loads(pds_ray("status", str(out), "--json").stdout)["state"] == "finished"

    actors = cluster.actors()
    assert actors["MapWorker(MapBatches(EmbedWorker))"] == {cluster.node("encoder")}
    assert actors["MapWorker(MapBatches(SynthesizeWorker))"] == {cluster.node("painter")}


@pytest.mark.long
def test_stages_as_jobs_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    """`ray job submit -- python jobs/X.py` for one stage, for the others, and with errors."""
    out = tmp_path / "run"
    small = ["--preset", "demo", "--source", "scenes:60", "--pairs", "4", "--decode.steps", "1",
             "--out", str(out)]  # fmt: skip

    def job(script: str, *args: str) -> subprocess.CompletedProcess:
        ignored = {"excludes": [".git", ".venv", "docs", "tests", "benchmarks", "runs"]}
        return cluster.call(
            "ray", "job", "submit", "--address", cluster.address, "--working-dir", ".",
            "--runtime-env-json", json.dumps(ignored), "--", "python", script, *args,
        )  # fmt: skip

    wait_until(cluster.takes_jobs)  # `ray job submit` does not wait, other than ours
    early = job("jobs/synthesize.py", *small)
    assert early.returncode == 1
    assert "stage decode comes after embed, which is not done" in early.stdout
    assert stages(out) == {}
    done = job("jobs/embed.py", *small)
    assert done.returncode == 0, done.stdout
    assert stages(out) == {"embed": "done"}
    rest = job("jobs/distill.py", *small)
    assert rest.returncode == 0, rest.stdout
    assert set(stages(out).values()) == {"done"}
    wrong = job("jobs/evaluate.py", str(out), "--test", "scenes:50:7", "--backbones", "smal_conv")
    assert wrong.returncode == 1
    assert "smal_conv" in wrong.stdout.splitlines()[-1] + wrong.stdout.splitlines()[-2]


@pytest.mark.long
def test_prometheus_sees_the_documented_metrics(cluster: Cluster, tmp_path: Path) -> None:
    """A run with bad samples moves the counters by the figures of its run.json."""
    out = tmp_path / "run"
    write_shard(tmp_path / "a.tar", {}, samples=30)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for suffix in ("png", "txt"):
            member = tarfile.TarInfo(f"bad.{suffix}")
            member.size = 10
            tar.addfile(member, io.BytesIO(b"no picture"))
    (tmp_path / "b.tar").write_bytes(b"no tar either" * 1000)
    done = cluster.submit(
        "--", "distill", "--preset", "demo", "--source", str(tmp_path / "*.tar"), "--pairs", "3",
        "--decoder", "nearest", "--out", str(out), "--ray.max-failed-share", "0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, float] = {}
    served: set[str] = set()
    counts = {
        name: entry["counts"]
        for name, entry in json.loads((out / "run.json").read_text())["stages"].items()
    }
    embed, decode = counts["embed"], counts["decode"]
    assert (embed["images"], embed["bad"], embed["failed_shards"], decode["made"]) == (30, 2, 1, 3)
    truth = {
        "ray_pds_ray_images_embedded_total": embed["images"],
        "ray_pds_ray_pairs_embedded_total": embed["pairs"],
        **{
            f"ray_pds_ray_bad_samples_total{reason}": bad
            for reason, bad in embed["reasons"].items()
        },
        "ray_pds_ray_shards_committed_total": embed["shards"],
        "ray_pds_ray_shards_failed_total": embed["failed_shards"],
        "ray_pds_ray_pictures_decoded_total": decode["made"],
        "ray_pds_ray_actor_busy_seconds_total": embed["encoder_busy_s"] + decode["decoder_busy_s"],
        "ray_pds_ray_actor_idle_seconds_total": embed["encoder_idle_s"] + decode["decoder_idle_s"],
    }

    def all_seen() -> bool:
        """The workers' counters reach the head's exporter one by one."""
        seen.clear()
        with urllib.request.urlopen(cluster.metrics, timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                served.add(re.split(r"[{ ]", line)[0])
                if line.startswith("ray_pds_ray") and f'run="{out}"' in line:
                    reason = "".join(re.findall(r'reason="(\w+)"', line))
                    name, value = line.partition("{")[0] + reason, float(line.rpartition(" ")[2])
                    seen[name] = seen.get(name, 0.0) + value
        return seen == pytest.approx(truth, abs=0.01)

    wait_until(all_seen, lambda: (True, f"{seen} is not {truth}"))
    moved = {name.removeprefix("ray_").partition("_total")[0] + "_total" for name in seen}
    assert moved == COUNTERS.keys()
    assert {
        name for name in metrics_of(dashboard()) if not name.startswith("ray_pds_ray")
    } <= served


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ("", "which command"),
        ("-- distill --source scenes:9 --out runs/x", "a path that all nodes have"),
        ("-- distill --source shards/{0..9}.tar --out /x", "source is 'shards/{0..9}.tar'"),
        ("-- distill --source s3://KEY:SECRET@bucket/a.tar --out /x", "credentials"),
        ("-- distil --out /x", "invalid choice: 'distil'"),
        ("--env HF_HUB_OFFLINE -- distill --source scenes:9 --out /x", "NAME=VALUE"),
        ("--env A=1 --env A=2 -- distill --source scenes:9 --out /x", "each name once"),
        ("-- distill --source scenes:9 --out /x", "no Ray cluster takes jobs"),
    ],
)
def test_a_job_that_cannot_be_submitted_is_one_line(pds_ray: Run, args: str, why: str) -> None:
    done = pds_ray("submit", "--address", f"http://127.0.0.1:{free_port()}", *args.split())
    assert done.returncode == 2
    assert why in done.stderr
    assert "SECRET" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_without_the_token_no_job_is_taken(cluster: Cluster) -> None:
    stranger = {**cluster.env, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(
        command("submit", "--address", cluster.address, "--", "distill", "--source", "scenes:9",
                "--out", "/x"),
        capture_output=True, text=True, env=stranger, check=False, timeout=START_S,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert stranger["RAY_AUTH_TOKEN"] not in done.stderr
