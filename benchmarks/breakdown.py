"""Break the time of runs down, from their run.json: a column per run, as before and after a change.

    python -m benchmarks.breakdown before=runs/before after=runs/demo

Seconds of actors are summed over them and are part of their stage's.
"""

from __future__ import annotations

import sys
from typing import Any

from pds_ray.store.manifest import RunManifest

AROUND = "start of Ray and the time between stages"


def shares(manifest: dict[str, Any]) -> dict[str, float]:
    """Return seconds per stage, of its actors' work and waiting if counted, and outside all stages.

    Raises ValueError if the run took several sessions: the time outside is then unknown.
    """
    parts: dict[str, float] = {}
    for stage, entry in manifest["stages"].items():
        parts[stage] = entry["seconds"]
        counts = entry.get("counts", {})
        for actor in ("encoder", "decoder"):
            if f"{actor}_busy_s" in counts:
                parts[f"{stage}: {actor}s at work"] = counts[f"{actor}_busy_s"]
                parts[f"{stage}: {actor}s waiting"] = counts[f"{actor}_idle_s"]
    parts[AROUND] = manifest["last_run_seconds"] - sum(
        entry["seconds"] for entry in manifest["stages"].values()
    )
    if parts[AROUND] < 0:
        raise ValueError("the run took several sessions, of which run.json times the last")
    return parts


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return seconds and shares as Markdown.

    Those of actors, summed over them, are part of their stage's.
    """
    found = {
        name: {**shares(manifest), "all": manifest["last_run_seconds"]}
        for name, manifest in runs.items()
    }
    every_part = dict.fromkeys(part for mine in found.values() for part in mine)
    parts = sorted(every_part, key="all".__eq__)  # "all" comes last
    lines = [
        ["part", *(title for name in runs for title in (f"{name}, s", "share"))],
        ["---"] * (1 + 2 * len(runs)),
    ]
    for part in parts:
        line = [part]
        for mine in found.values():
            seconds = mine.get(part)
            line += (
                ["", ""] if seconds is None else [f"{seconds:.1f}", f"{seconds / mine['all']:.0%}"]
            )
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str]) -> None:
    """Print the table of `[NAME=]RUN` folders."""
    if not arguments:
        raise SystemExit("python -m benchmarks.breakdown [NAME=]RUN ...")
    runs = {}
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        runs[name or path] = path
    try:
        print(table({name: RunManifest.open(path).data for name, path in runs.items()}))
    except ValueError as error:
        raise SystemExit(f"benchmarks.breakdown: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
