"""Ray's object store is full, and so is the disk that it spills to."""

from __future__ import annotations

import re

import pytest

from tests.support.ray_script import output_of

pytestmark = [pytest.mark.ray, pytest.mark.long]
DRIVER = """
import os
os.environ["RAY_local_fs_capacity_threshold"] = "0.001"  # Ray then takes any disk for full
import numpy as np
import ray
from pds_ray.config import RayConfig
from pds_ray.distributed import session, watch
from pds_ray.errors import UserError

MANY = 60 << 20  # of a store of 80 MB

def grow(batch):
    return {"x": np.zeros((1, MANY), np.uint8)}

session.start(RayConfig(num_cpus=2, object_store_gib=0.08))
held = []
try:
    with watch.lost_blocks_allowed(), watch.LostBlocks() as lost:
        grown = ray.data.range(4, override_num_blocks=4).map_batches(grow)
        for block in grown.iter_internal_ref_bundles():
            held.append(block)
    lost.check_space()
except UserError as error:
    print(error)
try:
    with session.unwrapped_errors():
        held += [ray.put(np.zeros(MANY, np.uint8)) for _ in range(2)]
except UserError as error:
    print(error)
session.stop()
"""


def test_it_is_one_line_and_not_a_slow_run() -> None:
    printed = output_of(DRIVER)
    said = (
        r"the memory of Ray's object store and the disk it spills to \(.*\) are full "
        r"(here|on node [\d.]+); free space"
    )
    assert [re.match(said, line)[1].split()[0] for line in printed] == ["on", "here"]
