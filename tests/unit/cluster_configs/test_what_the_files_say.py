"""Rules of all files of cluster_configs/: one Ray, nothing unpinned, no secret, no dead link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import pds_ray
from tests.support.cluster_files import CLUSTERS, ROOT, load, load_text, pins, texts

FILES = dict(texts())
YAML_FILES = [path for path in FILES if path.suffix == ".yaml"]
IMAGE = re.compile(r"[\w./-]+/pds-ray:[\w.-]+")


def name(path: Path) -> str:
    return str(path.relative_to(CLUSTERS))


@pytest.mark.parametrize("path", YAML_FILES, ids=name)
def test_yaml_is_strict(path: Path) -> None:
    assert isinstance(load(path), dict)


def test_duplicate_keys_are_refused() -> None:
    with pytest.raises(yaml.YAMLError):
        load_text("a: 1\nb: 2\na: 3\n")


def lapses(text: str) -> list[str]:
    """Return the passages of a file that are unpinned, of another version, or secret."""
    ray = re.escape(pins()["ray"])
    found = [
        image
        for image in IMAGE.findall(text)
        if not image.endswith(f":{pds_ray.__version__}-ray{pins()['ray']}")
    ]
    found += re.findall(
        rf"(?i)(?<!pds-)(?<!kube)ray(?:version)?[=:\" ]+(?!{ray})\d+\.\d+\.\d+", text
    )
    found += re.findall(r"\S*:latest\b|\bnightly\b", text)
    found += re.findall(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|"
        r"(?i:secret_access_key|auth_token|password)\s*[:=]\s*[\"']?[A-Za-z0-9/+]{16,}",
        text,
    )
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_versions_are_pinned_and_nothing_is_secret(path: Path) -> None:
    assert lapses(FILES[path]) == []


@pytest.mark.parametrize(
    "text",
    [
        "image: registry.example.com/pds-ray:0.1.0-ray2.59.0",
        "image: registry.example.com/pds-ray:0.0.9-ray2.60.0",
        'rayVersion: "2.59.1"',
        "pip install ray==2.59.0",
        "image: python:latest",
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
        "auth_token: 0123456789abcdef0123456789abcdef",
    ],
)
def test_unpinned_versions_and_secrets_are_found(text: str) -> None:
    assert lapses(text)


def test_every_cluster_names_the_image() -> None:
    named = {path.name for path, text in FILES.items() if IMAGE.search(text)}
    assert {"Dockerfile", "raycluster.yaml", "aws.yaml", "gcp.yaml"} <= named


def missing(text: str) -> set[str]:
    """Return the files of the project that a text names and that do not exist."""
    named = set(re.findall(r"\b(?:jobs|cluster_configs|pds_ray)/[\w./-]*\w", text))
    return {path for path in named if not (ROOT / path).exists()}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_that_are_named_exist(path: Path) -> None:
    assert missing(FILES[path]) == set()


def test_a_file_that_does_not_exist_is_found() -> None:
    assert missing("ray up cluster_configs/aws/azure.yaml") == {"cluster_configs/aws/azure.yaml"}


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".md"], ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", FILES[path]):
        assert target.startswith("https://") or (path.parent / target).exists(), target
