"""Row 4: embedding with clip-retrieval, in an environment of its own.

    python -m venv runs/clip-retrieval
    runs/clip-retrieval/bin/pip install clip-retrieval
    runs/clip-retrieval/bin/pip install 'setuptools<70'

The last command, against torch's requirements, because its `clip` imports a part of older
setuptools. CLIP_RETRIEVAL_PYTHON may name another path of its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
from itertools import islice
from pathlib import Path

from benchmarks.data import real_samples, save_random_clip, write_shards
from benchmarks.measure import BASELINE, OURS, ROOT, Check, Found, Row, Runs, Task, factor
from benchmarks.rows.embedding import (
    apart,
    embed_with_engine,
    factor_with_reading,
    reading_seconds,
    stored,
)

PYTHON = Path(
    os.environ.get("CLIP_RETRIEVAL_PYTHON", ROOT / "runs" / "clip-retrieval" / "bin" / "python")
)
MODEL = "ViT-B-32"
SHARDS = 4
TOLERANCE = 5e-3  # of a unit vector: they normalise before they round to float16, we after


def lacking() -> str:
    there = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('clip_retrieval'))"
    if (
        PYTHON.exists()
        and subprocess.run([str(PYTHON), "-c", there], check=False, env=_environment()).returncode
        == 0
    ):
        return ""
    return f"clip-retrieval has no environment here; {__name__} says how to make one"


def _environment() -> dict[str, str]:
    """Return this environment without our packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _versions() -> dict[str, str]:
    """Return the versions of packages in its environment."""
    packages = ("clip-retrieval", "torch", "open-clip-torch", "webdataset")
    found = f"{{name: m.version(name) for name in {packages}}}"
    code = f"import importlib.metadata as m, json; print(json.dumps({found}))"
    command = [str(PYTHON), "-c", code]
    versions = subprocess.run(
        command, check=True, capture_output=True, text=True, env=_environment()
    ).stdout
    return dict(json.loads(versions))


def prepare(task: Task) -> Found:
    """Write real images with one caption each: clip-retrieval skips images with several."""
    one_caption = ({name: sample[name] for name in ("jpg", "txt")} for sample in real_samples())
    images = 48 if task.quick else 512
    write_shards(islice(one_caption, images), task.data / "shards", images // SHARDS)
    setup = {"model": save_random_clip(MODEL, task.data / "clip"), "images": images}
    (task.data / "setup.json").write_text(json.dumps(setup))
    return {}


def theirs(task: Task) -> Found:
    """Time by its own statistics: reading, inference and gathering of all batches."""
    setup = json.loads((task.data / "setup.json").read_text())
    out = task.out / "embeddings"
    options = {
        "input_dataset": f"{task.data}/shards/{{00000..{SHARDS - 1:05d}}}.tar",
        "output_folder": out,
        "input_format": "webdataset",
        "clip_model": f"open_clip:{MODEL}/{task.data}/clip/open_clip_model.safetensors",
        "num_prepro_workers": os.cpu_count() or 1,
        "use_jit": False,
    }
    command = [str(PYTHON), "-m", "clip_retrieval.cli", "inference"]
    subprocess.run(
        command + [f"--{name}={value}" for name, value in options.items()],
        check=True,
        env=_environment(),
        stdout=subprocess.DEVNULL,
    )
    stats = json.loads((out / "stats" / "0.json").read_text())
    if stats["sample_count"] != setup["images"]:
        raise RuntimeError(f"it embedded {stats['sample_count']} of {setup['images']} images")
    return {"seconds": stats["total_duration"], "stats": stats, "versions": _versions()}


def ours(task: Task) -> Found:
    model = json.loads((task.data / "setup.json").read_text())["model"]
    return embed_with_engine(f"{task.data}/shards/*.tar", model, task.out / "store")


def after(task: Task) -> Found:
    """Measure the largest distance of the two unit embeddings of a sample.

    Theirs come in another order, with their keys.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from pds_ray.stages.vectors import normalized
    from pds_ray.store.embeddings import EmbeddingStore
    from pds_ray.store.storage import Folder

    theirs_, mine = task.out / f"{BASELINE}-0" / "embeddings", task.out / f"{OURS}-0" / "store"
    store = EmbeddingStore(Folder(str(mine)))
    keys = [
        key for shard in sorted(store.committed()) for key in store.images(shard)["key"].to_pylist()
    ]
    their_keys = pq.read_table(theirs_ / "metadata" / "metadata_0.parquet")[
        "image_path"
    ].to_pylist()
    place = {key: row for row, key in enumerate(their_keys)}
    order = [place[key] for key in keys]
    found = {}
    for name, unit in zip(("img", "text"), map(normalized, stored(mine)), strict=True):
        other = np.load(theirs_ / f"{name}_emb" / f"{name}_emb_0.npy")
        found[name] = apart(unit, other[order].astype(np.float32))
    return {**found, "reading_s": reading_seconds(task)}


def checks(runs: Runs, afterwards: Found) -> list[Check]:
    far = max(afterwards["img"], afterwards["text"])
    packages = ", ".join(
        f"{name} {version}" for name, version in runs[BASELINE][0]["versions"].items()
    )
    reading = afterwards["reading_s"]
    least = factor_with_reading(runs, reading)
    return [
        Check(
            "1.5x faster, with all reading added to ours",
            f"{least:.2f}x ({reading:.1f} s for reading in one process)",
            least >= 1.5,
        ),
        Check("", f"{factor(runs):.2f}x without it", None),
        Check("", packages, None),
        Check("the same embeddings", f"{far:.0e} apart", far < TOLERANCE),
    ]


ROW = Row(
    4,
    "embedding 512 real images with a caption each, ViT-B-32 at 224 px",
    "clip-retrieval's inference, in an environment of its own",
    {BASELINE: theirs, OURS: ours},
    checks,
    prepare,
    after,
    "Theirs by its own statistics, with its own batch size, captions not cut: from when the model "
    "is loaded to when all is embedded, the last files not yet written. Ours from when the model "
    "is loaded to the end of the stage; it has read by then.",
    lacking,
)
