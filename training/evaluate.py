"""Gate accuracies of the training model: batched, without a cache.

A completion counts if every token of the taught answer is the argmax under teacher forcing. That
equals greedy decoding and is a little stricter than the gate, which accepts other phrasings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.testing.gates import Gate, TokenizerLike
from training.attention import Switches
from training.model import TrainingModel

PAD = 2
LENGTH = 128  # every gate prompt is shorter


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
