"""The share of the machine that this job may use: CPUs and memory. No Ray here.

Affinity (taskset, Slurm) limits CPUs; control groups (containers, Kubernetes, Slurm, systemd) limit
CPUs and memory. Ray itself knows neither affinity nor any group but the outermost that it sees,
and takes half a CPU for none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ControlGroups:
    """The places where the kernel shows the control groups of this process, version 1 or 2."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def around(self, controller: str) -> Iterator[Path]:
        """Yield the folders of a controller's groups: that of this process, then those around it.

        In a container some are not visible; the outermost that is stands at the root.
        """
        for line in (_read(self.membership) or "").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2; beside version 1 it is in a folder of its own
                tops = [self.root, self.root / "unified"]
            elif controller in controllers.split(","):
                tops = [self.root / controller, self.root / controllers]
            else:
                continue
            inner = Path(*(part for part in Path(path).parts if part not in ("/", "..")))
            for top in dict.fromkeys(tops):
                yield from (top / group for group in (inner, *inner.parents))


OWN = ControlGroups()


def cpus(groups: ControlGroups = OWN) -> int:
    """Return the CPUs of the job: those of its affinity, or fewer by quota; a part counts as one.

    Of more than one, a part does not count.
    """
    quotas = [quota for folder in groups.around("cpu") for quota in _cpu_quotas(folder)]
    return max(1, int(min([_affinity(), *quotas])))


def memory_bytes(groups: ControlGroups = OWN) -> int:
    """Return the memory of the job: that of the machine, or less by the limit of a group."""
    limits = [limit for limit, _ in _memory_limits(groups)]
    return min([psutil.virtual_memory().total, *limits])


def free_memory_bytes(groups: ControlGroups = OWN) -> int:
    """Return the memory that the job can still take; what caches files counts as free."""
    free = [limit - used for limit, used in _memory_limits(groups)]
    return max(0, min([psutil.virtual_memory().available, *free]))


def of_job_and_machine() -> dict[str, dict[str, int]]:
    """Return CPUs and memory of this job, and of its machine, for run.json."""
    machine = {"cpus": os.cpu_count() or 1, "memory_bytes": psutil.virtual_memory().total}
    return {"job": {"cpus": cpus(), "memory_bytes": memory_bytes()}, "machine": machine}


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quotas(folder: Path) -> Iterator[float]:
    """Yield the CPUs that a group may use at a time, if it has a quota."""
    quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
    for spent, per in (
        (_number(quota), _number(period)),
        (_count(folder / "cpu.cfs_quota_us"), _count(folder / "cpu.cfs_period_us")),
    ):
        if spent and per and spent > 0:  # -1: no quota
            yield spent / per


def _memory_limits(groups: ControlGroups) -> Iterator[tuple[int, int]]:
    """Yield limit and use of each group around this process that has a limit, in bytes.

    Version 1 shows a limit for all, of exabytes where there is none.
    """
    for folder in groups.around("memory"):
        for limit, used, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            most = _count(folder / limit)
            if most is not None:
                yield most, max(0, (_count(folder / used) or 0) - _cached(folder, prefix))


def _cached(folder: Path, prefix: str) -> int:
    """Return the bytes of a group that cache files, which the kernel takes back when it must."""
    lines = (_read(folder / "memory.stat") or "").splitlines()
    figures = dict(line.split(" ", 1) for line in lines if " " in line)
    kinds = (f"{prefix}{kind}_file" for kind in ("active", "inactive"))
    return sum(_number(figures.get(kind, "")) or 0 for kind in kinds)


def _count(path: Path) -> int | None:
    return _number(_read(path) or "")


def _number(text: str) -> int | None:
    """Return a whole number; None for anything else, such as "max"."""
    try:
        return int(text)
    except ValueError:
        return None


def _read(path: Path) -> str | None:
    """Return what a file of the kernel says, None if this process may not know."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None
