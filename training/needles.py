"""Rows that teach looking back: needles in a filler, asked for again far away.

A needle is a key and a value, written in one of a few forms; a query repeats the form up to the
value. Needles overwrite filler tokens, so that distances are exact:

    direct    " house lemon"                          asked by " house"
    shifted   " house is lemon"                       asked by " house is"
    sentence  " The code of the house is lemon."      asked by " The code of the house is"
    digits    " The code of the house is 4821."       asked by " The code of the house is"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from tokenizers import Tokenizer

FORMS = ("direct", "shifted", "sentence", "digits")
WORD = re.compile("\u0120[a-z]{4,}")  # a space and a lower-case word, as byte-level BPE spells it
NUM_DIGITS = 4
MIN_DISTANCE = 16
MIN_SPACE = 8  # a CSA entry pools 8 tokens; two needles in one entry could not be told apart
MAX_NEEDLES = 8
NUM_QUERIES = 8
SHARE_TWO_WORD_KEYS = 0.15  # near-key distractors: "red house", "red river", "old house"


@dataclass(frozen=True)
class Row:
    """One training row.

    ids   [T] token ids
    marks [T] 0 for plain text, 1 for an answer in taught text, negative for an answer of a tally
          (TALLY) or a place (PLACE),
          otherwise the token is an answer that was last given that many tokens before
    """

    ids: np.ndarray
    marks: np.ndarray


@dataclass(frozen=True)
class Form:
    """Tokens around the key and the value; digits of the value count, its space does not."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]


