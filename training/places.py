"""Rows that teach exact distances: the word that stood a thousand tokens ago, whatever it was.

Every eighth token of a running text is a word drawn at random, announced by a cue; from the second
thousand tokens on it is the word that stood `DISTANCE` tokens before. The text around the two
places has nothing in common, so that nothing but the position of the entry tells which one to
read: a compressed position that is off by one window reads another word.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from training.needles import NeedleWriter, Row

DISTANCE = 1000  # more than seven windows of 128: seven layers cannot hop it
STRIDE = 8  # two CSA windows: the entries that hold a word hold no other announced one
CUE = " back"
NUM_WORDS = 24
PLACE = -2


class PlaceWriter:
    """Writes place rows. Raises ValueError if the cue is not one token."""

    def __init__(self, needles: NeedleWriter) -> None:
        self.needles, ids = needles, needles.encode(CUE)
        if len(ids) != 1:
            raise ValueError(f"place: expected {CUE!r} to be one token, got {len(ids)}")
        self.cue = ids[0]

    def row(self, rng: Generator, length: int) -> Row:
        """A row of `length` tokens; marked are the words that can be known."""
        ids, free = self.needles.fill(rng, length)
        words = free[free != self.cue][:NUM_WORDS]
        first = DISTANCE // STRIDE
        slots = np.arange(STRIDE - 1, length, STRIDE)
        ids[slots - 1] = self.cue
        ids[slots] = np.resize(words[rng.integers(0, NUM_WORDS, first)], len(slots))
        marks = np.zeros(length, np.int32)
        marks[slots[first:]] = PLACE
        return Row(ids, marks)
