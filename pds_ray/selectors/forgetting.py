"""Forgetting (Toneva et al., 2019): pairs by how often a model that learns them all loses them again.

The model is a linear map of each modality's embeddings, begun at the identity and trained with the symmetric
contrastive loss. A pair is right in an epoch if each of its two sides ranks the other first in their batch; it is
forgotten where it is right in one epoch and wrong in the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates

DESCRIPTION = "forgetting (Toneva et al., 2019): by how often linear heads, trained on all pairs, lose a pair again"

BATCH = 512
LEARNING_RATE = 1e-3
TEMPERATURE = 0.07
THREADS = 4  # whatever the machine has: matrix products round by how they are shared out


def select(candidates: Candidates, pairs: int, seed: int, config: SelectConfig) -> Iterator[int]:
    """The pairs forgotten fewest (or most) times first; the seed orders those forgotten equally often."""
    rng = np.random.default_rng(seed)
    counts = forgotten(learning_history(candidates, config.epochs, rng))
    order = np.lexsort(
        (rng.permutation(len(counts)), counts if config.forgotten == "fewest" else -counts)
    )
    yield from candidates.one_per_image(order)[:pairs].tolist()


def forgotten(history: np.ndarray) -> np.ndarray:
    """How often each pair was forgotten: bool [epochs, N], whether it was right -> int64 [N].

    A pair that was never right counts as forgotten in every epoch.
    """
    events = np.count_nonzero(history[:-1] & ~history[1:], axis=0)
    return np.where(history.any(axis=0), events, len(history))


def learning_history(candidates: Candidates, epochs: int, rng: np.random.Generator) -> np.ndarray:
    """Trains on all pairs; whether each was right when its turn came. bool [epochs, N]."""
    import torch
    from torch.nn import functional

    image, text = torch.from_numpy(candidates.image), torch.from_numpy(candidates.text)
    heads = [torch.eye(image.shape[1], requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.Adam(heads, lr=LEARNING_RATE)
    history = np.zeros((epochs, len(candidates)), bool)
    with _threads(THREADS):
        for right in history:
            batches = np.array_split(rng.permutation(len(candidates)), -(-len(candidates) // BATCH))
            for batch in batches:
                owner = torch.from_numpy(candidates.owner[batch])
                images = functional.normalize(image[owner] @ heads[0], dim=1)
                texts = functional.normalize(text[torch.from_numpy(batch)] @ heads[1], dim=1)
                sisters = (owner[:, None] == owner) & ~torch.eye(len(batch), dtype=torch.bool)
                # other captions of the same image are no rivals
                logits = (images @ texts.T / TEMPERATURE).masked_fill(sisters, -torch.inf)
                own = logits.diagonal()
                right[batch] = ((own == logits.amax(dim=0)) & (own == logits.amax(dim=1))).numpy()
                target = torch.arange(len(batch))
                loss = functional.cross_entropy(logits, target) + functional.cross_entropy(
                    logits.T, target
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return history


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch with a fixed number of threads, and as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
