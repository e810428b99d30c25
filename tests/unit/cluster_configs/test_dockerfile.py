"""The image: made of files that are sent to the builder, with one FAISS in it."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch

from tests.support.cluster_files import CLUSTERS, ROOT, pins

TEXT = (CLUSTERS / "docker" / "Dockerfile").read_text(encoding="utf-8")


def test_it_installs_by_the_extra_for_gpus() -> None:
    """Nothing beside the pins of constraints.txt, and no package that another one overwrites."""
    commands = re.findall(r"pip (\w+) (.+?)(?: \\)?$", TEXT, flags=re.MULTILINE)
    assert commands == [("install", "--no-cache-dir --constraint constraints.txt '.[gpu]'")]


def test_faiss_gets_cuda_12_beside_the_cuda_13_of_torch() -> None:
    """Wheels of CUDA 13 have no suffix, another folder and another soname."""
    cuda = {name for name in pins() if name.startswith("nvidia-")}
    assert {"nvidia-cuda-runtime-cu12", "nvidia-cublas-cu12", "nvidia-curand-cu12"} <= cuda
    assert all(name.endswith("-cu12") for name in cuda)
    assert pins()["torch"].startswith("2.15."), (
        "does this torch still bring CUDA 13? see cluster_configs/README.md"
    )


def test_a_process_that_clusters_imports_no_torch() -> None:
    """So that the process of a k-means holds one CUDA only."""
    code = "import pds_ray.distributed.cluster, faiss, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_builder_is_sent_the_files_that_are_copied_and_no_data() -> None:
    rules = (CLUSTERS / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert "*" in rules
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (.+)$", TEXT, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == kept
    assert [name for name in copied if not (ROOT / name).exists()] == []
    private = ("runs*", "data*", ".git*", "*.env", "tests*")
    assert not any(fnmatch(name, pattern) for name in kept for pattern in private)
