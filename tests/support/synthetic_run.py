"""A finished run folder made of numbers and small images without models or Ray; its evaluations."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pds_ray.config import MatchConfig, RunConfig, to_dict
from pds_ray.methods.pds import PDS_CARD
from pds_ray.methods.selection import SELECTION_CARD
from pds_ray.stages import assign, match
from pds_ray.stages.materialize import write_distilled
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import embeddings, prototype_schema, vector_array
from pds_ray.store.storage import Folder
from tests.support.synthetic_store import Gathered, make_store

RECALLS = ("tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10", "r_mean")
HOSTILE = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=2'>",
    "</script><script>window.hacked=3</script>",
    "{{7*7}} ${7*7} %{y} $\\frac{1}{2}$",
    "right to left \u202e override \u2066 isolate \u2028 line \u2029 paragraph",
    "w" * 400,
    "two thousand characters " + "a long caption " * 132,
    "<a href='https://example.org/'>link</a> &lt;b&gt; &amp;lt; <b>bold</b><br>next",
    "<!-- <script> -->]]> '\" ` \\u003c",
    "漢字 Zoë ☃ العربية 🙂",
]


@dataclass
class Made:
    """The parts of a run, as plain arrays in the order of shards."""

    path: Path
    data: Gathered
    kept: np.ndarray
    image_cluster: np.ndarray
    text_cluster: np.ndarray
    image_prototypes: np.ndarray
    captions: list[str]
    images: np.ndarray
    image_keys: list[str]


def small_image(seed: int, side: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def make_run(
    path: Path,
    pairs: int = 6,
    rows: tuple[int, ...] = (40, 25, 30),
    captions: list[str] | None = None,
    side: int = 24,
) -> Made:
    """Writes a run of `pairs` pairs over shards of `rows` images. The given captions come first."""
    run = RunFolder(Folder(str(path)))
    store, data = make_store(path / "embeddings", list(rows))
    _with_fingerprint(store, data.shards)
    rng = np.random.default_rng(1)
    count = len(data.captions)
    kept = rng.random(count) > 0.2
    image_cluster = np.where(kept, rng.integers(pairs, size=count), -1).astype(np.int32)
    noisy = rng.random(count) < 0.4
    text_cluster = np.where(noisy, rng.integers(pairs, size=count), (image_cluster + 1) % pairs)
    text_cluster = np.where(kept, text_cluster, -1).astype(np.int32)
    images, keys, start = [], [], 0
    for shard, size in zip(data.shards, rows, strict=True):
        table = store.images(shard)
        images.append(embeddings(table))
        keys += [(shard, key) for key in table.column("key").to_pylist()]
        here = store.captions(shard, ["key"]).num_rows
        part = slice(start, start + here)
        run.save_keep(shard, kept[part])
        run.save_labels(shard, image_cluster[part], text_cluster[part])
        _tar(
            path.parent / f"{path.name}-source" / f"{shard}.tar",
            [f"{name}" for _, name in keys[-size:]],
        )
        start += here
    matrix = np.concatenate(images)
    table = match.table_of([match.count_pairs(image_cluster, text_cluster, pairs)], pairs)
    text_of, shared = assign.assign_clusters(table)
    cosines = match.matched_cosines(image_cluster, text_cluster, data.similarity, text_of)
    columns = match.matched_clusters(text_of, shared, cosines, pairs, MatchConfig())
    run.save_couples(pa.table(columns))
    prototypes = (
        matrix[rng.integers(len(matrix), size=pairs)] + rng.normal(size=(pairs, 8))
    ).astype(np.float32)
    texts = [
        *(captions or []),
        *(f"caption number {number * 7919 % 1009}" for number in range(pairs)),
    ][:pairs]
    shared = np.resize(columns["shared"], pairs)
    run.save_prototypes(_prototypes(prototypes, texts, shared))
    for pair in range(pairs):
        buffer = io.BytesIO()
        small_image(pair, side).save(buffer, "PNG")
        run.images.write_bytes(run.image_name(pair), buffer.getvalue())
    uri = str(path.parent / f"{path.name}-source" / "*.tar")
    about = {
        "source": uri,
        "encoder": "toy",
        "decoder": "toy",
        "picture_origin": "synthetic",
        "counts": {},
    }
    write_distilled(run, {**about, "method": "pds", "config": {}}, PDS_CARD)
    shared_pairs = int(columns["shared"].sum())
    counts = {
        "embed": {
            "images": len(matrix),
            "pairs": count,
            "bad": 0,
            "reasons": {},
            "timed": len(matrix),
        },
        "prune": {"pairs": count, "kept": int(kept.sum()), "dropped": int((~kept).sum())},
        "cluster": {},
        "match": {
            "clusters": pairs,
            "couples": pairs,
            "pairless": int((columns["shared"] == 0).sum()),
            "pairless_policy": "kept",
            "shared_pairs": shared_pairs,
            "pairs_not_shared": int(kept.sum()) - shared_pairs,
        },
        "prototypes": {"prototypes": pairs},
        "decode": {"images": pairs, "made": pairs},
        "materialize": {"pairs": pairs},
    }
    stages = {
        name: {
            "status": "done",
            "fingerprint": "store",
            "seconds": 1.5,
            "sitting_s": 1.5,
            "counts": entry,
        }
        for name, entry in counts.items()
    }
    config = to_dict(RunConfig(source=uri, out=str(path), pairs=pairs))
    manifest = {
        "stages": stages,
        "config": config,
        "encoder": "toy",
        "notes": [],
        "finished": 1.7e9,
    }
    run.folder.write_json(
        "run.json", {**manifest, "versions": {"python": "3.11"}, "ray": {"num_cpus": 2}}
    )
    return Made(
        path,
        data,
        kept,
        image_cluster,
        text_cluster,
        prototypes,
        texts,
        matrix,
        [k for _, k in keys],
    )


def choose_instead(path: Path, method: str) -> None:
    """Turns a run into one of a selection, whose rows hold the chosen pair itself."""
    run = RunFolder(Folder(str(path)))
    table = run.prototypes()
    count = table.num_rows
    for name, value in {
        "image_cluster": -1,
        "text_cluster": -1,
        "shared": 1,
        "members": ["00000/k0"],
    }.items():
        field = table.schema.field(name)
        column = pa.array([value] * count, field.type)
        table = table.set_column(table.schema.get_field_index(name), field, column)
    run.save_prototypes(table)
    manifest = run.folder.read_json(RunFolder.MANIFEST)
    about = {
        "source": manifest["config"]["source"],
        "method": method,
        "selection": f"{method}: as it does",
        "encoder": "toy",
        "decoder": "nearest",
        "picture_origin": "real images of the source",
        "counts": {},
        "config": {"pairs": count},
    }
    write_distilled(run, about, SELECTION_CARD)
    stages = manifest["stages"]
    manifest["stages"] = {name: stages[name] for name in ("embed", "decode", "materialize")}
    manifest["config"]["method"] = method
    run.folder.write_json(RunFolder.MANIFEST, manifest)


def _with_fingerprint(store: EmbeddingStore, shards: list[str]) -> None:
    for shard in shards:
        name = f"{shard}.json"
        store.folder.write_json(name, {**store.folder.read_json(name), "fingerprint": "store"})


def _tar(path: Path, keys: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, key in enumerate(keys):
            buffer = io.BytesIO()
            small_image(1_000 + number, 32).save(buffer, "PNG")
            for suffix, data in (("png", buffer.getvalue()), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _prototypes(image: np.ndarray, captions: list[str], shared: np.ndarray) -> pa.Table:
    count, dim = image.shape
    numbers = np.arange(count)
    return pa.table(
        {
            "pair": numbers.astype(np.int32),
            "image_prototype": vector_array(image),
            "text_prototype": vector_array(image[::-1]),
            "cosine": np.linspace(0.9, 0.1, count),
            "image_cluster": numbers.astype(np.int32),
            "text_cluster": numbers[::-1].astype(np.int32),
            "shared": shared.astype(np.int64),
            "member_norm": np.ones(count),
            "caption": captions,
            "caption_shard": ["00000"] * count,
            "caption_key": ["k0"] * count,
            "caption_cosine": np.ones(count, np.float32),
            "nearest_shard": ["00000"] * count,
            "nearest_key": ["k0"] * count,
            "nearest_cosine": np.ones(count, np.float32),
            "members": [["00000/k0", "00000/k0", "00000/k1"]] * count,
        },
        schema=prototype_schema(dim),
    )


def recalls(base: float) -> dict[str, float]:
    return {name: base + step for step, name in enumerate(RECALLS)}


def add_evaluation(
    run: Path, name: str = "standard", backbones: tuple[str, ...] = ("nfnet", "vit")
) -> None:
    """An evaluation of a run by two models, three trials each."""
    entries = [
        {
            "name": backbone,
            "trials": [
                {"seed": s, "epoch": 3, "recalls": recalls(10 + s), "seconds": 2.0}
                for s in range(3)
            ],
            "mean": recalls(11 + number),
            "std": dict.fromkeys(RECALLS, 0.8),
        }
        for number, backbone in enumerate(backbones)
    ]
    value = {
        "schema": 1,
        "set": {"path": str(run), "method": "pds", "pairs": 6},
        "protocol": {"name": "standard"},
        "test": {"source": "toy", "images": 100, "captions": 500},
        "val": None,
        "backbones": entries,
        "mean": recalls(11.5),
        "std": dict.fromkeys(RECALLS, 0.8),
        "notes": ["made up"],
    }
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(value))


def add_comparison(
    folder: Path,
    sets: dict[tuple[str, int], str],
    backbones: tuple[str, ...] = ("nfnet", "vit"),
    pair_bytes: int = 0,
    budgets: bool = False,
) -> None:
    """comparison.json over the sets given as (method, pairs) -> path.

    Each pair has so many bytes; 0 is as an earlier version, which did not count them. With
    `budgets` each set was made to the next full kilobyte.
    """

    def counts(pairs: int) -> dict[str, float]:
        size = pairs * pair_bytes
        counted = {"bytes": size, "pixels": pairs * 100, "pixels_per_epoch": pairs * 4096.0}
        return (counted if size else {}) | ({"budget": -(-size // 1000) * 1000} if budgets else {})

    cells = [
        {
            "method": method,
            "pairs": pairs,
            "backbone": backbone,
            "mean": recalls(5 + number + pairs / 100),
            "std": dict.fromkeys(RECALLS, 0.5),
            "trials": 3,
            "set": path,
            **counts(pairs),
        }
        for number, ((method, pairs), path) in enumerate(sets.items())
        for backbone in (*backbones, "average")
    ]
    test = {"source": "toy", "images": 100, "captions": 500}
    value = {
        "schema": 1,
        "source": "toy",
        "test": test,
        "protocol": {"name": "standard"},
        "seeds": 3,
        "cells": cells,
    }
    (folder / "comparison.json").write_text(json.dumps({**value, "notes": []}))
