"""LoRS (Xu et al., ICML 2024): the similarity of all images and captions is learned too.

Bi-trajectory matching whose student minimises a loss with soft targets S, of low rank beside its
diagonal (similarity.py). A model is then trained on the set with S and the learned step sizes.
"""

from __future__ import annotations

from typing import Literal

from pds_ray.distillers.base import Problem, Step, Variables
from pds_ray.distillers.trajectory import LORS, match_trajectories
from pds_ray.distillers.variables import for_trajectories

TRAIN: Literal["all", "heads", "lora"] = "all"
DEFAULTS = LORS
variables = for_trajectories


def step(problem: Problem, variables: Variables, iteration: int) -> Step:
    """Match one stretch of an expert's trajectory."""
    return match_trajectories(problem, variables, iteration)
