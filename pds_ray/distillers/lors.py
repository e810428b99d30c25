"""LoRS (Xu et al., ICML 2024): the similarity of all images and captions is learned too.

Bi-trajectory matching whose student minimises a loss with soft targets S, of low rank beside its
diagonal (similarity.py). A model is then trained on the set with S and the learned step sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pds_ray.config import DistillConfig
from pds_ray.distillers.base import Problem, Start, Step, Variables
from pds_ray.distillers.trajectory import match_trajectories
from pds_ray.distillers.variables import for_trajectories

TRAIN: Literal["all", "heads", "lora"] = "all"
DEFAULTS: Mapping[str, Any] = {  # as published for 100 pairs of Flickr30K
    "iterations": 3000,
    "gradient": "adjoint",  # published: tesla
    "steps": 8,
    "expert_epochs": 1,
    "max_start": 2,
    "batch_size": 20,
    "sampling": "chunks",
    "image_rate": 100.0,
    "text_rate": 100.0,
    "similarity_rate": 10.0,
    "step_rate": 1e-2,
    "step_size": 0.1,
    "loss": "wbce",
    "similarity": "low_rank",
    "rank": 10,
    "alpha": 3.0,
    "merge_branches": False,
}


def variables(start: Start, config: DistillConfig, seed: int) -> Variables:
    """Return images, text vectors, similarity and the two step sizes."""
    return for_trajectories(start, config, seed)


def step(problem: Problem, variables: Variables, iteration: int) -> Step:
    """Match one stretch of an expert's trajectory."""
    return match_trajectories(problem, variables, iteration)
