"""Limits of a job, against trees of control groups as the kernel shows them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from pds_ray.distributed import limits
from pds_ray.distributed.limits import ControlGroups

MIB = 2**20
NO_LIMIT = "9223372036854771712"  # what version 1 shows without a limit


def tree(folder: Path, membership: str, files: dict[str, str]) -> ControlGroups:
    """Write files as the kernel shows them, and return the place."""
    (folder / "cgroup").write_text(membership)
    for name, text in files.items():
        (folder / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fs" / name).write_text(text + "\n")
    return ControlGroups(folder / "fs", folder / "cgroup")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 CPUs and 1,024 MiB, of which 900 are free."""
    memory = psutil.virtual_memory()._replace(total=1024 * MIB, available=900 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


V2, V1 = "0::/job\n", "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        (V2, {}, 16),
        (V2, {"job/cpu.max": "max 100000"}, 16),
        (V2, {"job/cpu.max": "400000 100000"}, 4),
        (V2, {"job/cpu.max": "50000 100000"}, 1),
        (V2, {"job/cpu.max": "250000 100000"}, 2),
        (V2, {"job/cpu.max": "3200000 100000"}, 16),
        # a step of a Slurm job: the limit is that of the job around it
        ("0::/job/step_0/user\n", {"job/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2),
        ("0::/job/in\n", {"job/cpu.max": "200000 100000", "job/in/cpu.max": "900000 100000"}, 2),
        # a container with the machine's path: its own group is at the root
        ("0::/kubepods/pod7/c\n", {"cpu.max": "300000 100000"}, 3),
        ("0::/../../other\n", {"cpu.max": "300000 100000"}, 3),
        (V1, {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 16),
        (V1, {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 1),
        (
            V1,
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "600000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        # both versions side by side, the controllers in the second
        ("1:name=systemd:/x\n0::/job\n", {"unified/job/cpu.max": "200000 100000"}, 2),
        (V2, {"job/cpu.max": "nonsense"}, 16),
        (V2, {"job/cpu.max": "0 0"}, 16),
        ("", {"cpu.max": "100000 100000"}, 16),
    ],
)
@pytest.mark.usefixtures("machine")
def test_cpus(tmp_path: Path, membership: str, files: dict[str, str], cpus: int) -> None:
    assert limits.cpus(tree(tmp_path, membership, files)) == cpus


@pytest.mark.parametrize(
    ("membership", "files", "whole", "free"),
    [
        (V2, {}, 1024, 900),
        (V2, {"job/memory.max": "max", "job/memory.current": f"{100 * MIB}"}, 1024, 900),
        (V2, {"job/memory.max": f"{512 * MIB}", "job/memory.current": f"{500 * MIB}"}, 512, 12),
        (
            V2,
            {
                "job/memory.max": f"{512 * MIB}",
                "job/memory.current": f"{500 * MIB}",
                "job/memory.stat": f"anon 1\ninactive_file {300 * MIB}\nactive_file {9 * MIB}",
            },
            512,
            321,
        ),
        (V2, {"job/memory.max": f"{2000 * MIB}", "job/memory.current": "0"}, 1024, 900),
        (V2, {"job/memory.max": f"{64 * MIB}", "job/memory.current": f"{65 * MIB}"}, 64, 0),
        # the group around has less room than the own one
        (
            "0::/job/step\n",
            {
                "job/memory.max": f"{400 * MIB}",
                "job/memory.current": f"{390 * MIB}",
                "job/step/memory.max": f"{200 * MIB}",
                "job/step/memory.current": f"{50 * MIB}",
            },
            200,
            10,
        ),
        (V1, {"memory/job/memory.limit_in_bytes": NO_LIMIT}, 1024, 900),
        (
            V1,
            {
                "memory/job/memory.limit_in_bytes": f"{256 * MIB}",
                "memory/job/memory.usage_in_bytes": f"{200 * MIB}",
                "memory/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {100 * MIB}",
            },
            256,
            156,
        ),
    ],
)
@pytest.mark.usefixtures("machine")
def test_memory(
    tmp_path: Path, membership: str, files: dict[str, str], whole: int, free: int
) -> None:
    groups = tree(tmp_path, membership, files)
    assert limits.memory_bytes(groups) == whole * MIB
    assert limits.free_memory_bytes(groups) == free * MIB


@pytest.mark.usefixtures("machine")
def test_where_there_are_no_control_groups_the_machine_counts(tmp_path: Path) -> None:
    nowhere = ControlGroups(tmp_path / "a", tmp_path / "b")
    assert limits.cpus(nowhere) == 16
    assert limits.memory_bytes(nowhere) == 1024 * MIB


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # of this thread, as `taskset` does of a process
    try:
        assert limits.cpus() == 1
        assert limits.of_job_and_machine()["job"]["cpus"] == 1
        assert limits.of_job_and_machine()["machine"]["cpus"] == os.cpu_count()
    finally:
        os.sched_setaffinity(0, before)
