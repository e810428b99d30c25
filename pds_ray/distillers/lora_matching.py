"""LoRA matching (VL-Distill): bi-trajectory matching of adapters in place of a ViT's weights.

The trajectories of the 86 million weights of ViT-B/16 are hard to match; those of low-rank adapters
(training/lora.py) and of the text head are short. Experts and student keep the backbone as it was
pretrained.

Published are rank 4 and the results, 10.4 and 5.4 (TR@1, IR@1) with 100 pairs of Flickr30K, where
whole weights give 1.5 and 0.6. All options below are those of bi_trajectory and our choice. So is
what is matched: the two factors of each adapter, which needs no further thought, since the student
starts from factors of the same expert. Before the first epoch the upper factor is zero: a step from
there moves no lower one.
"""

from __future__ import annotations

from typing import Literal

from pds_ray.distillers.base import Problem, Step, Variables
from pds_ray.distillers.trajectory import VL_DISTILL, match_trajectories
from pds_ray.distillers.variables import for_trajectories

TRAIN: Literal["all", "heads", "lora"] = "lora"
DEFAULTS = VL_DISTILL
variables = for_trajectories


def step(problem: Problem, variables: Variables, iteration: int) -> Step:
    """Match one stretch of the trajectory of an expert's adapters and text head."""
    return match_trajectories(problem, variables, iteration)
