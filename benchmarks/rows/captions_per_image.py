"""Row 5: five captions per image, as in Flickr30K."""

from __future__ import annotations

import json
import os
import time

import numpy as np

from benchmarks.data import flickr_shaped, save_random_clip, write_flickr
from benchmarks.measure import BASELINE, OURS, Check, Found, Row, Runs, Task, at_least
from benchmarks.rows.embedding import apart, embed_with_engine, stored

IMAGES = 32
TOLERANCE = 2e-3  # of the norm of an embedding stored in float16


def prepare(task: Task) -> Found:
    write_flickr(flickr_shaped(8 if task.quick else IMAGES), task.data / "flickr")
    model = save_random_clip("ViT-B-32" if task.quick else "ViT-L-14", task.data / "clip")
    (task.data / "model.json").write_text(json.dumps(model))
    return {}


def theirs(task: Task) -> Found:
    import open_clip

    from benchmarks.baselines import pds
    from pds_ray.modalities.text import clean_paper

    name = json.loads((task.data / "model.json").read_text())
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    paths, captions = pds.expand_pairs(task.data / "flickr")
    began = time.perf_counter()
    text = pds.embed_captions([clean_paper(caption) for caption in captions], model, tokenizer)
    captions_seconds = time.perf_counter() - began
    image = pds.embed_images(paths, model, preprocess, workers=os.cpu_count() or 1)
    seconds = time.perf_counter() - began
    np.savez(task.out / "embeddings.npz", image=image, text=text)
    return {"seconds": seconds, "captions_seconds": captions_seconds}


def ours(task: Task) -> Found:
    model = json.loads((task.data / "model.json").read_text())
    return embed_with_engine(
        f"flickr30k:{task.data}/flickr", model, task.out / "store", captions="paper"
    )


def after(task: Task) -> Found:
    images, captions = stored(task.out / f"{OURS}-0" / "store")
    with np.load(task.out / f"{BASELINE}-0" / "embeddings.npz") as other:
        copies = len(captions) // len(images)
        pairs = (np.repeat(images, copies, axis=0), other["image"]), (captions, other["text"])
        return {"apart": max(apart(mine, theirs_) for mine, theirs_ in pairs)}


def checks(runs: Runs, afterwards: Found) -> list[Check]:
    same = afterwards["apart"] < TOLERANCE
    return [
        at_least(runs, 4.5),
        Check("the same embeddings", f"{afterwards['apart']:.0e} apart", same),
    ]


ROW = Row(
    5,
    f"embedding {IMAGES} images of 500 x 375 with five captions each, ViT-L-14 at 224 px",
    "authors' procedure: an image is embedded once per caption",
    {BASELINE: theirs, OURS: ours},
    checks,
    prepare,
    after,
    "From when the model is loaded: theirs to when all is embedded, ours to the end of the stage, "
    "with all committed.",
)
