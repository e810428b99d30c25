"""A budget of bytes: one stage more, which chooses pairs, side and format for the stages after it.

Any method can be run to a budget. The rule is in docs/methods.md, "A budget of bytes".
"""

from __future__ import annotations

from typing import Any

from pds_ray.methods.base import Method, Run, Stage
from pds_ray.methods.pds import DECODE


def _asked(run: Run) -> list[Any]:
    config, decode = run.config, run.config.decode
    asked = [config.budget_bytes, config.pairs, decode.image_size, decode.format, decode.quality]
    # what a decoder draws has bytes of its own
    drawn = [] if run.decoder.dim is None else DECODE.depends_on(run)
    # each further caption takes room
    return [config.seed, *asked, config.extras.captions, drawn]


BUDGET = Stage(
    "budget",
    run="pds_ray.distributed.budget:budget",
    depends_on=_asked,
    files=lambda run: [run.folder.BUDGET],
    unit="images",
    counted="sampled",
    card=(("bytes allowed", "budget"),),
    plan="pds_ray.planning.budget:BUDGET",
    settles=lambda run: run.folder.budget()["chosen"],
)


def on_budget(method: Method) -> Method:
    """Return a method with the stage that chooses: after pruning, if it prunes."""
    return method.with_stage(BUDGET, after="prune" if "prune" in method.names else "embed")
