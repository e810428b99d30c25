"""Bi-trajectory matching, VL-Distill (Wu et al., TMLR 2024): pixels and text vectors are learned.

A student trained on the set for a few steps of InfoNCE shall end where an expert stands after an
epoch of all data, in both branches (matching.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pds_ray.config import DistillConfig
from pds_ray.distillers.base import Problem, Start, Step, Variables
from pds_ray.distillers.trajectory import match_trajectories
from pds_ray.distillers.variables import for_trajectories

TRAIN: Literal["all", "heads", "lora"] = "all"
DEFAULTS: Mapping[str, Any] = {
    "iterations": 2000,
    "gradient": "adjoint",  # published: unrolled, the same in more memory
    "steps": 8,
    "expert_epochs": 1,
    "max_start": 2,
    "batch_size": 100,
    "sampling": "fresh",
    "image_rate": 1000.0,
    "text_rate": 1000.0,
    "step_rate": 1e-2,
    "step_size": 0.1,
    "loss": "info_nce",
    "similarity": "identity",
    "similarity_rate": 10.0,  # where one is asked for: this and the next two are those of LoRS
    "rank": 10,
    "alpha": 3.0,
    "merge_branches": False,
}


def variables(start: Start, config: DistillConfig, seed: int) -> Variables:
    """Return images, text vectors and the two step sizes."""
    return for_trajectories(start, config, seed)


def step(problem: Problem, variables: Variables, iteration: int) -> Step:
    """Match one stretch of an expert's trajectory."""
    return match_trajectories(problem, variables, iteration)
