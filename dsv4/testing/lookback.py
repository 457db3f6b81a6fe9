"""Gates of looking back: needles for CSA and its indexer, tallies for HCA, places for positions.

One context is read once and serves several questions, each on a copy of the cache. Like the other
gates they know nothing of models: a `Reader` reads a context and answers cues.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from dsv4.testing.gates import TokenizerLike

DISTANCES = (64, 120, 256, 512, 1024, 2048, 3000, 4000)
WINDOW = 128
REACH = 768  # window x (layers - 1): nearer needles could come through stacked windows
PAIRS = (
    ("up", "down"), ("left", "right"), ("red", "blue"), ("cat", "dog"), ("old", "new"),
    ("north", "south"),
)  # fmt: skip
PLACE_DISTANCE, PLACE_STRIDE, PLACE_CUE, PLACE_WORDS = 1000, 8, " back", 24
WORD = re.compile(" [a-z]{4,}")

# form -> text before the key, between key and value
FORMS = {
    "direct": ("", ""),
    "shifted": ("", " is"),
    "sentence": (" The code of the", " is"),
    "digits": (" The code of the", " is "),
}

# reads a context; the returned function continues it greedily: (cue ids, count) -> new ids
Reader = Callable[[list[int]], Callable[[list[int], int], list[int]]]


@dataclass(frozen=True)
class Question:
    """`cue` after the context must be continued with `answer`; distance in tokens, 0 for none."""

    cue: tuple[int, ...]
    answer: tuple[int, ...]
    distance: int = 0


@dataclass(frozen=True)
class Context:
    """Ids to read, and what to ask about them."""

    ids: tuple[int, ...]
    questions: tuple[Question, ...]


def vocabulary_words(tokenizer: TokenizerLike, size: int) -> list[int]:
    """Ids of the tokens that are a space and a lower-case word of at least four letters."""
    return [i for i in range(size) if WORD.fullmatch(tokenizer.decode([i]))]


def needle_context(
    form: str, tokenizer: TokenizerLike, filler: Sequence[int], words: Iterable[int], length: int,
    seed: int,
) -> Context:  # fmt: skip
    """Eight needles (fewer in a short context) in running text; each is asked once.

    filler  ids of at least `length` tokens of text; each seed starts elsewhere in it
    words   ids that may be keys and values; those that occur in the text are left out

    Of a distance d the value's last occurrence stands d tokens before the answer's place. The
    order of the questions says nothing: each goes to a fresh copy of the cache.
    """
    rng = Random(f"{form} {seed}")
    start = rng.randrange(len(filler))
    text = [tokenizer.bos_id, *(filler[(start + i) % len(filler)] for i in range(length - 1))]
    present = set(text)
    free = [w for w in words if w not in present]
    rng.shuffle(free)
    before, between = (tokenizer.encode(part) if part else [] for part in FORMS[form])
    after = tokenizer.encode(".") if form in ("sentence", "digits") else []
    questions = []
    for distance in (d for d in DISTANCES if d < length - 40):
        cue = [*before, free.pop(), *between]
        answer = [free.pop()]
        if form == "digits":
            answer = [tokenizer.encode(str(rng.randrange(10)))[0] for _ in range(4)]
        needle = [*cue, *answer, *after]
        at = length - distance
        text[at : at + len(needle)] = needle
        questions.append(Question(tuple(cue), tuple(answer), distance))
    return Context(tuple(text[:length]), tuple(questions))


def tally_context(tokenizer: TokenizerLike, length: int, seed: int, margin: float = 0.1) -> Context:
    """Words of six pairs in random order; which of each pair occurs more often?

    The last quarter leans its own way, and every stretch of 24 to 200 words strays, so that the
    recent words say nothing about the whole. Pairs whose counts differ by less than `margin` of
    their sum are not asked.
    """
    rng = Random(f"tally {seed}")
    pairs = [[tokenizer.encode(" " + word)[0] for word in pair] for pair in PAIRS]
    old, recent = ([rng.choice((0.5 - d, 0.5 + d)) for _ in pairs] for d in (0.2, 0.15))
    ids, share, left = [tokenizer.bos_id], old, 0
    while len(ids) < length:
        if left == 0:
            left = rng.randrange(24, 200)
            lean = old if len(ids) < 0.75 * length else recent
            share = [min(max(x + rng.uniform(-0.2, 0.2), 0.02), 0.98) for x in lean]
        pair = rng.randrange(len(pairs))
        ids.append(pairs[pair][rng.random() > share[pair]])
        left -= 1
    questions = []
    for first, second in pairs:
        counts = ids.count(first), ids.count(second)
        if abs(counts[0] - counts[1]) >= margin * sum(counts):
            cue = [first, *tokenizer.encode(" or"), second, *tokenizer.encode("?")]
            answer = first if counts[0] > counts[1] else second
            questions.append(Question(tuple(cue), (answer,)))
    return Context(tuple(ids), tuple(questions))


def place_context(
    tokenizer: TokenizerLike, filler: Sequence[int], words: Iterable[int], length: int, seed: int,
    count: int = 8,
) -> Context:  # fmt: skip
    """Which word stood exactly PLACE_DISTANCE tokens ago? Only the position of an entry tells.

    Every eighth token of a text is an announced word; after the first thousand tokens it is the
    word of a thousand tokens before. Question i goes on to the i-th such word after the context.
    """
    rng = Random(f"place {seed}")
    size, start = length + PLACE_STRIDE * count, rng.randrange(len(filler))
    text = [tokenizer.bos_id, *(filler[(start + i) % len(filler)] for i in range(size - 1))]
    (cue,) = tokenizer.encode(PLACE_CUE)
    free = [w for w in words if w not in {*text, cue}]
    rng.shuffle(free)
    said = [rng.choice(free[:PLACE_WORDS]) for _ in range(PLACE_DISTANCE // PLACE_STRIDE)]
    slots = range(PLACE_STRIDE - 1, size, PLACE_STRIDE)
    for i, at in enumerate(slots):
        text[at - 1 : at + 1] = cue, said[i % len(said)]
    questions = [
        Question(tuple(text[length:at]), (text[at],), PLACE_DISTANCE) for at in slots if at > length
    ]
    return Context(tuple(text[:length]), tuple(questions))


@dataclass(frozen=True)
class Score:
    """Right answers out of `count`."""

    right: int = 0
    count: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.right + other.right, self.count + other.count)

    @property
    def share(self) -> float:
        """Right answers over all; NaN without any."""
        return self.right / self.count if self.count else float("nan")


def ask(read: Reader, contexts: Iterable[Context]) -> dict[int, Score]:
    """Distance -> score over all questions of all contexts."""
    scores: dict[int, Score] = {}
    for context in contexts:
        answer = read(list(context.ids))
        for q in context.questions:
            right = answer(list(q.cue), len(q.answer)) == list(q.answer)
            scores[q.distance] = scores.get(q.distance, Score()) + Score(int(right), 1)
    return scores


def pooled(scores: dict[int, Score], low: int = 0, high: int = 1 << 30) -> float:
    """Share of right answers over the distances from `low` to below `high`."""
    return sum((s for d, s in scores.items() if low <= d < high), Score()).share
