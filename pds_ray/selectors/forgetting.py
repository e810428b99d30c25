"""Forgetting (Toneva et al., 2019): pairs by how often a model in training loses them again.

The model is a linear map of each modality's embeddings, begun at the identity and trained with the
symmetric contrastive loss. A pair is right in an epoch if each of its two sides ranks the other
first in their batch; it is forgotten where it is right in one epoch and wrong in the next
(docs/methods.md, Selectors).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates

if TYPE_CHECKING:
    import torch

DESCRIPTION = (
    "forgetting (Toneva et al., 2019): by how often linear heads, trained on all pairs, "
    "lose a pair again"
)

BATCH = 512
LEARNING_RATE = 1e-3
TEMPERATURE = 0.07
THREADS = 4  # on any machine: matrix products round by how they are shared out among threads


def select(candidates: Candidates, pairs: int, seed: int, config: SelectConfig) -> Iterator[int]:
    """Yield the pairs forgotten fewest (or most) times first.

    The seed orders those that were forgotten equally often.
    """
    rng = np.random.default_rng(seed)
    counts = forgotten(learning_history(candidates, config.epochs, rng))
    order = np.lexsort(
        (rng.permutation(len(counts)), counts if config.forgotten == "fewest" else -counts)
    )
    yield from candidates.one_per_image(order)[:pairs].tolist()


def forgotten(history: np.ndarray) -> np.ndarray:
    """Count how often each pair was forgotten: bool [epochs, N], right or not -> int64 [N].

    A pair that was never right counts as forgotten in every epoch.
    """
    events = np.count_nonzero(history[:-1] & ~history[1:], axis=0)
    return np.where(history.any(axis=0), events, len(history))


def learning_history(candidates: Candidates, epochs: int, rng: np.random.Generator) -> np.ndarray:
    """Train on all pairs; return whether each was right when its turn came, bool [epochs, N]."""
    import torch

    from pds_ray.training import loop
    from pds_ray.training.losses import contrastive

    heads = [torch.eye(candidates.image.shape[1], requires_grad=True) for _ in range(2)]
    history = np.zeros((epochs, len(candidates)), bool)

    def batches(epoch: int) -> list[tuple[int, np.ndarray]]:
        parts = -(-len(candidates) // BATCH)
        order = rng.permutation(len(candidates))
        return [(epoch, rows) for rows in np.array_split(order, parts)]

    def loss(batch: tuple[int, np.ndarray]) -> torch.Tensor:
        epoch, rows = batch
        candidates.tell(f"training, epoch {epoch + 1:,} of {epochs:,}")
        logits = _logits(candidates, rows, heads)
        own = logits.diagonal()
        right = (own == logits.amax(dim=0)) & (own == logits.amax(dim=1))
        history[epoch, rows] = right.numpy()
        return 2 * contrastive(logits)  # the sum of both directions

    with _threads(THREADS):
        loop.train(torch.optim.Adam(heads, lr=LEARNING_RATE), batches, loss, range(epochs))
    return history


def _logits(candidates: Candidates, rows: np.ndarray, heads: list[torch.Tensor]) -> torch.Tensor:
    """Return the scaled cosines of the images and captions of b pairs, float32 [b, b].

    Other captions of the same image are no rivals: they score -inf.
    """
    import torch
    from torch.nn import functional

    owner = torch.from_numpy(candidates.owner[rows])
    image = torch.from_numpy(candidates.image)[owner]
    text = torch.from_numpy(candidates.text)[torch.from_numpy(rows)]
    images = functional.normalize(image @ heads[0], dim=1)
    texts = functional.normalize(text @ heads[1], dim=1)
    same_image = (owner[:, None] == owner) & ~torch.eye(len(rows), dtype=torch.bool)
    return (images @ texts.T / TEMPERATURE).masked_fill(same_image, -torch.inf)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give torch a fixed number of threads, and the former number afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
