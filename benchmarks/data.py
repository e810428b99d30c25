"""Data of the rows: embeddings in clusters, images like Flickr30K's, models with random weights."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import SHARED_DATA

CONCEPTS, SPREAD = 2_000, 0.7
ROWS_AT_ONCE = 50_000
TEST = "scenes:1000:7"  # the test split for sets of the built-in world


class Concepts:
    """Concepts of skewed popularity, with vectors of about unit length around their centres."""

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self.rng = np.random.default_rng(seed)
        popularity = 1 / (np.arange(CONCEPTS) + 50)
        self.popularity = popularity / popularity.sum()
        self.centres = self._noise(CONCEPTS)

    def draw(self, rows: int) -> np.ndarray:
        """Draw the concepts of some vectors, int64 [rows]."""
        return self.rng.choice(CONCEPTS, rows, p=self.popularity)

    def vectors(self, concepts: np.ndarray) -> np.ndarray:
        """Return one vector per concept given, float32 [rows, dim]."""
        out = np.empty((len(concepts), self.dim), np.float32)
        for start in range(0, len(out), ROWS_AT_ONCE):
            some = concepts[start : start + ROWS_AT_ONCE]
            out[start : start + len(some)] = (
                self.centres[some] + SPREAD * self._noise(len(some))
            ) / np.hypot(1, SPREAD)
        return out

    def _noise(self, rows: int) -> np.ndarray:
        return self.rng.standard_normal((rows, self.dim), np.float32) / np.float32(
            np.sqrt(self.dim)
        )


def real_samples(split: str = "train") -> Iterator[dict[str, bytes]]:
    """Yield the samples of the real shards as {"jpg", "txt", "json"}, in order.

    Raises SystemExit if there are none.
    """
    shards = sorted((SHARED_DATA / "clipart").glob(f"{split}-*.tar"))
    if not shards:
        raise SystemExit(f"benchmarks: no real shards in {SHARED_DATA / 'clipart'}")
    for shard in shards:
        sample: dict[str, bytes] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                sample[member.name.rpartition(".")[2]] = file.read()
                if len(sample) == 3:
                    yield sample
                    sample = {}


def write_shards(samples: Iterable[Mapping[str, bytes]], folder: Path, per_shard: int) -> list[str]:
    """Write samples as WebDataset tars; return their paths."""
    folder.mkdir(parents=True)
    coming, paths = iter(samples), list[str]()
    while some := list(islice(coming, per_shard)):
        path = folder / f"{len(paths):05d}.tar"
        with tarfile.open(path, "w") as tar:
            for row, sample in enumerate(some):
                for suffix, data in sample.items():
                    member = tarfile.TarInfo(f"{len(paths):05d}{row:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        paths.append(str(path))
    return paths


def write_flickr(samples: Iterable[tuple[bytes, Iterable[str]]], root: Path) -> int:
    """Write encoded images and captions in the layout of Flickr30K's train split.

    There is one record per caption, as in the published annotation files. Returns the number of
    images.
    """
    (root / "flickr30k-images").mkdir(parents=True)
    records = []
    number = -1
    for number, (image, captions) in enumerate(samples):
        name = f"flickr30k-images/{number:07d}.jpg"
        (root / name).write_bytes(image)
        records += [{"image": name, "caption": caption, "image_id": name} for caption in captions]
    (root / "flickr30k_train.json").write_text(json.dumps(records))
    return number + 1


def flickr_shaped(images: int) -> Iterator[tuple[bytes, list[str]]]:
    """Yield real images at Flickr30K's size, 500 x 375, each with five captions of its test split.

    Images and captions do not belong together; nothing but their cost matters.
    """
    with gzip.open(SHARED_DATA / "annotations" / "flickr30k_test.json.gz") as file:
        captions = [record["caption"] for record in json.load(file)]
    for sample, five in islice(zip(real_samples(), captions, strict=False), images):
        encoded = io.BytesIO()
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        image.resize((500, 375), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
        yield encoded.getvalue(), five


def save_random_clip(model: str, folder: Path, seed: int = 0) -> str:
    """Save an open_clip architecture with random weights; return the encoder's name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    weights = open_clip.create_model(model).state_dict()
    folder.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        folder / "open_clip_model.safetensors",
    )
    config = {"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def write_set(folder: Path, prototypes: Any, images: list[Image.Image]) -> None:
    """Write a distilled set of the built-in world from rows of prototypes.parquet and images."""
    from pds_ray import catalog
    from pds_ray.config import EmbedConfig
    from pds_ray.methods.pds import PDS_CARD
    from pds_ray.stages.materialize import write_distilled
    from pds_ray.store.run_folder import RunFolder
    from pds_ray.store.storage import Folder

    run = RunFolder(Folder(str(folder)))
    run.save_prototypes(prototypes)
    for pair, image in enumerate(images):
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        run.images.write_bytes(run.image_name(pair), encoded.getvalue())
    encoder = catalog.describe_encoder(EmbedConfig(encoder="demo"))
    about = {
        "source": "",
        "method": "pds",
        "encoder": encoder.name,
        "space": encoder.space,
        "decoder": "",
    }
    unsaid = {"picture_origin": "", "counts": {}, "config": {}}
    write_distilled(run, {**about, **unsaid}, PDS_CARD)


def judge_sets(
    sets: Mapping[str, Path], folder: Path, quick: bool, backbones: str
) -> dict[str, dict[str, float]]:
    """Evaluate sets by the protocol `standard`; return mean and deviation of r_mean over seeds."""
    from pds_ray.config import replace
    from pds_ray.engine.evaluate import evaluate_all
    from pds_ray.recipes import protocol
    from pds_ray.stages.trial import Candidate
    from pds_ray.store.storage import Folder

    config = replace(protocol("standard"), {"test": TEST, "backbones": backbones})
    if quick:
        small = {"test": "scenes:20:7", "backbones": "small_conv", "seeds": 1, "protocol.epochs": 1}
        config = replace(config, small)
    candidates = [Candidate(label, str(path), config.protocol) for label, path in sets.items()]
    results = evaluate_all(candidates, config, Folder(str(folder)))
    return {
        label: {"r_mean": result["mean"]["r_mean"], "std": result["std"]["r_mean"]}
        for label, result in results.items()
    }
