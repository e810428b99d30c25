"""How far a plan was off: a finished run beside what `pds-ray plan` foretells of it, stage by stage.

    pds-ray bench
    pds-ray distill --preset demo --source scenes:20000 --out runs/forecast
    python benchmarks/forecast.py runs/forecast

The run must have been made in one go, on the machine that was measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pds_ray.config import RunConfig, flatten, replace
from pds_ray.planning.bench import survey
from pds_ray.planning.planning import (
    default_rates,
    make_cluster,
    make_plan,
    read_prices,
    read_rates,
)


def table(run: Path, rates: Path) -> str:
    """Both as Markdown: a row a stage."""
    manifest, measured = json.loads((run / "run.json").read_text()), read_rates(rates)
    config = replace(RunConfig(), flatten(manifest["config"]))
    plan = make_plan(
        config,
        survey(config.source),
        make_cluster(None, None, measured),
        measured,
        read_prices(None),
    )
    foretold = {stage.name: stage.seconds for stage in plan.stages}
    real = {name: entry["seconds"] for name, entry in manifest["stages"].items()}
    rows = {name: (foretold[name], real[name]) for name in foretold}
    rows["all stages"] = (sum(foretold.values()), sum(real.values()))
    rows["with the start of Ray"] = (plan.seconds, manifest["last_run_seconds"])
    lines = ["| stage | foretold, s | real, s | foretold / real |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {plan_:.1f} | {run_:.1f} | {plan_ / run_:.2f} |"
        for name, (plan_, run_) in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A finished run beside its plan.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--rates", type=Path, default=default_rates(), help="what pds-ray bench measured"
    )
    args = parser.parse_args()
    print(table(args.run, args.rates))


if __name__ == "__main__":
    main()
