"""Steps that mix rows of the packed streams with needle and tally rows, made by workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from training.needles import FORMS, NeedleWriter, Row
from training.paths import NANO
from training.places import PlaceWriter
from training.prepare_data import ANSWER_BIT
from training.tally import TallyWriter
from training.tokenizer import open_tokenizer

FIRST_WORD = 3  # ids below are control tokens


class RowMaker:
    """Makes single rows of every kind."""

    def __init__(self, stream: np.ndarray, folder: Path) -> None:
        tokenizer = open_tokenizer(NANO)
        prose = np.load(folder / "prose.npy") & (ANSWER_BIT - 1)
        self.stream = stream
        self.starts = np.flatnonzero((stream & (ANSWER_BIT - 1)) == 0)
        self.needles = NeedleWriter(tokenizer, prose[prose >= FIRST_WORD])
        self.tally = TallyWriter(tokenizer)
        self.place = PlaceWriter(self.needles)

    def text(self, rng: np.random.Generator, length: int) -> Row:
        """Documents of the streams, from the start of one."""
        usable = np.searchsorted(self.starts, len(self.stream) - length)
        start = self.starts[rng.integers(usable)]
        cut = self.stream[start : start + length]
        marks = (cut >= ANSWER_BIT).astype(np.int32)
        return Row((cut & (ANSWER_BIT - 1)).astype(np.int64), marks)


class Steps(IterableDataset):
    """Endless steps of (ids [B, T + 1], marks [B, T + 1]), all rows of a step of one length.

    lengths  length -> share of the steps
    kinds    "text", "tally", "place" and the needle forms -> share of the rows
    """

    def __init__(
        self, maker: RowMaker, tokens: int, lengths: dict[int, float], kinds: dict[str, float],
        seed: int,
    ) -> None:  # fmt: skip
        self.maker, self.tokens, self.seed = maker, tokens, seed
        self.lengths, self.kinds = lengths, kinds

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        lengths, length_shares = zip(*self.lengths.items(), strict=True)
        kinds, kind_shares = zip(*self.kinds.items(), strict=True)
        while True:
            length = int(rng.choice(lengths, p=np.array(length_shares) / sum(length_shares)))
            count = max(1, self.tokens // length)
            chosen = rng.choice(kinds, count, p=np.array(kind_shares) / sum(kind_shares))
            rows = [self.row(rng, str(kind), length + 1) for kind in chosen]
            ids = torch.from_numpy(np.stack([r.ids for r in rows]))
            yield ids, torch.from_numpy(np.stack([r.marks for r in rows]))

    def row(self, rng: np.random.Generator, kind: str, length: int) -> Row:
        """One row of the given kind."""
        if kind == "text":
            return self.maker.text(rng, length)
        if kind == "tally":
            return self.maker.tally.row(rng, length)
        if kind == "place":
            return self.maker.place.row(rng, length)
        return self.maker.needles.row(rng, length, kind)


def load_steps(steps: Steps, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps made ahead by `workers` processes; in this process with 0."""
    pinned = workers > 0 and torch.cuda.is_available()
    return iter(DataLoader(steps, batch_size=None, num_workers=workers, pin_memory=pinned))


def evaluation_rows(maker: RowMaker, length: int, count: int, seed: int) -> dict[str, Row]:
    """For each form, "tally" and "place": `count` fixed rows, stacked, to measure accuracies on."""
    out = {}
    for kind in (*FORMS, "tally", "place"):
        rng = np.random.default_rng(seed)
        if kind == "tally":
            rows = [maker.tally.row(rng, length + 1, margin=0.1) for _ in range(count)]
        elif kind == "place":
            rows = [maker.place.row(rng, length + 1) for _ in range(count)]
        else:
            ask = maker.needles.ask_at_end
            rows = [ask(rng, length + 1, kind, 8, each_once=True) for _ in range(count)]
        out[kind] = Row(np.stack([r.ids for r in rows]), np.stack([r.marks for r in rows]))
    return out
