"""The generation loop: prefill in chunks, decode, sample, stop; one sequence, one cache."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dsv4.cli.model import Runner
from dsv4.core.sampling import SamplingParams
from dsv4.reference.sampler import TokenRng, log_probabilities, sample
from dsv4.text.answer import AnswerStream
from dsv4.text.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # tokens between two looks at Ctrl-C; bounds activation memory


@dataclass
class Stats:
    """Work and time of one answer. `prefill_tokens` does not count what the cache already held."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    def line(self) -> str:
        """The figures for people."""
        parts = []
        for what, tokens, seconds in (
            ("prefill", self.prefill_tokens, self.prefill_s),
            ("decode", self.decode_tokens, self.decode_s),
        ):
            rate = f"{tokens / seconds:.1f} tok/s" if seconds and tokens else "-"
            parts.append(f"{what} {tokens} tok, {rate}")
        return " | ".join(parts)


@dataclass(frozen=True)
class Step:
    """One new token: its id, the log probability of it, the most likely ids with theirs."""

    token_id: int
    pieces: list[tuple[str, str]]
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


class Interrupt:
    """Whether Ctrl-C was pressed once; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Catch Ctrl-C while the block runs."""
        self.requested = False
        old = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)


class Session:
    """One sequence: its cache, and the ids that are in it.

    Prompts that go on from the ids in the cache are continued, others start a new cache.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self.runner, self.tokenizer, self.stop_ids = runner, tokenizer, stop_ids
        self.interrupt = Interrupt()
        self.stats = Stats()
        self.answer = AnswerStream(tokenizer)
        self._ids: list[int] = []
        self._cache: Any = runner.new_cache()

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        limit: int,
        thinking: bool = False,
        num_logprobs: int = 0,
    ) -> Iterator[Step]:
        """Yield the answer to `prompt` token by token; `answer.finish` says how it ended.

        limit  tokens of prompt and answer together
        """
        stops = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= self.stop_ids
        most = min(params.max_tokens, limit - len(prompt))
        self.stats = stats = Stats()
        self.answer = answer = AnswerStream(self.tokenizer, params.stop, stops, most, thinking)
        if answer.finish:  # no room for a single token
            return
        rng = TokenRng.for_request(params)
        start = time.perf_counter()
        logits = self._prefill(prompt)
        stats.prefill_s = time.perf_counter() - start
        while logits is not None:
            start = time.perf_counter()
            step = self._choose(logits, params, rng, num_logprobs)
            yield step
            if answer.finish or self.interrupt.requested:
                break
            logits = self._feed([step.token_id])
            stats.decode_tokens += 1
            stats.decode_s += time.perf_counter() - start

    def _choose(
        self, logits: Tensor, params: SamplingParams, rng: TokenRng, num_logprobs: int
    ) -> Step:
        token_id = sample(logits, params, rng.at(len(self._ids)))
        pieces = self.answer.push(token_id)
        if not num_logprobs:
            return Step(token_id, pieces)
        values = log_probabilities(logits)
        best = values.argsort(descending=True, stable=True)[:num_logprobs].tolist()
        top = [(i, float(values[i])) for i in best]
        return Step(token_id, pieces, float(values[token_id]), top)

    def _prefill(self, prompt: Sequence[int]) -> Tensor | None:
        """Logits after the prompt; None when interrupted on the way."""
        held = len(self._ids)
        if not held < len(prompt) or list(prompt[:held]) != self._ids:
            self.reset()
            held = 0
        logits = None
        for at in range(held, len(prompt), PREFILL_CHUNK):
            if self.interrupt.requested:
                return None
            chunk = list(prompt[at : at + PREFILL_CHUNK])
            logits = self._feed(chunk)
            self.stats.prefill_tokens += len(chunk)
        return logits

    def reset(self) -> None:
        """Forget everything."""
        self._ids, self._cache = [], self.runner.new_cache()

    def _feed(self, ids: list[int]) -> Tensor:
        """Append `ids` to the cache; logits [V] after the last. A failure forgets the cache."""
        new = torch.tensor(ids, device=self.runner.device)
        try:
            logits = self.runner.forward(new, self._cache, last_only=True)
        except BaseException:
            self.reset()
            raise
        self._ids += ids
        return logits[-1].cpu()  # sampled there, so that a seed says the same on every device


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # kilobytes on Linux
