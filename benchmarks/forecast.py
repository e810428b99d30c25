"""Compare a finished run with its plan: `pds-ray plan` beside the real seconds, stage by stage.

    pds-ray bench
    pds-ray distill --preset demo --source scenes:20000 --out runs/forecast
    python benchmarks/forecast.py runs/forecast

The run must be one session on the machine that was measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pds_ray.config import RunConfig, flatten, replace
from pds_ray.planning.figures import default_rates, read_prices, read_rates
from pds_ray.planning.plan import make_plan
from pds_ray.planning.workload import make_cluster, survey


def table(run: Path, rates: Path) -> str:
    """Return estimated and real seconds as Markdown, with one line per stage."""
    manifest, measured = json.loads((run / "run.json").read_text()), read_rates(rates)
    config = replace(RunConfig(), flatten(manifest["config"]))
    cluster = make_cluster(None, None, measured)
    plan = make_plan(config, survey(config.source), cluster, measured, read_prices(None))
    estimated = {stage.name: stage.seconds for stage in plan.stages}
    real = {name: entry["seconds"] for name, entry in manifest["stages"].items()}
    rows = {name: (estimated[name], real[name]) for name in estimated}
    rows["all stages"] = (sum(estimated.values()), sum(real.values()))
    rows["with the start of Ray"] = (plan.seconds, manifest["last_run_seconds"])
    lines = ["| stage | estimated, s | real, s | estimated / real |", "| --- | --- | --- | --- |"]
    for name, (plan_s, run_s) in rows.items():
        lines.append(f"| {name} | {plan_s:.1f} | {run_s:.1f} | {plan_s / run_s:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare a finished run with its plan.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--rates", type=Path, default=default_rates(), help="file of pds-ray bench")
    args = parser.parse_args()
    print(table(args.run, args.rates))


if __name__ == "__main__":
    main()
