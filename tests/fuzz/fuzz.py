"""Coverage-guided fuzzing with atheris.

    python tests/fuzz/fuzz.py TARGET [FOLDER ...] [-max_total_time=S ...]

The folder keeps what reached new code, from one run to the next; the other options are libFuzzer's.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
with atheris.instrument_imports(
    include=[
        "pds_ray.sources",
        "pds_ray.modalities.text",
        "pds_ray.modalities.image",
        "tarfile",
        "gzip",
        "json",
        "PIL",
    ],
    enable_loader_override=False,
):
    import gzip  # noqa: F401 - named for the instrumentation
    import tarfile  # noqa: F401

    from PIL import (  # noqa: F401
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    import pds_ray.modalities.image
    import pds_ray.modalities.text
    import pds_ray.sources.webdataset  # noqa: F401
from tests.fuzz.targets import TARGETS, seeds


def main() -> None:
    name, *arguments = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds(name)):
            Path(folder, f"{number:03d}").write_bytes(data)
        atheris.Setup([sys.argv[0], *arguments, folder], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
