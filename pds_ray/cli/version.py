"""The facts for a bug report: versions, platform, limits. No values of variables, no paths."""

from __future__ import annotations

import locale
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pds_ray import __version__
from pds_ray.distributed import limits
from pds_ray.store.manifest import versions

GIB = 2**30
MORE_PACKAGES = (
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "datasets",
    "fsspec",
    "webdataset",
    "pip",
)
"""Packages that shape no results but have their part in bugs."""
VARIABLES = ("RAY_", "HF_", "AWS_", "CUDA_", "OMP_", "SLURM_", "KUBERNETES_", "PYTORCH_")
"""Beginnings of the names of environment variables that change what happens."""


def print_version(verbose: bool) -> None:
    """Print the version; if `verbose`, also all that a bug report needs, a line per topic."""
    print(f"pds-ray {__version__}")
    if not verbose:
        return
    for topic, text in (
        ("python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("platform", platform.platform()),
        ("characters", locale.getpreferredencoding(False)),
        ("packages", _packages()),
        ("gpu", _gpus()),
        ("limits", _limits()),
        ("variables", ", ".join(sorted(filter(_counts, os.environ))) or "none"),
    ):
        print(f"{topic:<12} {text}")


def _packages() -> str:
    found = versions()
    for shown_before in ("python", "pds-ray"):
        found.pop(shown_before, None)
    for package in MORE_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _gpus() -> str:
    """Return the GPUs as torch sees them; a torch that does not load is a finding too."""
    try:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names) or 'none'}; torch built for CUDA {torch.version.cuda}"
    except Exception as error:  # its text may hold paths
        return f"torch does not load ({type(error).__name__})"


def _limits() -> str:
    of = limits.of_job_and_machine()
    parts = [
        f"{name} {share['cpus']} CPUs and {share['memory_bytes'] / GIB:.1f} GiB"
        for name, share in of.items()
    ]
    if Path("/dev/shm").is_dir():
        parts.append(f"/dev/shm {shutil.disk_usage('/dev/shm').total / GIB:.1f} GiB")
    try:
        import resource
    except ImportError:  # Windows
        return ", ".join(parts)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ", ".join([*parts, f"open files {soft} to {hard}"])


def _counts(name: str) -> bool:
    return name.startswith(VARIABLES)
