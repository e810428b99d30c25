"""Cost models of the stages that optimise a set, and of the selections that they begin with.

Training is counted in forward passes of the backbone over one image; a backward pass counts as two.
The FLOP of a pass are counted on the backbone itself, which is built here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pds_ray import catalog
from pds_ray.config import RunConfig
from pds_ray.planning.choose import model_name
from pds_ray.planning.figures import assumptions
from pds_ray.planning.phases import WRITE_TRIPS, Inputs, Phase, StageModel, distance_flop
from pds_ray.stages.experts import FLOAT_BYTES, STATES
from pds_ray.stages.optimise_inputs import JUDGED_EPOCHS, JUDGED_IMAGES

TRAINING = 3
"""Passes per image of a step of training."""
PASSES = {"adjoint": 12, "tesla": 11, "unrolled": 9}
"""Passes per image of a step of the student, there and back."""
FROZEN_PASSES = 4
"""The same where the backbone is frozen."""
ACTIVATIONS = 3
"""Passes whose activations are held at once, where a gradient is differentiated."""


@dataclass(frozen=True)
class Student:
    """The model that experts and student are."""

    flop: float
    """FLOP of a pass of the backbone over one image."""
    activations: int
    """Numbers that its layers give in a pass."""
    weights: int
    """Weights that are trained, of both branches."""
    side: int
    """Side of the images in pixels."""
    text_width: int


@cache
def student(backbone: str, image_size: int, train: str, rank: int, text_width: int) -> Student:
    """Return the model of some options, whose backbone is built. Raises ConfigError."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pds_ray.training.lora import adapt
    from pds_ray.training.two_towers import TwoTowers

    info = catalog.describe_backbone(backbone)
    side = image_size or info.image_size
    network = catalog.build_backbone(info, side).eval()
    given: list[int] = []
    layers = [part for part in network.modules() if not list(part.children())]
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, output: given.append(output.numel()))
        for layer in layers
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        width = network(torch.zeros(1, 3, side, side)).shape[1]
    for hook in hooks:
        hook.remove()
    if train == "lora":
        adapt(network, rank, 0)
    elif train == "heads":
        network.requires_grad_(requires_grad=False)
    model = TwoTowers(network, width, text_width, train in ("all", "heads"))
    weights = sum(part.numel() for part in model.parameters() if part.requires_grad)
    return Student(float(counter.get_total_flops()), sum(given), weights, side, text_width)


def student_of(config: RunConfig) -> Student:
    """Return the model of a run whose options are settled."""
    wish = config.experts
    return student(wish.backbone, wish.image_size, wish.train, wish.rank, text_width(config))


def text_width(config: RunConfig) -> int:
    """Return the width of the text vectors; a known architecture needs no weights at hand."""
    wish = config.experts.text_encoder
    name = config.embed.encoder if wish == "auto" else wish
    known = assumptions()["encoders"].get(model_name(name))
    return int(known["dim"]) if known else catalog.describe_text_encoder(name).dim


def experts_flop(config: RunConfig, images: float) -> float:
    """Return the FLOP of all experts; of a frozen backbone every image passes once."""
    flop, wish = student_of(config).flop, config.experts
    passes = 1 if wish.train == "heads" else TRAINING * wish.epochs * wish.count
    return flop * images * passes


def expert_bytes(config: RunConfig, images: float, captions: float) -> float:
    """Return the bytes of all snapshots and states, and of images and captions made ready."""
    model, wish = student_of(config), config.experts
    snapshots = wish.count * (wish.epochs + 1 + STATES) * FLOAT_BYTES * model.weights
    return snapshots + 3.0 * model.side**2 * images + FLOAT_BYTES * model.text_width * captions


def optimisation_flop(config: RunConfig) -> float:
    """Return the FLOP of all iterations and validations."""
    flop, wish = student_of(config).flop, config.distill
    batch, frozen = min(wish.batch_size, config.pairs), config.experts.train == "heads"
    of_step = FROZEN_PASSES if frozen else PASSES.get(wish.gradient, TRAINING)
    # without a student's steps: a real batch forward, a learned one forward and back
    passes = wish.steps * batch * of_step if wish.steps else wish.batch_size + TRAINING * batch
    judged = wish.iterations // wish.evaluate_every if wish.evaluate_every else 0
    trained = TRAINING * JUDGED_EPOCHS * config.pairs + JUDGED_IMAGES
    return flop * (wish.iterations * passes + judged * trained)


def memory_bytes(config: RunConfig) -> float:
    """Return the bytes that an optimisation holds: weights on the way, what is learned, a step."""
    model, wish = student_of(config), config.distill
    batch = min(wish.batch_size, config.pairs)
    weights = FLOAT_BYTES * model.weights * (wish.steps + 4)
    learned = 3 * FLOAT_BYTES * config.pairs * (3 * model.side**2 + model.text_width)
    steps = wish.steps if wish.gradient == "unrolled" else 1
    return weights + learned + ACTIVATIONS * steps * batch * FLOAT_BYTES * model.activations


def _start(inputs: Inputs) -> list[Phase]:
    return [(inputs.demand("write images", inputs.clusters, "materialize"),)]


def _start_disk_bytes(inputs: Inputs) -> float:
    return inputs.clusters * inputs.figures["image_file"].value


def _select(inputs: Inputs) -> list[Phase]:
    work = inputs.work
    rows = work.images + work.pairs
    read = (
        inputs.demand("read vectors", rows, "search_rows"),
        *inputs.over_network("read vectors", inputs.vector_bytes),
    )
    flop = distance_flop(work.pairs, inputs.clusters, 2 * inputs.dim)
    return [read, (inputs.demand("pick", flop, "search", inputs.cluster.node_cpus),)]


def _select_disk_bytes(inputs: Inputs) -> float:
    return 2 * inputs.prototype_bytes + 3 * inputs.clusters * inputs.figures["text"].value


def _experts(inputs: Inputs) -> list[Phase]:
    """Return the phases of preparing images and captions, and of training side by side."""
    wish, work = inputs.config.experts, inputs.work
    ready = (
        inputs.demand("read", work.images, "read"),
        inputs.demand("decode and resize", work.images, "preprocess"),
        inputs.demand("encode captions", work.pairs, "encode_captions"),
        *inputs.over_network("read", work.bytes),
    )
    at_once = wish.count * (min(1.0, wish.gpus or 1.0) if inputs.cluster.gpus else wish.cpus)
    flop = experts_flop(inputs.config, float(work.images))
    written = WRITE_TRIPS * wish.count * (wish.epochs + 1.0)
    train = (
        inputs.demand("train", flop, "train", at_once),
        *inputs.round_trips("write snapshots", written, wish.count),
    )
    return [ready, train]


def _experts_disk_bytes(inputs: Inputs) -> float:
    return expert_bytes(inputs.config, inputs.work.images, inputs.work.pairs)


def _optimise(inputs: Inputs) -> list[Phase]:
    return [(inputs.demand("iterations", optimisation_flop(inputs.config), "train", 1),)]


def _optimise_disk_bytes(inputs: Inputs) -> float:
    model = student_of(inputs.config)
    learned = FLOAT_BYTES * inputs.clusters * (3.0 * model.side**2 + model.text_width)
    return 2 * learned + inputs.clusters * inputs.figures["image_file"].value


START = StageModel(_start, _start_disk_bytes)
SELECT = StageModel(_select, _select_disk_bytes)
EXPERTS = StageModel(_experts, _experts_disk_bytes)
OPTIMISE = StageModel(_optimise, _optimise_disk_bytes)