class NeedleWriter:
    """Writes needle rows.

    tokenizer  of the checkpoint
    filler     [N] token ids of running text
    """

    def __init__(self, tokenizer: Tokenizer, filler: np.ndarray) -> None:
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

        self.filler, self.encode = filler, encode
        vocabulary = tokenizer.get_vocab()
        self.words = np.array(sorted(i for t, i in vocabulary.items() if WORD.fullmatch(t)))
        self.digits = np.array([encode(str(d))[0] for d in range(10)])
        code = encode(" The code of the")
        self.forms = {
            "direct": Form((), (), ()),
            "shifted": Form((), encode(" is"), ()),
            "sentence": Form(code, encode(" is"), encode(".")),
            "digits": Form(code, encode(" is "), encode(".")),
        }

    def fill(self, rng: Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A row of filler after BOS [length], and the words that do not occur in it, shuffled."""
        start = int(rng.integers(len(self.filler) - length))
        ids = self.filler[start : start + length].astype(np.int64)
        ids[0] = 0
        free = self.words[~np.isin(self.words, ids)]
        return ids, rng.permutation(free)

    def needles(
        self, rng: Generator, free: np.ndarray, count: int, form: str, two_words: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """`count` (key, value) pairs with different keys and different words as values."""
        if two_words:
            pairs = rng.permutation([(a, b) for a in free[:4] for b in free[4 : 4 + count]])
            keys, free = [[int(a), int(b)] for a, b in pairs[:count]], free[4 + count :]
        else:
            keys, free = [[int(k)] for k in free[:count]], free[count:]
        if form != "digits":
            return [(k, [int(v)]) for k, v in zip(keys, free, strict=False)]
        codes = rng.integers(0, 10, (count, NUM_DIGITS))
        return [(k, [int(d) for d in self.digits[c]]) for k, c in zip(keys, codes, strict=True)]

    def spell(self, form: str, key: Sequence[int], value: Sequence[int]) -> tuple[list[int], int]:
        """Tokens of a needle or an answered query, and the offset of its value."""
        f = self.forms[form]
        cue = [*f.before, *key, *f.between]
        return [*cue, *value, *f.after], len(cue)

    def row(self, rng: Generator, length: int, form: str) -> Row:
        """A training row: half of them ask at the end, half everywhere."""
        two_words = form != "digits" and rng.random() < SHARE_TWO_WORD_KEYS
        if rng.random() < 0.5:
            return self.ask_at_end(rng, length, form, int(rng.integers(1, MAX_NEEDLES + 1)),
                                   two_words=two_words)  # fmt: skip
        return self.ask_everywhere(rng, length, form, two_words)

    def ask_at_end(
        self, rng: Generator, length: int, form: str, count: int, each_once: bool = False,
        two_words: bool = False,
    ) -> Row:  # fmt: skip
        """Needles at log-uniform distances from the end, then queries in a row.

        Queries are drawn with replacement: with each key asked once, answering a value not used
        yet is a good guess. `each_once` is for evaluation.
        """
        ids, free = self.fill(rng, length)
        pairs = self.needles(rng, free, count, form, two_words)
        asked = rng.permutation(count) if each_once else rng.integers(0, count, NUM_QUERIES)
        size = len(self.spell(form, *pairs[0])[0])
        board = _Board(ids, len(pairs))
        end = length - len(asked) * (size + 2)
        board.taken[end:] = True
        for key, pair in enumerate(pairs):
            for _ in range(20):
                away = _log_uniform(rng, MIN_DISTANCE, end - 1)
                if board.put(end - away, key, *self.spell(form, *pair)):
                    break
        board.taken[end:] = False
        for i, key in enumerate(asked):
            board.put(end + i * (size + 2), int(key), *self.spell(form, *pairs[key]), 0)
        return board.finish(self.answer_length(form))

    def ask_everywhere(self, rng: Generator, length: int, form: str, two_words: bool) -> Row:
        """Needles and queries all over the row, distances log-uniform, keys asked again."""
        ids, free = self.fill(rng, length)
        step = 64 if form in ("sentence", "digits") or two_words else 40
        count = min(length // step, len(free) // 3, 16 if two_words else 64)
        pairs = self.needles(rng, free, count, form, two_words)
        board = _Board(ids, len(pairs))
        placed: list[tuple[int, int]] = []
        for key, pair in enumerate(pairs):
            asked = int(rng.integers(2 * MIN_DISTANCE, length - 2 * MIN_DISTANCE))
            told = asked - _log_uniform(rng, MIN_DISTANCE, asked - 1)
            if not board.put(told, key, *self.spell(form, *pair)):
                continue
            board.put(asked, key, *self.spell(form, *pair))
            placed.append((told, key))
            if rng.random() < 0.4:
                told, again = placed[int(rng.integers(len(placed)))]
                at = told + _log_uniform(rng, MIN_DISTANCE, max(MIN_DISTANCE + 1, length - told))
                board.put(at, again, *self.spell(form, *pairs[again]))
        return board.finish(self.answer_length(form))

    def answer_length(self, form: str) -> int:
        """Tokens of a value."""
        return NUM_DIGITS if form == "digits" else 1


class _Board:
    """A row under construction: what is taken, and where each key's value stands."""

    def __init__(self, ids: np.ndarray, num_keys: int) -> None:
        self.ids = ids
        self.taken = np.zeros(len(ids), bool)
        self.taken[0] = True
        self.values: list[list[int]] = [[] for _ in range(num_keys)]

    def put(
        self, at: int, key: int, tokens: list[int], value_offset: int, space: int = MIN_SPACE
    ) -> bool:
        """Overwrite tokens from `at` on; False if that is outside or too near to others."""
        end = at + len(tokens)
        around = max(space - len(tokens), 0)
        if at < 1 or end > len(self.ids) or self.taken[max(0, at - around) : end + around].any():
            return False
        self.ids[at:end] = tokens
        self.taken[at:end] = True
        self.values[key].append(at + value_offset)
        return True

    def finish(self, answer_length: int) -> Row:
        """Mark every value but a key's first with the distance to the one before."""
        marks = np.zeros(len(self.ids), np.int32)
        for values in self.values:
            values.sort()
            for before, now in pairwise(values):
                marks[now : now + answer_length] = now - before
        return Row(self.ids, marks)


def _log_uniform(rng: Generator, low: int, high: int) -> int:
    high = max(high, low + 1)
    return int(low * (high / low) ** rng.random())
