"""Bi-trajectory matching, VL-Distill (Wu et al., TMLR 2024): pixels and text vectors are learned.

A student trained on the set for a few steps of InfoNCE shall end where an expert stands after an
epoch of all data, in both branches (matching.py).
"""

from __future__ import annotations

from typing import Literal

from pds_ray.distillers.base import Problem, Step, Variables
from pds_ray.distillers.trajectory import VL_DISTILL, match_trajectories
from pds_ray.distillers.variables import for_trajectories

TRAIN: Literal["all", "heads", "lora"] = "all"
DEFAULTS = VL_DISTILL
variables = for_trajectories


def step(problem: Problem, variables: Variables, iteration: int) -> Step:
    """Match one stretch of an expert's trajectory."""
    return match_trajectories(problem, variables, iteration)
