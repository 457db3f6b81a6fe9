"""The bits of a prompt and of the decode steps after it, as one line: to be run in two ways.

`python -m support.decode_digest` with tests/ on the path; with CUDA_LAUNCH_BLOCKING=1 no kernel
starts before the one in front of it has ended.
"""

from __future__ import annotations

import hashlib

import torch

import dsv4.nano
from dsv4.core.inventory import of_trunk
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.single import SingleSequence
from dsv4.loader import Checkpoint

PROMPT, STEPS = 300, 24


def digest(device: str = "cuda", prompt: int = PROMPT, steps: int = STEPS) -> str:
    """SHA-256 of the logits of nano after `prompt` ids and after each of `steps` greedy ones."""
    checkpoint = Checkpoint.open(dsv4.nano.path())
    stored = checkpoint.stream(keep=of_trunk)
    limits = EngineLimits(max_context=prompt + steps, max_rows=prompt)
    one = SingleSequence(ProductionModel(checkpoint.config, stored, device, limits))
    cache, total = one.new_cache(), hashlib.sha256()
    ids = torch.arange(prompt, device=device) * 37 % checkpoint.config.vocab_size
    for _ in range(steps):
        logits = one.forward(ids, cache, last_only=True)
        total.update(logits.cpu().numpy().tobytes())
        ids = logits.argmax(dim=1)
    return total.hexdigest()


if __name__ == "__main__":
    print(digest())
