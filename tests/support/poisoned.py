"""A tar of small good pictures, some of them marked as poison for tests/poison/sitecustomize.py."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

HOOK = Path(__file__).with_name("poison")


def write_shard(path: Path, poison: dict[int, str], samples: int = 40, seed: int = 0) -> None:
    """`samples` pictures with a caption each; `poison`: sample -> crash, hang or eat."""
    random = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for sample in range(samples):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (48, 40, 3), np.uint8)).save(buffer, "PNG")
            mark = f"POISON:{poison[sample]}".encode() if sample in poison else b""
            caption = f"picture {sample} of {path.stem}".encode()
            for suffix, data in (("png", buffer.getvalue() + mark), ("txt", caption)):
                member = tarfile.TarInfo(f"{sample:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
