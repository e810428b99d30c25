"""Pretrain a small backbone on scenes of the built-in world, as others are on ImageNet.

python -m pds_ray.demo.train_backbone --backbone small_conv --out runs/small_conv.safetensors

The classes are the shapes in their colours (a red star, a blue ring), of which a scene shows one to
three. No caption is read, and nothing is told of sizes, places and grounds. Experts and evaluations
take the file as backbone `small_conv:runs/small_conv.safetensors`. Run the same command again to go
on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own habit

from pds_ray import catalog
from pds_ray.demo.data import to_signed
from pds_ray.demo.training import Schedule, train
from pds_ray.errors import UserError
from pds_ray.sources.scenes import COLORS, IMAGE_SIZE, SHAPES, Scene, ScenesSource, draw_scene
from pds_ray.store.storage import Folder
from pds_ray.telemetry.progress import progress_bar
from pds_ray.training.data import augment

CLASSES = {look: number for number, look in enumerate(product(SHAPES, COLORS))}
"""Kind and colour of a shape -> class."""


@dataclass(frozen=True)
class LabelledImages:
    """Drawn scenes and their classes."""

    pixels: torch.Tensor
    """uint8 [N, 3, S, S]."""
    labels: torch.Tensor
    """float32 [N, classes], 1 for each class that is seen, else 0."""


def label_scene(scene: Scene) -> np.ndarray:
    """Return 1 for each class that a scene shows, else 0, float32 [classes]."""
    labels = np.zeros(len(CLASSES), np.float32)
    labels[[CLASSES[shape.kind, shape.color] for shape in scene.shapes]] = 1
    return labels


def draw_labelled(uri: str) -> LabelledImages:
    """Draw a whole `scenes:` source. Raises SourceError for another one."""
    source = ScenesSource(uri)
    pixels = np.empty((source.count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.empty((source.count, len(CLASSES)), np.float32)
    with progress_bar("draw", source.count, "images") as bar:
        for index in range(source.count):
            scene = source.scene(index)
            pixels[index], labels[index] = np.asarray(draw_scene(scene)), label_scene(scene)
            bar.update(1)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.from_numpy(labels))


def make_classifier(backbone: str, seed: int) -> nn.Sequential:
    """Return a backbone and a linear layer of logits, both with random weights."""
    torch.manual_seed(seed)
    network = catalog.build_backbone(catalog.describe_backbone(backbone), IMAGE_SIZE)
    width = network(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)).shape[1]
    return nn.Sequential(network, nn.Linear(width, len(CLASSES)))


def train_classifier(
    model: nn.Sequential, data: LabelledImages, args: argparse.Namespace, folder: Path
) -> None:
    """Train by cross-entropy: the classes seen in an image have equal shares of its target.

    Images are moved and scaled at random.
    """
    targets = data.labels / data.labels.sum(1, keepdim=True)

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randperm(len(data.pixels), generator=generator)[: args.batch_size]
        draws = torch.rand(len(rows), 3, generator=generator)
        logits = model(augment(to_signed(data.pixels[rows]), draws))
        return F.cross_entropy(logits, targets[rows])

    names = ("backbone", "source", "batch_size", "learning_rate", "seed")
    settings = {name: getattr(args, name) for name in names}
    schedule = Schedule(
        args.steps, args.learning_rate, checkpoint_every=args.checkpoint_every, seed=args.seed
    )
    train(f"train {args.backbone}", model, loss, schedule, folder, settings)


@torch.inference_mode()
def measure_found(model: nn.Module, data: LabelledImages, batch_size: int = 500) -> float:
    """Return the percentage of the classes seen that are found.

    Of an image with k of them, the k highest logits count.
    """
    found = 0.0
    for pixels, labels in zip(
        data.pixels.split(batch_size), data.labels.split(batch_size), strict=True
    ):
        places = model(to_signed(pixels)).argsort(1, descending=True).argsort(1)
        found += labels[places < labels.sum(1, keepdim=True)].sum().item()
    return 100 * found / data.labels.sum().item()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pretrain a small backbone on scenes, by their shapes and colours."
    )
    add = parser.add_argument
    add("--backbone", default="small_conv", choices=[name for name in catalog.BACKBONES if name])
    add(
        "--out",
        type=Path,
        required=True,
        help="file of the weights, NAME.safetensors; beside it NAME.json has figures, and "
        "NAME.checkpoint/ the state to resume",
    )
    add("--source", default="scenes:10000:3", help="scenes to train on (default %(default)s)")
    add(
        "--holdout",
        default="scenes:1000:4",
        help="scenes to count the found classes on (default %(default)s)",
    )
    add("--steps", type=int, default=1000)
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=2e-3)
    add("--checkpoint-every", type=int, default=100, help="steps")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.suffix != ".safetensors":
        parser.error("argument --out: the file's name ends in .safetensors")
    return args


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train, measure, write. Returns the metrics."""
    data, holdout = draw_labelled(args.source), draw_labelled(args.holdout)
    model = make_classifier(args.backbone, args.seed)
    train_classifier(model, data, args, args.out.with_suffix(".checkpoint"))
    metrics = {
        "found": measure_found(model, holdout),
        "holdout_images": len(holdout.pixels),
        "steps": args.steps,
    }
    folder = Folder(str(args.out.parent))
    weights = {name: tensor.contiguous() for name, tensor in model[0].state_dict().items()}
    folder.write_bytes(args.out.name, save(weights))
    folder.write_bytes(
        args.out.with_suffix(".json").name, (json.dumps(metrics, indent=2) + "\n").encode()
    )
    return metrics


def main(argv: list[str] | None = None) -> int:
    try:
        metrics = run(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"held-out classes found: {metrics['found']:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
