"""One request as the engine knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from secrets import randbits

from dsv4.cache.request import CachedRequest
from dsv4.core.sampling import MAX_SEED, SamplingParams


@dataclass(eq=False)
class EngineRequest:
    """A prompt, how to go on from it, and what has come out so far.

    prompt      ids; at least one
    params      sampling; stop strings are the caller's business, who cancels
    stop_ids    ids that end the answer, part of `tokens`
    max_tokens  of the answer, no more than the context has room for
    seed        the request's own, or one drawn for it
    tokens      ids of the answer that the host knows
    finish_reason  None, "stop", "length", "cancelled", or "error" where a step failed
    cached      its place in the cache; None while it waits for the first time, and afterwards
    num_sampled tokens chosen on the device, of which the host may not know the last yet
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    max_tokens: int
    seed: int = field(default_factory=lambda: randbits(64))
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cached: CachedRequest | None = None
    num_sampled: int = 0

    def __post_init__(self) -> None:
        if self.params.seed is not None:
            self.seed = self.params.seed & MAX_SEED

    @property
    def is_finished(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None

    @property
    def num_to_feed(self) -> int:
        """Ids of the prompt that the cache does not hold."""
        held = self.cached.length if self.cached is not None else 0
        return max(len(self.prompt) - held, 0)

    @property
    def wants_more(self) -> bool:
        """Whether another token is to be chosen, as far as the host knows."""
        return not self.is_finished and self.num_sampled < self.max_tokens

    def take(self, token: int) -> None:
        """A token became known."""
        self.tokens.append(token)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish_reason = "length"
