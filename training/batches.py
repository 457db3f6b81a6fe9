"""Training rows cut from the packed streams, kept on the device."""

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


class Batches:
    """Random rows of a stream; each starts at the start of a document, as prompts do."""

    def __init__(self, stream: np.ndarray, device: torch.device, seed: int) -> None:
        self.tokens = torch.from_numpy(stream.astype(np.int32)).to(device)
        self.starts = ((self.tokens & (ANSWER_BIT - 1)) == 0).nonzero().flatten()
        self.rng = torch.Generator(device=device).manual_seed(seed)

    def frequency(self, vocab_size: int) -> Tensor:
        """Counts of every token id [V], on the CPU."""
        return torch.bincount((self.tokens & (ANSWER_BIT - 1)).cpu(), minlength=vocab_size).float()

    def next(self, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> ids, targets [B, T] int64, is_answer [B, T] of the targets."""
        device = self.tokens.device
        usable = int((self.starts < len(self.tokens) - length - 1).sum())
        pick = torch.randint(usable, (rows,), device=device, generator=self.rng)
        at = self.starts[pick][:, None] + torch.arange(length + 1, device=device)
        cut = self.tokens[at]
        ids = (cut & (ANSWER_BIT - 1)).long()
        return ids[:, :-1], ids[:, 1:], cut[:, 1:] >= ANSWER_BIT
