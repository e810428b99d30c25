"""The published protocol to the letter, and the names of protocols."""

from __future__ import annotations

import dataclasses

import pytest

from pds_ray.cli import main as cli
from pds_ray.config import ConfigError, EvaluateConfig, ProtocolConfig, replace
from pds_ray.recipes import PROTOCOLS, protocol, protocol_name

# what the authors' evaluation does (their code, read field by field)
PUBLISHED = {
    "train": "text_head",
    "text": "prototypes",
    "text_encoder": "auto",  # the CLIP that distilled
    "captions": "paper",
    "image_size": 224,
    "normalization": "clip",
    "augment": False,
    "optimizer": "sgd",
    "learning_rate": 0.2,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "step",
    "epochs": 101,
    "batch_size": 128,
    "sampling": "independent",
    "evaluate_every": 10,
    "select": "test",
    "fit": "squash",
    "subjects": "image",
    "targets": "hard",
    "captions_per_image": "one",
    "learned": "auto",
}
PAPER = {f"protocol.{field}": value for field, value in PROTOCOLS["paper"].items()}


def test_paper_is_the_published_protocol():
    config = protocol("paper")
    assert dataclasses.asdict(config.protocol) == PUBLISHED
    assert config.seeds == 5


def test_standard_is_honest():
    standard = protocol("standard").protocol
    assert (standard.select, standard.sampling, standard.normalization) == (
        "val",
        "epoch",
        "backbone",
    )
    assert standard == ProtocolConfig()


def test_an_unknown_protocol_lists_the_known():
    with pytest.raises(ConfigError) as caught:
        protocol("papre")
    assert all(name in str(caught.value) for name in ("papre", *PROTOCOLS))


@pytest.mark.parametrize(
    ("start", "changes", "name"),
    [
        ("standard", {}, "standard"),
        ("paper", {}, "paper"),
        ("paper", {"seeds": 1, "backbones": "small_vit"}, "paper"),
        ("standard", {"protocol.epochs": 3}, "standard, epochs=3"),
        (
            "paper",
            {"protocol.select": "val", "protocol.epochs": 100},
            "paper, epochs=100, select=val",
        ),
        ("standard", {**PAPER, "protocol.epochs": 9}, "paper, epochs=9"),
    ],
)
def test_the_name_tells_what_differs(start, changes, name):
    assert protocol_name(replace(protocol(start), changes)) == name


def test_backbones_are_split_at_commas_and_taken_once():
    assert EvaluateConfig(backbones=" a, b:/x/y ,,a").backbone_names == ["a", "b:/x/y"]


def test_flags_change_the_named_protocol():
    args = ["evaluate", "x", "--protocol", "paper", "--protocol.epochs", "3"]
    config = cli.resolve_evaluation(cli.build_parser().parse_args(args))
    assert dataclasses.asdict(config.protocol) == {**PUBLISHED, "epochs": 3}
