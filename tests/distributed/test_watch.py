"""Watching work: lost blocks."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import ray

from pds_ray.distributed import watch

pytestmark = pytest.mark.ray


def test_lost_blocks_are_counted_by_cause(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def lost(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        match rows["id"][0]:
            case 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case 2 | 3:
                raise ValueError("ours")
        return rows

    with watch.lost_blocks_allowed():
        blocks = ray.data.range(5, override_num_blocks=5).map_batches(lost, max_retries=0)
    log = watch.LostBlocks._LOG
    before = log.level, log.propagate, list(log.handlers)
    with watch.LostBlocks() as lost_blocks:
        left = [
            number
            for batch in blocks.iter_batches(batch_size=None)
            for number in batch["id"].tolist()
        ]
    assert sorted(left) == [0, 4]
    assert lost_blocks.kinds == {"WorkerCrashedError": 1, "UserCodeException": 2}
    assert "Ignoring" not in capfd.readouterr().err
    lost_blocks.check_space()
    assert (log.level, log.propagate, log.handlers) == before
    assert ray.data.DataContext.get_current().max_errored_blocks == 0
