"""Distilled sets written by hand after the layout, without the package's own writer."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save


def save_set(
    folder: Path,
    images: list[Image.Image],
    captions: list[str],
    text: np.ndarray,
    learned: bytes = b"",
    **about: object,
) -> Path:
    """Writes a set of given images, captions and text prototypes; `about` goes to its manifest.

    `learned` is its file of learned parts, if it has one.
    """
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
        **({"learned.safetensors": learned} if learned else {}),
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


def learned_file(tensors: dict[str, np.ndarray], **changes: object) -> bytes:
    """Return a file of learned parts, for small_conv and the demo CLIP, with changed metadata."""
    about = {
        "distiller": "lors",
        "backbone": "small_conv",
        "backbone_identity": backbone().identity,
        "image_size": tensors["images"].shape[2],
        "mean": backbone().mean,
        "std": backbone().std,
        "text_encoder": "demo",
        "text_encoder_identity": demo_encoder().identity,
        "loss": "wbce",
        "train": "all",
        **changes,
    }
    return save(tensors, metadata={"learned": json.dumps(about)})


def learned_tensors(pairs: int, side: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Return learned parts whose similarity leaves 0 to 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "images": normal(pairs, 3, side, side),
        "text": normal(pairs, demo_encoder().dim),
        "similarity": np.eye(pairs, dtype=np.float32) * 1.2 + 0.3 * normal(pairs, pairs),
        "step_sizes": np.array([0.02, 0.3], np.float32),
    }


def backbone() -> Any:
    from pds_ray.backbones.small import describe

    return describe("small_conv")


def demo_encoder() -> Any:
    from pds_ray.config import EmbedConfig
    from pds_ray.encoders.open_clip import describe

    return describe(EmbedConfig(encoder="demo").encoder)


def scenes_set(
    folder: Path, pairs: int = 12, seed: int = 0, captions: bool = True, learned: bytes = b""
) -> Path:
    """Writes a set of scenes with their first captions and random prototypes of the demo CLIP.

    `learned` is its file of learned parts, if it has one.
    """
    from pds_ray.sources.scenes import ScenesSource

    encoder = demo_encoder()
    source = ScenesSource(f"scenes:{pairs}:{seed}")
    samples = [sample for shard in source.shards() for sample in source.read(shard)]
    text = np.random.default_rng(seed).normal(size=(pairs, encoder.dim))
    return save_set(
        folder,
        [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples],
        [sample.captions[0] if captions else "" for sample in samples],
        text,
        learned,
        encoder="demo",
        space=encoder.space,
        source=source.uri,
    )
