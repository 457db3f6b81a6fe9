"""Rows that teach counting: which word of a pair occurs more often in the whole context.

A row is a shuffle of the words of six pairs. An old part and a recent part of it lean
independently, and each stretch strays from that, so the recent tokens tell nothing about the
whole: only an average over everything does, which is what HCA is for.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from tokenizers import Tokenizer

from training.needles import Row

PAIRS = (
    ("up", "down"), ("left", "right"), ("red", "blue"), ("cat", "dog"), ("old", "new"),
    ("north", "south"),
)  # fmt: skip
OLD_LEANS, RECENT_LEANS = (0.1, 0.3), (0.0, 0.3)  # how far from equal shares a part is
RECENT_SHARE = (0.1, 0.45)  # of the row
STRETCH_LEAN = 0.2  # how far the share of a stretch strays from its part
TALLY = -1


class TallyWriter:
    """Writes tally rows. Raises ValueError if a word of PAIRS is not one token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        words = [[encode(" " + word) for word in pair] for pair in PAIRS]
        if any(len(ids) != 1 for pair in words for ids in pair):
            raise ValueError("tally: expected every word to be one token")
        self.pairs = np.array([[a[0], b[0]] for a, b in words])
        self.between, self.end = encode(" or"), encode("?")

    def words(self, rng: Generator, length: int) -> np.ndarray:
        """[length] words of all pairs, with a lean for each pair, part and stretch."""
        n = len(self.pairs)
        pair = rng.integers(0, n, length)
        share = np.empty((length, n))
        leans = [
            0.5 + rng.uniform(*r, n) * rng.choice((-1, 1), n) for r in (OLD_LEANS, RECENT_LEANS)
        ]
        boundary, at = length * (1 - rng.uniform(*RECENT_SHARE)), 0
        while at < length:
            end = at + int(rng.integers(24, 200))
            stray = rng.uniform(-STRETCH_LEAN, STRETCH_LEAN, n)
            share[at:end] = (leans[int(at > boundary)] + stray).clip(0.02, 0.98)
            at = end
        second = rng.random(length) > share[np.arange(length), pair]
        return self.pairs[pair, second.astype(int)]

    def question(self, pair: int) -> list[int]:
        """ " up or down?" """
        first, second = self.pairs[pair]
        return [int(first), *self.between, int(second), *self.end]

    def row(self, rng: Generator, length: int, margin: float = 0.05) -> Row:
        """Blocks of questions at a few places and at the end, about everything before them.

        margin  questions whose counts differ by a smaller share of their sum are not marked
        """
        ids = self.words(rng, length).astype(np.int64)
        ids[0] = 0
        marks = np.zeros(length, np.int32)
        size = len(self.question(0)) + 1
        block = size * len(self.pairs)
        slots = np.arange(2, length // block)
        chosen = rng.choice(slots, min(len(slots), 1 + length // 512), replace=False)
        shift = length - (length // block) * block
        for slot in sorted({*chosen.tolist(), length // block - 1}):
            start = shift + slot * block
            seen = ids[:start]
            for i, pair in enumerate(rng.permutation(len(self.pairs))):
                first, second = ((seen == word).sum() for word in self.pairs[pair])
                at = start + i * size
                answer = self.pairs[pair, int(second > first)]
                ids[at : at + size] = [*self.question(pair), answer]
                if abs(first - second) >= max(2, margin * (first + second)):
                    marks[at + size - 1] = TALLY
        return Row(ids, marks)
