"""pds_ray: distil web-scale image-text data into a handful of image-caption pairs, on Ray.

    from pds_ray import distill, load_distilled, recipe, configure

    config = configure(recipe("demo"), {"out": "runs/demo"})
    distill(config)
    pairs = load_distilled("runs/demo")

Importing the package loads neither Ray nor torch.
"""

from __future__ import annotations

from pds_ray.config import ConfigError, RunConfig
from pds_ray.config import replace as configure
from pds_ray.pipeline import distill, plan
from pds_ray.recipes import recipe
from pds_ray.stages.materialize import DistilledSet, load_distilled

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DistilledSet",
    "RunConfig",
    "__version__",
    "configure",
    "distill",
    "load_distilled",
    "plan",
    "recipe",
]
