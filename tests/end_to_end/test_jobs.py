"""Commands as jobs of a real Ray cluster: three nodes of their own processes, the Jobs API, a token."""

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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pds_ray.distributed.metrics import COUNTERS
from tests.support.cluster_files import dashboard, metrics_of
from tests.support.command_line import DEMO, Run, command, content, stages
from tests.support.poisoned import write_shard

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
# nodes are told apart by what they offer, as those with and without GPUs are
POOLS = ["--ray.read-resources", "reader=1", "--ray.embed-resources", "encoder=1", "--ray.embed-workers", "2",
         "--ray.embed-min-workers", "2", "--ray.decode-resources", "painter=1", "--ray.decode-workers", "1",
         ]  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    address: str
    metrics: str
    env: dict[str, str]

    def call(self, *args: str, timeout: float = 400) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(args),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.env,
            check=False,
            cwd=ROOT,
        )

    def submit(self, *args: str) -> subprocess.CompletedProcess:
        return self.call(*command("submit", "--address", self.address, *args))

    def listed(self, what: str) -> list[dict[str, Any]]:
        """The nodes or actors of the cluster, by its state API; none while it does not answer."""
        request = urllib.request.Request(
            f"{self.address}/api/v0/{what}?limit=1000",
            headers={"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)["data"]["result"]["result"]
        except (OSError, KeyError):
            return []

    def actors(self) -> dict[str, set[str]]:
        """Class -> the nodes that its actors are or were on."""
        found: dict[str, set[str]] = {}
        for actor in self.listed("actors"):
            found.setdefault(actor["class_name"], set()).add(actor["node_id"])
        return found

    def node(self, resource: str) -> str:
        (node,) = [
            each["node_id"] for each in self.listed("nodes") if resource in each["resources_total"]
        ]
        return node


def free_port() -> int:
    """Above the ports that Ray gives its workers."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    logs = Path(
        tempfile.mkdtemp(prefix="ray")
    )  # a short name: those of sockets may have 107 characters
    gcs, jobs, metrics = free_port(), free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "RAY_raylet_start_wait_time_s": "120",
    }
    head = ["--head", "--port", str(gcs), "--dashboard-port", str(jobs), "--metrics-export-port", str(metrics),
            "--num-cpus", "0"]  # fmt: skip
    worker = ["--address", f"127.0.0.1:{gcs}", "--num-cpus", "2"]
    nodes: list[subprocess.Popen] = []
    running = Cluster(
        f"http://127.0.0.1:{jobs}", f"http://127.0.0.1:{metrics}/metrics", environment
    )

    def start(*args: str) -> None:
        """One after the other: a node must be up within a time.

        Each has a folder of its own, as on machines of their own: a node that sets up a job's files
        removes those it finds, be they in use by another node's processes.
        """
        own = logs / str(len(nodes))
        own.mkdir()
        with (own / "node.log").open("w+") as log:
            ray = [
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--block",
                "--temp-dir",
                str(own),
            ]
            whole = [*ray, "--object-store-memory", "120000000", *args]
            nodes.append(
                subprocess.Popen(
                    whole, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
            deadline = time.monotonic() + 180
            while len(running.listed("nodes")) < len(nodes):
                assert nodes[-1].poll() is None, (log.seek(0), log.read())
                assert time.monotonic() < deadline
                time.sleep(0.5)

    try:
        start(*head)
        start(*worker, "--resources", '{"reader": 10}')
        start(*worker, "--resources", '{"encoder": 2, "painter": 2}')
        yield running
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):  # it ended by itself, which the test has said
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(logs)


def wait_for_shard(out: Path) -> None:
    deadline = time.monotonic() + 240
    while not list(out.glob("embeddings/scenes-*.json")):
        assert time.monotonic() < deadline, "no shard is committed"
        time.sleep(0.1)


def test_a_stopped_job_continues_where_it_was(
    cluster: Cluster,
    tmp_path: Path,
    pds_ray: Run,
    finished: tuple[Path, subprocess.CompletedProcess],
) -> None:
    """Submitted, refused twice at once, stopped within seconds, submitted anew: the set is that of a local run."""
    out, config = tmp_path / "run", tmp_path / "local.yaml"
    config.write_text(yaml.safe_dump({"out": str(out)}))
    job = ["--", "distill", *DEMO, "--config", str(config), *POOLS]
    first = cluster.submit("--no-wait", *job)
    assert first.returncode == 0, first.stderr
    name = re.search(r"submitted job (\S+)", first.stderr)[1]
    wait_for_shard(out)
    second = cluster.submit(*job)
    assert second.returncode == 2
    assert f"job {name} already works on {out}" in second.stderr
    seen = pds_ray("status", str(out), "--json")
    assert json.loads(seen.stdout)["state"] == "running"
    began = time.monotonic()
    cluster.call("ray", "job", "stop", "--address", cluster.address, name)
    assert time.monotonic() - began < 30
    seen = pds_ray("status", str(out), "--json")
    assert (seen.returncode, json.loads(seen.stdout)["state"]) == (2, "interrupted")
    committed = {path: path.stat().st_mtime_ns for path in out.glob("embeddings/scenes-*.json")}

    again = cluster.submit(*job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.rstrip().endswith("pds-ray: distill done")
    assert "24 pairs" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in committed} == committed, (
        "committed shards were done again"
    )
    mine, reference = content(out), content(finished[0])
    assert mine.keys() == reference.keys()
    assert [name for name in reference if mine[name] != reference[name]] == []
    assert json.loads(pds_ray("status", str(out), "--json").stdout)["state"] == "finished"

    actors = cluster.actors()
    assert actors["MapWorker(MapBatches(EmbedWorker))"] == {cluster.node("encoder")}
    assert actors["MapWorker(MapBatches(SynthesizeWorker))"] == {cluster.node("painter")}


def test_stages_as_jobs_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- python jobs/X.py`: one stage, the others, what is too early, what is wrong."""
    out = tmp_path / "run"
    small = [
        "--preset",
        "demo",
        "--source",
        "scenes:60",
        "--pairs",
        "4",
        "--decode.steps",
        "1",
        "--out",
        str(out),
    ]

    def job(script: str, *args: str) -> subprocess.CompletedProcess:
        ignored = {"excludes": [".git", ".venv", "docs", "tests", "benchmarks", "runs"]}
        return cluster.call(
            "ray", "job", "submit", "--address", cluster.address, "--working-dir", ".",
            "--runtime-env-json", json.dumps(ignored), "--", "python", script, *args,
        )  # fmt: skip

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


def test_prometheus_sees_what_is_documented(cluster: Cluster, tmp_path: Path) -> None:
    """Every counter that a run with bad samples moves (no shard fails), by the figures of its run.json."""
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
    deadline = time.monotonic() + 60
    while "ray_pds_ray_pictures_decoded_total" not in seen and time.monotonic() < deadline:
        time.sleep(2)
        seen.clear()
        with urllib.request.urlopen(cluster.metrics, timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                served.add(re.split(r"[{ ]", line)[0])
                if line.startswith("ray_pds_ray") and f'run="{out}"' in line:
                    reason = "".join(re.findall(r'reason="(\w+)"', line))
                    name, value = line.partition("{")[0] + reason, float(line.rpartition(" ")[2])
                    seen[name] = seen.get(name, 0.0) + value
    counts = {
        name: entry["counts"]
        for name, entry in json.loads((out / "run.json").read_text())["stages"].items()
    }
    embed, decode = counts["embed"], counts["decode"]
    assert (embed["images"], embed["bad"], embed["failed_shards"], decode["made"]) == (30, 2, 0, 3)
    truth = {
        "ray_pds_ray_images_embedded_total": embed["images"],
        "ray_pds_ray_pairs_embedded_total": embed["pairs"],
        **{
            f"ray_pds_ray_bad_samples_total{reason}": bad
            for reason, bad in embed["reasons"].items()
        },
        "ray_pds_ray_shards_committed_total": embed["shards"],
        "ray_pds_ray_pictures_decoded_total": decode["made"],
        "ray_pds_ray_actor_busy_seconds_total": embed["encoder_busy_s"] + decode["decoder_busy_s"],
        "ray_pds_ray_actor_idle_seconds_total": embed["encoder_idle_s"] + decode["decoder_idle_s"],
    }
    assert seen == pytest.approx(truth, abs=0.01)
    moved = {name.removeprefix("ray_").partition("_total")[0] + "_total" for name in seen}
    assert moved == COUNTERS.keys() - {"pds_ray_shards_failed_total"}
    assert {
        name for name in metrics_of(dashboard()) if not name.startswith("ray_pds_ray")
    } <= served


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "which command"),
        (
            ["--", "distill", "--source", "scenes:9", "--out", "runs/x"],
            "a path that all nodes have",
        ),
        (
            ["--", "distill", "--source", "shards/{0..9}.tar", "--out", "/x"],
            "source is 'shards/{0..9}.tar'",
        ),
        (
            ["--", "distill", "--source", "s3://KEY:SECRET@bucket/a.tar", "--out", "/x"],
            "credentials",
        ),
        (["--", "distil", "--out", "/x"], "invalid choice: 'distil'"),
        (
            ["--env", "HF_HUB_OFFLINE", "--", "distill", "--source", "scenes:9", "--out", "/x"],
            "NAME=VALUE",
        ),
        (
            [
                "--env",
                "A=1",
                "--env",
                "A=2",
                "--",
                "distill",
                "--source",
                "scenes:9",
                "--out",
                "/x",
            ],
            "each name once",
        ),
        (["--", "distill", "--source", "scenes:9", "--out", "/x"], "no Ray cluster takes jobs"),
    ],
)
def test_what_cannot_be_a_job_is_one_line(pds_ray: Run, args: list[str], why: str) -> None:
    done = pds_ray("submit", "--address", f"http://127.0.0.1:{free_port()}", *args)
    assert done.returncode == 2
    assert why in done.stderr
    assert "SECRET" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_the_token_no_job_is_taken(cluster: Cluster) -> None:
    stranger = {**cluster.env, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(
        command("submit", "--address", cluster.address, "--", "distill", "--source", "scenes:9", "--out", "/x"),
        capture_output=True, text=True, env=stranger, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert stranger["RAY_AUTH_TOKEN"] not in done.stderr
