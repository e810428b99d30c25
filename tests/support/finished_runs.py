"""Small finished runs of methods, to damage and to continue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.command_line import Run

PAIRS = 20
WORLD = ["--preset", "demo", "--source", "scenes:160:0:0:8", "--pairs", str(PAIRS)]
"""Twenty shards of eight images and forty pairs each."""
COMMANDS = {
    "pds": [
        "distill", *WORLD, "--prune.ratio", "0.2", "--decode.steps", "2", "--decode.batch_size",
        "4", "--prototypes.center", "medoid", "--decode.candidates", "2", "--real-fallback", "on",
        "--caption.nearest_to", "both",
    ],
    "coverage": ["distill", "--method", "coverage", *WORLD],
}  # fmt: skip
"""Method -> a command without its --out; images of `pds` are decoded and chosen, else looked up."""


def finished_runs(pds_ray: Run, folder: Path) -> Callable[[str], Path]:
    """Return a function that makes the run of a method below `folder`, once."""

    def finished(method: str) -> Path:
        out = folder / method
        if not out.exists():
            done = pds_ray(*COMMANDS[method], "--out", str(out))
            assert done.returncode == 0, done.stderr
        return out

    return finished
