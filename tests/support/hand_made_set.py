"""Distilled sets written by hand after the layout, without the package's own writer."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save


def save_set(
    folder: Path,
    images: list[Image.Image],
    captions: list[str],
    text: np.ndarray,
    **about: object,
) -> Path:
    """Writes a set of given images, captions and text prototypes; `about` goes to its manifest."""
    png = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        png.append(stream.getvalue())
    rows = [
        {"file_name": f"{pair:06d}.png", "pair": pair, **({"text": caption} if caption else {})}
        for pair, caption in enumerate(captions)
    ]
    content = {
        **{f"imagefolder/{pair:06d}.png": data for pair, data in enumerate(png)},
        "imagefolder/metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "prototypes.safetensors": save(
            {
                "image_prototypes": np.ones_like(text, np.float32),
                "text_prototypes": text.astype(np.float32),
            }
        ),
    }
    (folder / "imagefolder").mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content.items()
    }
    manifest = {"schema": 1, "pairs": len(captions), "about": about, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def scenes_set(folder: Path, pairs: int = 12, seed: int = 0, captions: bool = True) -> Path:
    """Writes a set of scenes with their first captions and random prototypes of the demo CLIP."""
    from pds_ray.config import EmbedConfig
    from pds_ray.encoders.open_clip import describe
    from pds_ray.sources.scenes import ScenesSource

    encoder = describe(EmbedConfig(encoder="demo").encoder)
    source = ScenesSource(f"scenes:{pairs}:{seed}")
    samples = [sample for shard in source.shards() for sample in source.read(shard)]
    text = np.random.default_rng(seed).normal(size=(pairs, encoder.dim))
    return save_set(
        folder,
        [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples],
        [sample.captions[0] if captions else "" for sample in samples],
        text,
        encoder="demo",
        space=encoder.space,
        source=source.uri,
    )
