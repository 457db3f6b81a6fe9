"""Gates of looking back: needles for CSA, tallies for HCA, places for positions, and one text in
several cuts for the boundaries; and what must fail them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from damage import BLIND, DENSE, MISTAKES, Damage
from gate_measures import (
    CUTS,
    CUTS_AGREE,
    DENSE_GAP,
    FACTS,
    FAR,
    FILLER,
    MOST,
    NO_GATE,
    PLACE_GUESSED,
    STEPS_AFTER,
    STEPS_BEFORE,
    TALLY,
    Measures,
    Model,
    Size,
    memory_reader,
    needles_pass,
)
from torch import Tensor

from dsv4.testing.gates import load_countries
from dsv4.testing.lookback import (
    DISTANCES,
    PLACE_DISTANCE,
    REACH,
    WINDOW,
    Context,
    ask,
    needle_context,
    place_context,
    pooled,
    tally_context,
    vocabulary_words,
)  # fmt: skip
from dsv4.testing.numeric import relative_error
from dsv4.text.tokenizer import Tokenizer


class LookBack:
    """The gates of looking back, their controls, and the mistakes they must notice.

    seed   which contexts: with another seed every one of them is another
    blind, dense, cuts_agree  the damage of the model's tier, and how far its cuts may differ
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, size: Size, seed: int = 0,
        blind: Mapping[str, Damage] = BLIND, dense: Damage = DENSE,
        cuts_agree: float = CUTS_AGREE,
    ) -> None:  # fmt: skip
        self.blind, self.dense, self.cuts_agree = blind, dense, cuts_agree
        self.model, self.tokenizer, self.size, self.seed = model, tokenizer, size, seed
        self.read = memory_reader(model, size.reread)
        self.filler = tokenizer.encode(FILLER.read_text(encoding="utf-8"))
        self.words = vocabulary_words(tokenizer, model.config.vocab_size)
        self.good = True

    def _plan(self, count: int, length: int | None) -> list[tuple[int, int]]:
        """(length, seed) of `count` contexts: they end off the multiples of 4 and 128."""
        size, numbers = length or self.size.length, range(count)
        return [(size - 5 - 14 * (i % 4), 1000 * self.seed + i) for i in numbers]

    def needles(self, form: str, count: int, length: int | None = None) -> list[Context]:
        """`count` contexts of one form."""
        return [
            needle_context(form, self.tokenizer, self.filler, self.words, size, seed)
            for size, seed in self._plan(count, length)
        ]

    def tallies(self, count: int, length: int | None = None) -> list[Context]:
        """`count` contexts of tallies."""
        return [tally_context(self.tokenizer, *plan) for plan in self._plan(count, length)]

    def places(self, count: int) -> list[Context]:
        """`count` contexts of places."""
        return [
            place_context(self.tokenizer, self.filler, self.words, size, seed)
            for size, seed in self._plan(count, 2 * PLACE_DISTANCE)
        ]

    def row(self, name: str, cells: Sequence[str], passed: bool, word: str = "pass") -> None:
        """Print one row and remember a failure."""
        self.good &= passed
        print(f"{name:<24}{''.join(f'{c:>8}' for c in cells)}  {word if passed else 'FAIL'}",
              flush=True)  # fmt: skip

    def gates(self) -> None:
        """Needles by form and distance, tallies, places, and one text in several cuts."""
        print(f"\nlooking back in {self.size.length} tokens (contexts): share found, by distance")
        shown = [d for d in DISTANCES if d < self.size.length - 88]
        print(f"{'':<24}{''.join(f'{d:>8}' for d in shown)}")
        for form, count in self.size.needles.items():
            scores = ask(self.read, self.needles(form, count))
            cells = [f"{scores[d].share:.3f}" for d in shown]
            if form in NO_GATE:
                self.row(f"{form} ({count})", cells, True, "no gate")
            else:
                self.row(f"{form} ({count})", cells, needles_pass(scores, count))
        score = pooled(ask(self.read, self.tallies(self.size.tallies)))
        self.row(f"tally ({self.size.tallies})", [f"{score:.3f}"], score >= TALLY)
        score = pooled(ask(self.read, self.places(self.size.places)))
        self.row(f"place ({self.size.places})", [f"{score:.3f}"], score >= FAR)
        error, _ = self.cuts()
        self.row("cuts agree", [f"{error:.0e}"], error < self.cuts_agree)

    def controls(self) -> None:
        """Attention that cannot look back must fail; all entries must not be much better."""
        print(f"\nnegative controls: needles beyond {REACH} tokens; tallies for HCA")
        size = self.size
        needles, tallies = self.needles("sentence", size.controls), self.tallies(size.tallies)
        intact = pooled(ask(self.read, needles), REACH)
        self.row("intact", [f"{intact:.3f}"], intact >= FAR)
        for name, damage in self.blind.items():
            asked, low = (tallies, 0) if name == "HCA empty" else (needles, REACH)
            with damage():
                score = pooled(ask(self.read, asked), low)
            most = MOST.get(name, size.guessed)
            self.row(name, [f"{score:.3f}"], score <= most, "fails, as it must")
        with self.blind["CSA empty"]():
            score = pooled(ask(self.read, self.places(1)))
        self.row("CSA empty, place", [f"{score:.3f}"], score <= PLACE_GUESSED, "fails, as it must")
        with self.dense():
            dense = pooled(ask(self.read, needles), REACH)
        self.row("CSA dense", [f"{dense:.3f}"], dense - intact <= DENSE_GAP)

    def text(self) -> Tensor:
        """Facts, then prose; it ends STEPS_AFTER tokens after a multiple of 128."""
        rows = load_countries(FACTS)[self.seed % 3 :: 3]
        facts = " ".join(f"The capital of {r['name']} is {r['capital']}." for r in rows)
        start = 500 * (self.seed % 16)
        prose = self.filler[start : start + 512]
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(facts), *prose]
        return torch.tensor(ids[: len(ids) // 128 * 128 - 128 + STEPS_AFTER])

    def cuts(self) -> tuple[float, float]:
        """Largest relative error between cuts of one text, and the loss of its one prefill.

        One prefill, chunks off the multiples of 4 and 128, and a prefill with single steps across
        a boundary of both must give the same logits.
        """
        ids = self.text()
        stepped = STEPS_BEFORE + STEPS_AFTER
        cycle = CUTS * (len(ids) // sum(CUTS) + 1)
        want = self._in_parts(ids, [len(ids)])
        chunks = self._in_parts(ids, cycle)
        steps = self._in_parts(ids, [len(ids) - stepped] + [1] * stepped)
        # one comparison, so that NaN in either is NaN: max() would lose it
        error = relative_error(torch.cat((chunks, steps)), torch.cat((want, want)))
        return error, float(F.cross_entropy(want[:-1].float(), ids[1:]))

    def _in_parts(self, ids: Tensor, sizes: Sequence[int]) -> Tensor:
        cache, out, at = self.model.new_cache(), [], 0
        for size in sizes:
            if at < len(ids):
                out.append(self.model.forward(ids[at : at + size], cache))
                at += size
        return torch.cat(out)

    def mistakes(self) -> None:
        """Each mistake must break a gate or raise the loss by more than 5 %."""
        print("\nmistakes: digits beyond the window, tallies, places, cuts, loss of a text")
        count = self.size.mistakes
        needles = self.needles("digits", count, 2048)
        tallies, places = self.tallies(2 * count, 2048), self.places(count)

        def measure() -> Measures:
            return Measures(
                pooled(ask(self.read, needles), WINDOW + 1), pooled(ask(self.read, tallies)),
                pooled(ask(self.read, places)), *self.cuts(),
            )  # fmt: skip

        base = measure()
        self.row("intact", base.cells(base), not base.broken(base))
        for name, damage in MISTAKES.items():
            with damage():
                now = measure()
            broken = now.broken(base)
            self.row(name, now.cells(base), bool(broken), f"fails: {', '.join(broken)}")
