"""Greedy answers to the fact gates, and how many drafts of the MTP block the trunk accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import torch
from gate_measures import FACTS, Model
from lookback_gates import LookBack

from dsv4.reference.model import ReferenceModel
from dsv4.testing.gates import Gate, build_gates, load_countries
from dsv4.text.tokenizer import Tokenizer


def completer(model: Model) -> Callable[..., list[int]]:
    """Greedy decoding, one token a step after the prefill."""

    def complete(
        prompt: list[int], max_new: int, stop: Callable[[Sequence[int]], bool]
    ) -> list[int]:
        cache, new, ids = model.new_cache(), [], prompt
        while len(new) < max_new:
            logits = model.forward(torch.tensor(ids), cache, last_only=True)
            new.append(int(logits[-1].argmax()))
            if stop(new):
                break
            ids = new[-1:]
        return new

    return complete


def shuffled_gates(seed: int) -> list[Gate]:
    """The fact gates; a seed picks the order and so the sample where not every one is asked."""
    out = []
    for gate in build_gates(load_countries(FACTS)):
        prompts = list(gate.prompts)
        Random(seed).shuffle(prompts)
        out.append(replace(gate, prompts=tuple(prompts)))
    return out


def accepted_drafts(
    model: ReferenceModel, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new: int
) -> tuple[int, int]:
    """Drafts of the MTP block that are the trunk's own next token, and all, in greedy answers."""
    right = count = 0
    for prompt in prompts:
        new = completer(model)(prompt, max_new, lambda ids: ids[-1] == tokenizer.eos_id)
        ids, cache = torch.tensor(prompt + new), model.new_cache()
        streams = model.forward_streams(ids[:-1], cache)
        drafts = model.forward_mtp(streams, ids[1:], cache).argmax(-1)
        # row t drafts token t + 2; the first draft is that of the second new token
        hits = drafts[len(prompt) - 1 : -1] == ids[len(prompt) + 1 :]
        right, count = right + int(hits.sum()), count + len(hits)
    return right, count


def show_drafts(model: ReferenceModel, tokenizer: Tokenizer, look_back: LookBack) -> None:
    """Accepted-token rates of the MTP block, greedy; no gate."""
    asked = {
        gate.name: [p.ids(tokenizer) for p in gate.prompts[:24]]
        for gate in shuffled_gates(look_back.seed)[1:]
    }
    starts = range(0, len(look_back.filler) - 256, len(look_back.filler) // 8)
    asked["prose"] = [[tokenizer.bos_id, *look_back.filler[i : i + 200]] for i in starts]
    print("\nMTP block: share of its drafts that the trunk accepts, greedy")
    for name, prompts in asked.items():
        right, count = accepted_drafts(model, tokenizer, prompts, 64 if name == "prose" else 12)
        print(f"{name:<24}{right / count:>8.3f}  of {count}")
