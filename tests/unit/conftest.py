"""Fixtures for the unit tests: tiny models, made once."""

from __future__ import annotations

import pytest

from pds_ray.encoders import open_clip as encoders
from tests.support.tiny_models import save_clip, save_unclip


@pytest.fixture(scope="session")
def _one_thread():
    """Use one thread: tiny models lose more by waiting for a second one than they gain."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, _one_thread):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def clip_info(clip_folder):
    return encoders.describe(f"local-dir:{clip_folder}")


@pytest.fixture(scope="session")
def clip(clip_info):
    return encoders.load(clip_info, "fp32")


@pytest.fixture(scope="session")
def unclip_folder(tmp_path_factory, clip_info):
    return save_unclip(tmp_path_factory.mktemp("models") / "unclip", clip_info.dim)
