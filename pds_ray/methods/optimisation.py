"""Methods that improve a set by optimisation: one list of stages for every distiller.

Before these stages come those that make the start. The formulas are in docs/optimisation.md.
"""

from __future__ import annotations

from typing import Any

from pds_ray.methods.base import Method, Run, Stage
from pds_ray.methods.pds import MATERIALIZE
from pds_ray.store.card import CardText
