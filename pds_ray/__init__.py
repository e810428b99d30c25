"""pds_ray: distil web-scale image-text data into a handful of image-caption pairs, on Ray.

    from pds_ray import configure, distill, evaluate, load_distilled, protocol, recipe

    distill(configure(recipe("demo"), {"out": "runs/demo"}))
    pairs = load_distilled("runs/demo")
    evaluation = configure(protocol("standard"), {"test": "scenes:1000:7"})
    recalls = evaluate("runs/demo", evaluation)["mean"]

Importing the package loads neither Ray nor torch. A Ray that `distill`, `evaluate` or `compare`
starts ends with the call; one that is initialised already is used and stays. A process does one of
them at a time, in any thread.
"""

from __future__ import annotations

from typing import Any

from pds_ray.config import ConfigError, EvaluateConfig, RunConfig
from pds_ray.config import replace as configure
from pds_ray.engine.plan import make_run as plan
from pds_ray.engine.run import distill
from pds_ray.recipes import protocol, recipe
from pds_ray.store.distilled_set import DistilledSet, load_distilled
from pds_ray.store.export import export
from pds_ray.store.publish import push

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DistilledSet",
    "EvaluateConfig",
    "RunConfig",
    "__version__",
    "compare",
    "configure",
    "distill",
    "evaluate",
    "export",
    "load_distilled",
    "plan",
    "protocol",
    "push",
    "recipe",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # these two need torch: imported on request
        from pds_ray.engine.evaluate import evaluate

        return evaluate
    if name == "compare":
        from pds_ray.engine.compare import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
