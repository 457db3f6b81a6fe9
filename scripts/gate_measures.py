"""What the gates of looking back are judged by: how much is asked, limits, and measures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4.nano import path as nano_path
from dsv4.testing.lookback import WINDOW, Reader, Score, pooled

FACTS = nano_path() / "facts.json"
FILLER = nano_path() / "filler.txt"

NEAR, FAR, TALLY = 0.98, 0.95, 0.90  # needed: in the window, beyond it, of tallies
TALLY_FEW = 0.80  # of the dozen tallies that judge a mistake: one or two misses are chance
NO_GATE = ("direct",)  # shown only: with nothing around them, a key and a value pass for text
# control -> most it may score, of needles beyond REACH; of tallies see Size
MOST = {"CSA empty": 0.05, "CSA random top-k": 0.30, "CSA recent top-k": 0.05}
PLACE_GUESSED = 0.30
DENSE_GAP = 0.03
LOSS_RISE = 1.05
CUTS_AGREE = 1e-5  # relative error between cuts of one text in FP32; rounding alone makes 7e-7
CUTS = (131, 1, 62, 127, 5, 258)  # chunks of sizes off the multiples of 4 and 128
STEPS_BEFORE, STEPS_AFTER = 21, 22  # single steps before and after a multiple of 128


class Model(Protocol):
    """Tier 0 or tier 1."""

    config: Any

    def new_cache(self) -> Any:
        """An empty cache."""
        ...

    def forward(self, ids: Tensor, cache: Any, last_only: bool = False) -> Tensor:
        """Logits of more tokens."""
        ...


@dataclass(frozen=True)
class Size:
    """How much is asked.

    facts     questions of each fact gate, None for all
    length    tokens of a context, at most
    needles   form -> contexts
    tallies, places  contexts of these gates; the first also of the control of HCA
    guessed   most the tallies may score with HCA empty. A guess is right half the time, and the
              short form asks so few that 0.7 is within its noise
    controls, mistakes  contexts of each other control and of each mistake
    reread    controls read their contexts anew, damaged; otherwise only the answers are damaged
    """

    facts: int | None
    length: int
    needles: Mapping[str, int]
    tallies: int
    places: int
    guessed: float
    controls: int
    mistakes: int
    reread: bool


FULL = Size(
    None, 4096, {"sentence": 6, "digits": 3, "shifted": 2, "direct": 2}, 6, 2, 0.70, 2, 1, True
)
SHORT = Size(16, 2048, {"sentence": 2}, 4, 1, 0.80, 1, 0, False)
FEW = Size(
    24, 4096, {"sentence": 1, "digits": 1, "shifted": 1, "direct": 1}, 2, 1, 0.70, 0, 0, True
)


def memory_reader(model: Model, reread: bool = True) -> Reader:
    """Reads a context once; every cue is continued greedily on a copy of the cache.

    reread  read a context anew when it is asked again; otherwise its cache is kept
    """
    kept: dict[tuple[int, ...], Any] = {}

    def read(ids: list[int]) -> Callable[[list[int], int], list[int]]:
        cache = kept.get(tuple(ids))
        if cache is None:
            cache = model.new_cache()
            model.forward(torch.tensor(ids), cache, last_only=True)
            if not reread:
                kept[tuple(ids)] = cache

        def answer(cue: list[int], count: int) -> list[int]:
            mine, new, ids = copy.deepcopy(cache), [], cue
            while len(new) < count:
                logits = model.forward(torch.tensor(ids), mine, last_only=True)
                new.append(int(logits[-1].argmax()))
                ids = new[-1:]
            return new

        return answer

    return read


@dataclass(frozen=True)
class Measures:
    """What a mistake is judged by: shares found, disagreement between cuts, loss of a text."""

    needles: float
    tallies: float
    places: float
    cuts: float
    loss: float

    def cells(self, base: Measures) -> list[str]:
        """One row of the table."""
        shares = [f"{x:.3f}" for x in (self.needles, self.tallies, self.places)]
        return [*shares, f"{self.cuts:.0e}", f"{100 * (self.loss / base.loss - 1):+.1f}%"]

    def broken(self, base: Measures) -> list[str]:
        """Names of the gates that fail, "loss" if it rises too much."""
        fails = {
            "needles": self.needles < FAR, "tally": self.tallies < TALLY_FEW,
            "place": self.places < FAR, "cuts": not self.cuts < CUTS_AGREE,
            "loss": not self.loss <= LOSS_RISE * base.loss,
        }  # fmt: skip
        return [name for name, failed in fails.items() if failed]


def needles_pass(scores: Mapping[int, Score], count: int) -> bool:
    """Whether the needles of `count` contexts pass, in the window and at every distance beyond.

    Beyond the window, with few contexts, one miss may be all that is allowed.
    """
    near, far = pooled(dict(scores), 0, WINDOW + 1), pooled(dict(scores), WINDOW + 1)
    worst = min(s.share for d, s in scores.items() if d > WINDOW)
    return near >= NEAR and far >= FAR and worst >= min(FAR, 1 - 1 / count)
