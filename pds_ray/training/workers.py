"""The processes that train one model together, each on its slice of every batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

Value = TypeVar("Value")


@dataclass(frozen=True)
class Workers:
    """This process among those that share a training; a single one needs no torch.distributed.

    Workers gather the embeddings of all slices and compute the loss of the whole batch, so that the
    gradient is that of one process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device of this worker."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients averaged over the workers."""
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def mine(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this worker's slice of a batch.

        All slices have one length: the last rows are repeated where the batch is short.
        """
        share = math.ceil(len(batch) / self.count)
        place = torch.arange(self.rank * share, (self.rank + 1) * share).clamp(max=len(batch) - 1)
        return batch[place]

    def gather(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """Return the rows of all workers in order, cut to `total`; gradients flow back to all."""
        if self.count == 1:
            return rows[:total]
        from torch.distributed.nn.functional import all_gather

        # None means the group of now; the default is the one of when torch.distributed.nn was
        # imported
        return torch.cat(all_gather(rows.contiguous(), group=None))[:total]

    def broadcast(self, value: Value) -> Value:
        """Return the first worker's value on every worker."""
        if self.count == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]
