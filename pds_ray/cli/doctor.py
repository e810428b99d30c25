"""Check of this machine: what a run needs of it, of its packages and of its weights."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from pds_ray.distributed import limits, places
from pds_ray.errors import ConfigError
from pds_ray.stages.cluster import FAISS_ADVICE
from pds_ray.store.manifest import versions

OK, LOW, MISSING, LATER = "ok", "LOW", "MISSING", "not yet"
GIB = 2**30
_TRUE = ("1", "ON", "YES", "TRUE")
"""Values of a variable that the hub's client takes for yes."""
ENOUGH_DISK, ENOUGH_SHARED = 5 * GIB, GIB
ENOUGH_FILES = 4096
"""Open files below which Ray itself warns."""
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
    _job()
    complete = _places()
    _terminal()
    if not _packages():
        return False
    _accelerators()
    return _models() and complete


def say(state: str, topic: str, text: str) -> None:
    print(f"{state:<7} {topic:<12} {text}")


def _job() -> None:
    """Report what this job may use, and the machine where it has more."""
    of = limits.of_job_and_machine()
    job, machine = of["job"], of["machine"]
    cpus = f"{job['cpus']}"
    if job["cpus"] < machine["cpus"]:
        cpus += f" for this job, of {machine['cpus']} of the machine"
    memory = f"{limits.free_memory_bytes() / GIB:.1f} of {job['memory_bytes'] / GIB:.1f} GiB free"
    if job["memory_bytes"] < machine["memory_bytes"]:
        memory += f" for this job; the machine has {machine['memory_bytes'] / GIB:.1f}"
    say(OK, "cpus", cpus)
    say(OK, "memory", memory)


def _places() -> bool:
    """Report the folders that a run writes to; return False if Ray has none."""
    _space("disk", ".", "here")
    try:
        folders = places.ray_folders()
    except ConfigError as error:
        say(MISSING, "ray's files", str(error))
        return False
    if folders.note:
        say(LOW, "ray's files", folders.note)
    spilled = folders.spilled or folders.sockets
    _space("ray's files", spilled, f"in {spilled}, for objects that memory does not hold")
    if Path("/dev/shm").is_dir():
        _space("shared mem", "/dev/shm", "in /dev/shm (Ray's object store)", ENOUGH_SHARED)
    home = os.path.expanduser("~")
    for topic, folder, advice in (
        ("home", home, "set HOME to one that can be, or HF_HOME for models from the hub"),
        ("cache", str(_cache()), "set HF_HOME to one that can be, for models from the hub"),
    ):
        closed = places.why_closed(folder)
        say(LOW if closed else OK, topic, f"{folder} {closed}; {advice}" if closed else folder)
    return True


def _space(topic: str, folder: str, where: str, enough: int = ENOUGH_DISK) -> None:
    """Report the free space of the disk that a folder is on, or will be."""
    free = shutil.disk_usage(places.existing(folder)).free
    say(OK if free > enough else LOW, topic, f"{free / GIB:.1f} GiB free {where}")


def _terminal() -> None:
    """Report limits of what this process prints and opens."""
    encoding = sys.stdout.encoding or "none"
    if encoding.lower().replace("-", "") == "utf8":
        say(OK, "characters", encoding)
    else:
        text = f"{encoding}: others are printed as escapes; set LC_ALL=C.UTF-8 to see them"
        say(LOW, "characters", text)
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else soft
    good = most >= ENOUGH_FILES or hard == resource.RLIM_INFINITY
    advice = "" if good else f"; Ray needs {ENOUGH_FILES}: raise `ulimit -Hn`"
    say(OK if good else LOW, "open files", f"{soft} at once, which Ray may raise to {most}{advice}")


def _packages() -> bool:
    """Report packages that are missing, or the versions of all; return False if any is."""
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    for module in missing:
        advice = FAISS_ADVICE if module == "faiss" else "pip install pds-ray brings it"
        say(MISSING, module, advice)
    found = versions()
    if not missing:
        say(OK, "versions", ", ".join(f"{name} {version}" for name, version in found.items()))
    if {"faiss-cpu", "faiss-gpu"} <= found.keys():
        text = "faiss-cpu and faiss-gpu overwrite each other: pip uninstall both, then install one"
        say(LOW, "faiss", text)
    return not missing


def _accelerators() -> None:
    import torch

    if not torch.cuda.is_available():
        say(OK, "gpu", "none: everything runs on the CPU")
        return
    import faiss

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = f"{len(names)}: {', '.join(sorted(set(names)))}"
    say(OK, "gpu", f"{kinds}; torch built for CUDA {torch.version.cuda}")
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    text = f"{gpus} GPUs" if gpus else "not in this FAISS: k-means runs on the CPU (pds-ray[gpu])"
    say(OK if gpus else LOW, "faiss gpu", text)


def _cache() -> Path:
    """Return the folder in which the hub's client keeps models."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(caches, "huggingface"))
    cache = os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))
    return Path(os.path.expandvars(cache)).expanduser()


def _models() -> bool:
    """Report built-in models and cached weights; return False if a built-in model is missing."""
    from pds_ray.config import DecodeConfig
    from pds_ray.decoders import unclip
    from pds_ray.encoders import open_clip

    try:
        info = open_clip.describe("demo")
        say(OK, "demo models", f"encoder of width {info.dim} in {open_clip.demo_folder()}")
        unclip.describe(DecodeConfig(model="demo"), info)
        say(OK, "demo models", f"decoder in {unclip.demo_folder()}")
        demo = True
    except ConfigError as error:
        say(MISSING, "demo models", str(error))
        demo = False
    cache, offline = _cache(), os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
    at_first_use = (
        "not fetched: HF_HUB_OFFLINE is set" if offline else "fetched from the hub at first use"
    )
    for repository in sorted(
        {*unclip.DEFAULT_MODELS.values(), "timm/vit_large_patch14_clip_224.openai"}
    ):
        there = (cache / f"models--{repository.replace('/', '--')}").is_dir()
        where = f"in {cache}" if there else at_first_use
        say(OK if there else LATER, "weights", f"{repository}: {where}")
    return demo
