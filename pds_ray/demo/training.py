"""Training of the demo's CLIP, VAE and UNet on the loop of `pds_ray.training`.

What it adds is a schedule by steps, an average of the weights, a progress bar and a checkpoint.
Every step draws fresh data, so an epoch of the loop is one step here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pds_ray.errors import UserError
from pds_ray.store.storage import Folder
from pds_ray.telemetry.progress import progress_bar
from pds_ray.training import loop

CHECKPOINT = "checkpoint.safetensors"
WARMUP_STEPS = 100
DECAY_SHARE = 0.3
"""The learning rate is constant, then falls linearly to zero over this last share of the steps."""
GRADIENT_CLIP = 1.0


class TrainingError(UserError, ValueError):
    """The training cannot go on as asked."""


@dataclass(frozen=True)
class Schedule:
    """Length and speed of a training."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    averaging: float = 0.999
    """Decay of the exponential moving average of the weights, which the training delivers."""
    checkpoint_every: int = 500
    seed: int = 0

    def factor(self, step: float) -> float:
        """Return the share of the learning rate in a step: warm-up, constant, linear decay."""
        warmup = (step + 1) / WARMUP_STEPS
        decay = (self.steps - step) / max(1, int(self.steps * DECAY_SHARE))
        return min(1.0, warmup, decay)


def train(
    label: str,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Train `model` in place and leave the averaged weights in it.

    `loss_of(generator)` draws a batch and returns the loss of the model on it. `folder` holds the
    checkpoint; `settings`, in JSON, say what is trained: a checkpoint made with other settings is
    refused with TrainingError.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    both = nn.ModuleDict({"model": model, "average": average})
    groups = parameter_groups(model.parameters(), schedule.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    checkpoint = Folder(str(folder))
    done = _restore(checkpoint, both, optimizer, settings)
    model.train()
    running: float | None = None

    def batches(step: int) -> list[torch.Generator]:
        return [loop.generator(f"{schedule.seed}:{step}")]

    def after_step(step: int, loss: torch.Tensor) -> None:
        nonlocal running
        _update_average(average, model, min(schedule.averaging, (1 + step) / (10 + step)))
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {running:.4f}", refresh=False)
        bar.update(1)
        if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == schedule.steps:
            progress = {"steps_done": step + 1, "settings": settings}
            checkpoint.write_bytes(CHECKPOINT, loop.save_state(both, optimizer, progress))

    clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()), GRADIENT_CLIP)
    with progress_bar(label, schedule.steps, "steps", done=done) as bar:
        steps = range(done, schedule.steps)
        loop.train(optimizer, batches, loss_of, steps, schedule.factor, after_step, clip)
    model.load_state_dict(average.state_dict())
    model.eval()


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Return matrices with weight decay; gains and biases are not pulled towards zero."""
    every = list(parameters)
    return [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _restore(
    folder: Folder, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> int:
    """Restore the checkpoint if there is one; return the number of steps that it has done."""
    if not folder.exists(CHECKPOINT):
        return 0
    state = folder.read_bytes(CHECKPOINT)
    progress = loop.read_progress(state) or {}
    same = progress.get("settings") == json.loads(json.dumps(settings))
    if not same or not loop.load_state(state, model, optimizer):
        made_with = json.dumps(progress.get("settings"), sort_keys=True)
        raise TrainingError(
            f"{folder.shown}/{CHECKPOINT} was made with other settings ({made_with}); "
            "remove it or change --out"
        )
    return progress["steps_done"]
