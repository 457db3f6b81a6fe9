"""Gate accuracies of the training model: batched, without a cache.

A completion counts if every token of the taught answer is the argmax under teacher forcing. That
equals greedy decoding and is a little stricter than the gate, which accepts other phrasings.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4.testing.gates import Gate, TokenizerLike
from training.attention import Switches
from training.model import TrainingModel
from training.needles import Row
from training.places import PLACE
from training.tally import TALLY

PAD = 2
LENGTH = 128  # every gate prompt is shorter
BANDS = ((1, 128), (128, 768), (768, 1 << 20))  # window, reach of stacked windows, beyond
ROWS_AT_ONCE = 1 << 15  # tokens


class GateTokens:
    """The prompts of one gate as padded rows, with the positions of the answers."""

    def __init__(self, gate: Gate, tokenizer: TokenizerLike, device: torch.device) -> None:
        rows = torch.full((len(gate.prompts), LENGTH), PAD)
        self.answer = torch.zeros(len(gate.prompts), LENGTH, dtype=torch.bool)
        for i, prompt in enumerate(gate.prompts):
            cue = prompt.ids(tokenizer)
            answer = tokenizer.encode(prompt.expected)
            rows[i, : len(cue) + len(answer)] = torch.tensor(cue + answer)
            self.answer[i, len(cue) : len(cue) + len(answer)] = True
        self.name, self.rows = gate.name, rows.to(device)
        self.answer = self.answer.to(device)

    def accuracy(self, logits: Tensor) -> float:
        """Share of prompts whose whole answer is predicted; logits [n, LENGTH, V]."""
        right = logits.argmax(-1)[:, :-1] == self.rows[:, 1:]
        return float((right | ~self.answer[:, 1:]).all(1).float().mean())


@torch.no_grad()
def gate_accuracies(
    model: TrainingModel, gates: list[GateTokens], switches: Switches
) -> dict[str, float]:
    """Gate name -> accuracy."""
    return {gate.name: gate.accuracy(model(gate.rows, switches)[0]) for gate in gates}


class LookupTokens:
    """Needle and tally rows of one length, to measure accuracies on."""

    def __init__(self, rows: dict[str, Row], device: torch.device) -> None:
        self.rows = {
            kind: (torch.from_numpy(row.ids).to(device), torch.from_numpy(row.marks).to(device))
            for kind, row in rows.items()
        }

    @torch.no_grad()
    def accuracies(self, model: TrainingModel, switches: Switches) -> dict[str, float]:
        """Share of right tokens: "direct<128", "direct<768", "direct" (beyond), ..., "place".

        A digit counts as a token of its own, after the right digits before it.
        """
        out = {}
        for kind, (ids, marks) in self.rows.items():
            size = max(1, ROWS_AT_ONCE // ids.shape[1])
            guesses = [model(x[:, :-1], switches)[0].argmax(-1) for x in ids.split(size)]
            right, marked = torch.cat(guesses) == ids[:, 1:], marks[:, 1:]
            if kind == "tally":
                every = torch.ones(size, dtype=torch.bool, device=ids.device)
                guesses = [
                    model(x[:, :-1], replace(switches, without_hca=every[: len(x)]))[0].argmax(-1)
                    for x in ids.split(size)
                ]
                right_blind = torch.cat(guesses) == ids[:, 1:]
                out["tally, HCA empty"] = float(right_blind[marked == TALLY].float().mean())
                out[kind] = float(right[marked == TALLY].float().mean())
                continue
            if kind == "place":
                if (marked == PLACE).any():
                    out[kind] = float(right[marked == PLACE].float().mean())
                continue
            for low, high in BANDS:
                chosen = (marked >= max(low, 2)) & (marked < high)
                name = kind if high > 768 else f"{kind}<{high}"
                if chosen.any():
                    out[name] = float(right[chosen].float().mean())
        return out
