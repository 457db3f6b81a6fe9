"""The packed streams, mixed into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.prepare_data import ANSWER_BIT


def mix_documents(folder: Path, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """One stream of all documents in random order; `shares` says how often each stream enters.

    shares  stream name -> repetitions; 0.5 takes half of its documents
    ->      uint16 tokens with the answer bit, every document starts with BOS
    """
    rng = np.random.default_rng(seed)
    pieces: list[np.ndarray] = []
    for name, share in shares.items():
        tokens = np.load(folder / f"{name}.npy")
        starts = np.flatnonzero((tokens & (ANSWER_BIT - 1)) == 0)
        documents = np.split(tokens, starts[1:])
        whole, part = int(share), share - int(share)
        chosen = rng.permutation(len(documents))[: round(part * len(documents))]
        pieces += documents * whole + [documents[i] for i in chosen]
    order = rng.permutation(len(pieces))
    return np.concatenate([pieces[i] for i in order])


def token_frequency(stream: np.ndarray, vocab_size: int) -> Tensor:
    """Counts of every token id [V]."""
    tokens = torch.from_numpy((stream & (ANSWER_BIT - 1)).astype(np.int64))
    return torch.bincount(tokens, minlength=vocab_size).float()
