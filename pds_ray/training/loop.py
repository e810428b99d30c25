"""A training loop that can be stopped after any epoch and continued to the same bits.

In a training that is to be continued, whatever is random in a step must be drawn from generators
that are seeded with what the step is (see `generator`), never from one that runs on. A state is
then weights, optimizer and progress, without any generator, and steps that are repeated after an
interruption are the same steps. Where a module draws from torch's global generator, the function
`loss` must seed that generator first. A training that is never continued may draw as it likes.

An epoch is a list of batches. Training that knows no epochs, because each step draws fresh data,
has one batch per epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

Batch = TypeVar("Batch")


def seed_of(*parts: object) -> int:
    """Return a hash of the parts, below 2**63."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator that is seeded with a hash of the parts."""
    return torch.Generator().manual_seed(seed_of(*parts))


def constant_rate(_position: float) -> float:
    """Keep every learning rate as the optimizer has it."""
    return 1.0


def train(
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Sequence[Batch]],
    loss: Callable[[Batch], torch.Tensor],
    epochs: range,
    rate: Callable[[float], float] = constant_rate,
    after_epoch: Callable[[int, torch.Tensor], None] = lambda _epoch, _loss: None,
    before_step: Callable[[], object] = lambda: None,
) -> None:
    """Take one optimizer step per batch of the `epochs`.

    `batches(epoch)` lists the batches of an epoch; `loss(batch)` returns a scalar to be minimised.
    Every parameter group of the optimizer learns at its own initial rate times `rate(position)`,
    where the position is the number of epochs done, with the share of the present one.
    `before_step()` may change the gradients, to clip them for example. `after_epoch(epoch, loss)`
    is called with the loss of the epoch's last step, without its graph; it may measure, save the
    state, or keep a copy of the weights.
    """
    groups = optimizer.param_groups
    for group in groups:
        group.setdefault("initial_lr", group["lr"])  # where torch's own schedulers keep it
    for epoch in epochs:
        steps = batches(epoch)
        for number, batch in enumerate(steps):
            factor = rate(epoch + number / len(steps))
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
            value = loss(batch)
            optimizer.zero_grad()
            value.backward()
            before_step()
            optimizer.step()
        after_epoch(epoch, value.detach())


def save_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> bytes:
    """Return weights, optimizer and progress, which must be JSON, in the safetensors format.

    Tensors are named by what they belong to: `model/NAME`, and `optimizer/KEY/NAME` for the
    parameter NAME.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={"progress": json.dumps(progress)})


def read_progress(state: bytes) -> dict[str, Any] | None:
    """Return the progress that a state was saved with; None if it has none or is damaged."""
    length = int.from_bytes(state[:8], "little")  # safetensors reads metadata only of files
    try:
        header = json.loads(state[8 : 8 + length])
        progress = json.loads(header["__metadata__"]["progress"])
    except (KeyError, TypeError, ValueError):
        return None
    return progress if isinstance(progress, dict) else None


def load_state(state: bytes, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Bring model and optimizer to a saved state.

    Return False, and leave both as they are, if the state is damaged or of another model, as other
    versions of the package may leave them.
    """
    try:
        tensors = load(state)
    except SafetensorError:
        return False
    parameters = dict(model.named_parameters())
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, dict[str, torch.Tensor]] = {}  # of each parameter
    for entry, value in tensors.items():
        kind, _, name = entry.partition("/")
        if kind == "model":
            weights[name] = value
        elif kind == "optimizer":
            key, _, name = name.partition("/")
            moments.setdefault(name, {})[key] = value
    if _shapes(weights) != _shapes(model.state_dict()) or not moments.keys() <= parameters.keys():
        return False
    model.load_state_dict(weights)
    names = {parameter: name for name, parameter in parameters.items()}
    places = enumerate(p for group in optimizer.param_groups for p in group["params"])
    of_place = {place: moments[names[p]] for place, p in places if names[p] in moments}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": of_place})
    return True


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}
