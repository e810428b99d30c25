"""The published protocol to the letter, the names of protocols, and every field of an evaluation from a flag."""

from __future__ import annotations

import dataclasses

import pytest

from pds_ray.cli import main as cli
from pds_ray.config import ConfigError, EvaluateConfig, ProtocolConfig, flatten, replace, to_dict
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
}
# one value that differs from the default and is allowed, for every field of an evaluation
OTHER = {
    "test": "scenes:10",
    "val": "scenes:20",
    "backbones": "small_vit",
    "seeds": 2,
    "workers": 3,
    "trials": 4,
    "max_failures": 0,
    "save_every_s": 5.0,
    "protocol.train": "heads",
    "protocol.text": "prototypes",
    "protocol.text_encoder": "bert:bert-base-uncased",
    "protocol.captions": "none",
    "protocol.image_size": 96,
    "protocol.normalization": "clip",
    "protocol.augment": False,
    "protocol.optimizer": "sgd",
    "protocol.learning_rate": 0.5,
    "protocol.momentum": 0.5,
    "protocol.weight_decay": 0.0,
    "protocol.schedule": "step",
    "protocol.epochs": 7,
    "protocol.batch_size": 2,
    "protocol.sampling": "independent",
    "protocol.evaluate_every": 3,
    "protocol.select": "last",
    "ray.address": "auto",
    "ray.num_cpus": 2,
    "ray.object_store_gib": 1.0,
    "ray.read_resources": "reader=1",
    "ray.embed_workers": 2,
    "ray.embed_min_workers": 2,
    "ray.embed_gpus": 0.5,
    "ray.embed_resources": "H100=1",
    "ray.decode_workers": 2,
    "ray.decode_min_workers": 2,
    "ray.decode_gpus": 2.0,
    "ray.decode_resources": "A100=0.5,nvme=1",
    "ray.max_bad_share": 0.1,
    "ray.max_failed_share": 0.2,
    "ray.sample_timeout_s": 5.0,
}
FIELDS = sorted(flatten(to_dict(EvaluateConfig()), EvaluateConfig))


def resolved(*args: str) -> EvaluateConfig:
    return cli.resolve_evaluation(cli.build_parser().parse_args(args))


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
        ("standard", PROTOCOLS["paper"] | {"epochs": 9}, "paper, epochs=9"),
    ],
)
def test_the_name_says_what_differs(start, changes, name):
    dotted = {
        field if "." in field or field in FIELDS else f"protocol.{field}": v
        for field, v in changes.items()
    }
    assert protocol_name(replace(protocol(start), dotted)) == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, "nothing")
            for name in ("train", "text", "captions", "normalization", "optimizer", "schedule")
        ],
        *[
            (name, "nothing")
            for name in ("sampling", "select", "augment", "epochs", "learning_rate")
        ],
        *[
            (name, value)
            for name in ("learning_rate", "epochs", "evaluate_every")
            for value in (0, -1)
        ],
        *[(name, -1) for name in ("image_size", "momentum", "weight_decay")],
        *[(name, float("nan")) for name in ("learning_rate", "momentum", "weight_decay")],
        ("learning_rate", float("inf")),
        ("batch_size", 1),
        ("epochs", 2.5),
    ],
)
def test_a_wrong_value_is_one_line(field, value):
    with pytest.raises(ConfigError) as caught:
        replace(EvaluateConfig(), {f"protocol.{field}": value})
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seeds", 0),
        ("workers", 0),
        ("trials", -1),
        ("max_failures", -1),
        ("save_every_s", -1),
        ("backbones", " , "),
        ("seeds", "many"),
    ],
)
def test_a_wrong_value_outside_of_the_protocol(field, value):
    with pytest.raises(ConfigError, match=field):
        replace(EvaluateConfig(), {field: value})


def test_backbones_are_told_apart_by_commas_and_taken_once():
    assert EvaluateConfig(backbones=" a, b:/x/y ,,a").backbone_names == ["a", "b:/x/y"]


def test_every_field_is_tried_here():
    assert sorted(OTHER) == FIELDS


@pytest.mark.parametrize("dotted", FIELDS)
@pytest.mark.parametrize("command", [("evaluate", "runs/x"), ("compare",)])
def test_every_field_has_a_flag(command, dotted):
    """Of both commands, with dashes or underscores; no other field changes, and the name of a protocol is no field."""
    before = flatten(to_dict(EvaluateConfig()), EvaluateConfig)
    assert OTHER[dotted] != before[dotted]
    for flag in {f"--{dotted}", f"--{dotted.replace('_', '-')}"}:
        config = resolved(*command, flag, str(OTHER[dotted]))
        assert flatten(to_dict(config), EvaluateConfig) == {**before, dotted: OTHER[dotted]}


def test_flags_change_the_named_protocol():
    config = resolved("evaluate", "x", "--protocol", "paper", "--protocol.epochs", "3")
    assert dataclasses.asdict(config.protocol) == {**PUBLISHED, "epochs": 3}
