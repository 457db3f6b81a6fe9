"""The choice of the next token from its logits, and the log probabilities that go with it.

Everything runs in FP64 on the CPU and in the order of token ids, so a choice is a function of the
logits, the parameters and (seed, position) and of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from secrets import randbits

import torch
from torch import Tensor

from dsv4.core.errors import RequestError
from dsv4.core.sampling import MAX_SEED, SamplingParams

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class TokenRng:
    """The random number of one token: a function of the seed and the token's position alone.

    seed      0 to 2^64 - 1
    position  0-based index in the request, prompt included, of the token that is drawn

    Raises RequestError out of range. Source: Philox-4x32-10 (Salmon et al., SC 2011), whose counter
    is the position and whose key is the seed.
    """

    seed: int
    position: int = 0

    def __post_init__(self) -> None:
        for name, value in (("seed", self.seed), ("position", self.position)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
                raise RequestError(name, f"an integer from 0 to {MAX_SEED}", value)

    @classmethod
    def for_request(cls, params: SamplingParams) -> TokenRng:
        """The stream of a request: its own seed, or one drawn now when it has none."""
        return cls(randbits(64) if params.seed is None else params.seed)

    def at(self, position: int) -> TokenRng:
        """The same stream at another position."""
        return TokenRng(self.seed, position)

    def uniform(self) -> float:
        """A number in [0, 1) with 53 random bits."""
        counter = (self.position & _WORD, self.position >> 32, 0, 0)
        high, low, _, _ = philox_4x32(counter, (self.seed & _WORD, self.seed >> 32))
        return ((high >> 5) * (1 << 26) + (low >> 6)) / (1 << 53)


def philox_4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Ten rounds of Philox-4x32: four random 32-bit words of a counter and a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def sample(logits: Tensor, params: SamplingParams, rng: TokenRng) -> int:
    """Choose the next token.

    logits [V]  any float dtype and device; NaN counts as -inf
    rng         the stream at the position of the token: `rng.at(position)`
    ->          an id from 0 to V - 1 whose logit is not -inf

    Greedy takes the largest logit, the lowest id of several. Otherwise the probabilities of
    `filter_logits` are added up in the order of ids, and the first sum above u times the total
    wins, u being the random number of the position. Raises RequestError when no logit is above
    -inf, so that a broken model cannot look like a working one.
    """
    if params.is_greedy:
        return int(_clean(logits).argmax())
    cumulative = filter_logits(logits, params).cumsum(0)
    target = cumulative[-1:] * rng.uniform()
    return int(torch.searchsorted(cumulative, target, right=True))


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that `sample` draws from: FP64 [V] on the CPU, adding up to 1.

    In this order, each step on what the last one left, made to add up to 1 again:

        temperature  softmax(logits / T); T = 0 puts everything on the best token
        top_k        the k most likely
        top_p        the smallest set, most likely first, whose mass reaches p; never empty
        min_p        those with at least min_p times the largest probability

    Equal logits count as ordered by id, the lower first. Several +inf share everything equally.
    """
    clean = _clean(logits)
    if params.is_greedy:
        return torch.nn.functional.one_hot(clean.argmax(), clean.numel()).to(torch.float64)
    probs = _softmax(clean, params.temperature)
    # Sorting the logits, not the probabilities, keeps apart what underflows to the same zero.
    order = clean.argsort(descending=True, stable=True)
    ranked = probs[order]
    if 0 < params.top_k < ranked.numel():
        ranked = _keep(ranked, torch.arange(ranked.numel()) < params.top_k)
    if params.top_p < 1:
        mass_before = torch.cat((ranked.new_zeros(1), ranked.cumsum(0)[:-1]))
        ranked = _keep(ranked, mass_before < params.top_p)
    if params.min_p > 0:
        ranked = _keep(ranked, ranked >= params.min_p * ranked[0])
    return torch.zeros_like(probs).scatter(0, order, ranked)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of the model's own logits, before any parameter: FP64 [V] on the CPU.

    A NaN logit gives -inf. Raises RequestError when no logit is above -inf.
    """
    return _softmax(_clean(logits), 1.0, log=True)


def logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely tokens: ids [k] int64 and log probabilities [k] FP64, best first.

    Ties go to the lower id. Raises RequestError unless 1 <= k <= V.
    """
    values = log_probabilities(logits)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= values.numel():
        raise RequestError("k", f"an integer from 1 to {values.numel()}", k)
    ids = values.argsort(descending=True, stable=True)[:k]
    return ids, values[ids]


def _clean(logits: Tensor) -> Tensor:
    """FP64 on the CPU, NaN replaced by -inf."""
    if logits.dim() != 1 or not logits.is_floating_point():
        raise RequestError("logits", "a float vector [V]", f"{logits.dtype} {list(logits.shape)}")
    x = logits.detach().to(device="cpu", dtype=torch.float64)
    x = torch.where(x.isnan(), -torch.inf, x)
    if not bool((x > -torch.inf).any()):
        raise RequestError(
            "logits", "at least one above -inf", f"{x.numel()} logits, all NaN or -inf",
            "check the checkpoint and the hidden states for NaN",
        )  # fmt: skip
    return x


def _softmax(x: Tensor, temperature: float, log: bool = False) -> Tensor:
    """softmax(x / temperature) without overflow, for any x that has one element above -inf."""
    best = x.max()
    # +inf beats everything finite, however much: the limit of a growing logit.
    shifted = (x == best).to(x.dtype).log() if best == torch.inf else x - best
    scaled = shifted / temperature
    return scaled.log_softmax(0) if log else scaled.softmax(0)


def _keep(ranked: Tensor, mask: Tensor) -> Tensor:
    kept = torch.where(mask, ranked, 0.0)
    return kept / kept.sum()
