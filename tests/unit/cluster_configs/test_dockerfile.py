"""The image: linted, made of files that are sent to the builder, and with one FAISS in it."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch

import pytest

from tests.support.cluster_files import CLUSTERS, ROOT, pins, tool

DOCKERFILE = CLUSTERS / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")


def complaints(text: str) -> str:
    """What hadolint has against a Dockerfile."""
    return subprocess.run(
        [tool("hadolint"), "-"], input=text, capture_output=True, text=True, check=False
    ).stdout


def test_the_dockerfile_is_clean() -> None:
    assert complaints(TEXT) == ""


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11.13-slim-bookworm", "python:latest", "DL3007"),
        ("FROM python:3.11.13-slim-bookworm", "FROM python", "DL3006"),
        ("pip install --no-cache-dir", "pip install", "DL3042"),
        ("WORKDIR /app", "RUN cd /app", "DL3003"),
        ("USER 1000", "USER root", "DL3002"),
        ("--constraint constraints.txt .", "pds-ray", "DL3013"),
        ("USER 1000", "USERS 1000", "missing whitespace"),
    ],
)
def test_broken_copies_are_found_out(old: str, new: str, rule: str) -> None:
    assert old in TEXT
    assert rule in complaints(TEXT.replace(old, new))


def versions(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\s+([\w-]+)==([\w.]+) \\$", text, flags=re.MULTILINE))


def test_one_faiss_of_the_version_that_was_tested_takes_the_place_of_the_other() -> None:
    assert versions(TEXT)["faiss-gpu"] == pins()["faiss-cpu"]
    installed, removed, added = (
        TEXT.index(step)
        for step in ("constraint constraints.txt .", "pip uninstall --yes faiss-cpu", "faiss-gpu==")
    )
    assert installed < removed < added


def test_faiss_gets_cuda_12_beside_the_cuda_13_of_torch() -> None:
    """Wheels of CUDA 13 carry no suffix and lie in another folder, under another soname."""
    cuda = {name: version for name, version in versions(TEXT).items() if name.startswith("nvidia-")}
    assert {"nvidia-cuda-runtime-cu12", "nvidia-cublas-cu12", "nvidia-curand-cu12"} <= cuda.keys()
    assert all(name.endswith("-cu12") for name in cuda)
    assert pins()["torch"].startswith("2.15."), (
        "does this torch still bring CUDA 13? see cluster_configs/README.md"
    )


def test_what_clusters_imports_no_torch() -> None:
    """So that the process of a k-means holds one CUDA only."""
    code = "import pds_ray.distributed.cluster, faiss, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import pds_ray.stages.embed, torch, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_the_builder_is_sent_what_is_copied() -> None:
    rules = (CLUSTERS / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert "*" in rules
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (.+)$", TEXT, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == kept
    assert {name for name in copied if not (ROOT / name).exists()} == set()


def test_no_data_is_sent_along() -> None:
    rules = (CLUSTERS / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert not any(
        fnmatch(name, pattern)
        for name in kept
        for pattern in ("runs*", "data*", ".git*", "*.env", "tests*")
    )
