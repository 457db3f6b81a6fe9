"""SamplingParams: how the next token is chosen and when a reply ends."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from dsv4.core.errors import RequestError
from dsv4.core.numbers import is_finite_number, is_integer

MAX_SEED = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling. The defaults are those of the released generation_config.json.

    temperature     divides the logits; 0 is greedy and ignores the four fields below
    top_k           keep the k largest; 0 keeps all
    top_p           keep the smallest set of this probability mass; 1 keeps all
    min_p           drop what has less than this share of the largest probability; 0 drops nothing
    seed            0 to 2^64 - 1: token t depends on (seed, t) alone; None draws a seed a request
    max_tokens      tokens to generate at most
    stop            strings that end the reply, not part of it
    stop_token_ids  ids that end the reply, beside end-of-sentence
    ignore_eos      go on after end-of-sentence

    Lists are taken for `stop` and `stop_token_ids` and kept as tuples. Raises RequestError.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, float("inf"))
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p", "more than 0, at most 1", self.top_p, "use temperature=0")
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_integer("top_k", self.top_k, 0)
        _check_integer("max_tokens", self.max_tokens, 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", "True or False", self.ignore_eos)
        self._freeze_sequence("stop", "non-empty strings")
        self._freeze_sequence("stop_token_ids", "token ids")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError("stop", "non-empty strings", text)
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def _freeze_sequence(self, name: str, of: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (tuple, list)):
            raise RequestError(name, f"a tuple of {of}", value)
        object.__setattr__(self, name, tuple(value))


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    expected = f"a finite number from {low:g}" + (f" to {high:g}" if isfinite(high) else " up")
    if not is_finite_number(value) or not low <= value <= high:
        raise RequestError(name, expected, value)


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    expected = f"an integer from {low}" + (" up" if high is None else f" to {high}")
    if not is_integer(value) or value < low or (high is not None and value > high):
        raise RequestError(name, expected, value)
