"""Check of this machine: hardware, packages and weights that a run needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pds_ray.store.manifest import versions

Say = Callable[[bool, str, str], None]
NEEDED = (
    "ray",
    "torch",
    "open_clip",
    "diffusers",
    "transformers",
    "faiss",
    "scipy",
    "pyarrow",
    "webdataset",
)


def examine() -> bool:
    """Print one line per finding; return False if something that a run needs is missing."""
    complete = True

    def say(good: bool, topic: str, text: str) -> None:
        print(f"{'ok     ' if good else 'MISSING'} {topic:<12} {text}")

    import psutil

    memory = psutil.virtual_memory()
    say(True, "cpus", f"{os.cpu_count()}")
    say(True, "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    disk = shutil.disk_usage(".")
    say(disk.free > 5 * 2**30, "disk", f"{disk.free / 2**30:.0f} GiB free here")
    shm = Path("/dev/shm")
    if shm.exists():
        free = shutil.disk_usage(shm).free / 2**30
        say(free > 1, "shared mem", f"{free:.1f} GiB free in /dev/shm (Ray's object store)")
    for module in NEEDED:
        found = importlib.util.find_spec(module) is not None
        complete &= found
        if not found:
            say(False, module, "pip install pds-ray brings it")
    if not complete:
        return False
    say(True, "versions", ", ".join(f"{name} {version}" for name, version in versions().items()))
    _accelerators(say)
    complete &= _models(say)
    return complete


def _accelerators(say: Say) -> None:
    import torch

    if torch.cuda.is_available():
        import faiss

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        kinds = f"{len(names)}: {', '.join(sorted(set(names)))}"
        say(True, "gpu", f"{kinds}; torch built for CUDA {torch.version.cuda}")

        gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
        say(
            gpus > 0,
            "faiss gpu",
            f"{gpus} GPUs" if gpus else "faiss-cpu is installed: k-means runs on the CPU",
        )
    else:
        say(True, "gpu", "none: everything runs on the CPU")


def _models(say: Say) -> bool:
    """Report built-in models and cached weights; return False if a built-in model is missing."""
    from pds_ray.config import ConfigError, DecodeConfig
    from pds_ray.decoders import unclip
    from pds_ray.encoders import open_clip

    try:
        info = open_clip.describe("demo")
        say(True, "demo models", f"encoder of width {info.dim} in {open_clip.demo_folder()}")
        unclip.describe(DecodeConfig(model="demo"), info)
        say(True, "demo models", f"decoder in {unclip.demo_folder()}")
        demo = True
    except ConfigError as error:
        say(False, "demo models", str(error))
        demo = False
    cache = Path(
        os.environ.get(
            "HF_HUB_CACHE", Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
        )
    )
    cache = cache.expanduser()
    for repository in sorted(
        {*unclip.DEFAULT_MODELS.values(), "timm/vit_large_patch14_clip_224.openai"}
    ):
        there = (cache / f"models--{repository.replace('/', '--')}").is_dir()
        print(
            f"{'ok     ' if there else 'not yet'} {'weights':<12} {repository}: "
            + (f"in {cache}" if there else "fetched from the hub at first use")
        )
    return demo
