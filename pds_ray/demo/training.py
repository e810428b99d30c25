"""The training loop that the CLIP, the VAE and the UNet share: schedule, averaging of weights, checkpoints, resume.

All randomness of step t comes from a generator seeded with (seed, t), and a checkpoint holds weights, averaged weights
and optimizer state, so a training that is stopped and resumed ends with the same weights as one that is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pds_ray.errors import UserError
from pds_ray.telemetry.progress import progress_bar

CHECKPOINT = "checkpoint.safetensors"
WARMUP_STEPS = 100
DECAY_SHARE = 0.3
"""The learning rate is constant, then falls linearly to zero over this last share of the steps."""
GRADIENT_CLIP = 1.0


class TrainingError(UserError, ValueError):
    """The training cannot go on as asked. One line for the user."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    averaging: float = 0.999
    """Decay of the exponential moving average of the weights, which is what the training delivers."""
    checkpoint_every: int = 500
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay."""
        warmup = (step + 1) / WARMUP_STEPS
        decay = (self.steps - step) / max(1, int(self.steps * DECAY_SHARE))
        return self.learning_rate * min(1.0, warmup, decay)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator from which all randomness of a step is drawn."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def train(
    label: str,
    model: torch.nn.Module,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Train `model` in place and leave the averaged weights in it.

    `loss_of(generator)` draws a batch and returns the loss of the model on it. `folder` holds the checkpoint;
    `settings` says what is trained: a checkpoint made with other settings is refused with TrainingError.
    """
    parameters = dict(model.named_parameters())
    average = {name: p.detach().clone() for name, p in parameters.items()}
    decayed = [p for p in parameters.values() if p.ndim > 1]
    others = [
        p for p in parameters.values() if p.ndim <= 1
    ]  # gains and biases are not pulled towards zero
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": schedule.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    done = _load(folder / CHECKPOINT, parameters, average, optimizer, settings)
    model.train()
    with progress_bar(label, schedule.steps, "steps", done=done) as bar:
        running = None
        for step in range(done, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            loss = loss_of(step_generator(schedule.seed, step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), GRADIENT_CLIP)
            optimizer.step()
            decay = min(schedule.averaging, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            bar.set_postfix_str(f"loss {running:.4f}", refresh=False)
            bar.update(1)
            if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == schedule.steps:
                _save(folder / CHECKPOINT, step + 1, parameters, average, optimizer, settings)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    model.eval()


def _save(
    path: Path,
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> None:
    """One safetensors file, whole or not at all; step and settings are JSON in its header."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weights/{name}"] = parameter.detach()
        tensors[f"average/{name}"] = average[name]
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = value
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    save_file(
        tensors,
        aside,
        metadata={"step": str(step), "settings": json.dumps(settings, sort_keys=True)},
    )
    os.replace(aside, path)


def _load(
    path: Path,
    parameters: dict[str, torch.nn.Parameter],
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> int:
    """Restore a checkpoint if there is one. Returns the number of steps it has behind it."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if json.loads(metadata["settings"]) != json.loads(json.dumps(settings)):
            raise TrainingError(
                f"{path} was made with other settings ({metadata['settings']}); remove it or change --out"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"weights/{name}"))
                average[name].copy_(file.get_tensor(f"average/{name}"))
                optimizer.state[parameter] = {
                    key: file.get_tensor(f"optimizer/{key}/{name}").to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return int(metadata["step"])
