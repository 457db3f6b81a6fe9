"""The gates as the numerics study asks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from drafts import completer, shuffled_gates
from gate_measures import FEW
from lookback_gates import LookBack
from numerics_variants import Amount

from dsv4.reference.model import ReferenceModel
from dsv4.testing.gates import Gate, run_gate
from dsv4.testing.lookback import WINDOW, Score, ask
from dsv4.text.tokenizer import Tokenizer


def right_answers(model: ReferenceModel, tokenizer: Tokenizer, amount: Amount) -> dict[str, Score]:
    """Gate -> right answers; gates of which nothing is asked are left out."""
    scores = {}
    for gate in shuffled_gates(0)[1:]:
        result = run_gate(gate, answering(model, tokenizer, gate), tokenizer, amount.facts)
        scores[gate.name] = Score(round(result.score * result.count), result.count)
    of = LookBack(model, tokenizer, FEW)
    for d, score in ask(of.read, of.needles("sentence", amount.sentences, amount.length)).items():
        if d > WINDOW:
            scores[f"sentence {d}"] = score
    digits = ask(of.read, of.needles("digits", amount.digits, amount.length))
    scores["digits"] = sum((s for d, s in digits.items() if d > WINDOW), Score())
    for name, contexts in (
        ("tally", of.tallies(amount.tallies, amount.length)),
        ("place", of.places(amount.places)),
    ):
        scores[name] = sum(ask(of.read, contexts).values(), Score())
    return {name: score for name, score in scores.items() if score.count}


def answering(model: ReferenceModel, tokenizer: Tokenizer, gate: Gate) -> Callable[..., list[int]]:
    """Greedy answers with the taught one as the draft: one forward where the model says it."""
    taught = {tuple(p.ids(tokenizer)): tokenizer.encode(p.expected) for p in gate.prompts}
    slowly = completer(model)

    def complete(
        prompt: list[int], max_new: int, stop: Callable[[Sequence[int]], bool]
    ) -> list[int]:
        draft = taught[tuple(prompt)][:max_new]
        logits = model.forward(torch.tensor(prompt + draft), model.new_cache())
        for n, word in enumerate(logits[len(prompt) - 1 : -1].argmax(-1).tolist(), start=1):
            if word != draft[n - 1]:
                break
            if stop(draft[:n]):
                return draft[:n]
        return slowly(prompt, max_new, stop)

    return complete
