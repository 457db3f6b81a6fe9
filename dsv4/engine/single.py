"""One sequence at a time on the production model, with the interface of the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv4.cache.request import CachedRequest, Step
from dsv4.core import taps
from dsv4.core.errors import RequestError
from dsv4.engine.graphs import record
from dsv4.engine.model import ProductionModel


class SingleSequence:
    """What the command line's session and the diff of tiers run.

    A new cache takes the place of the one before, which is released.

    Every step is eager until `capture`, which is left to the caller: a graph runs what was
    recorded, whatever is watched, damaged or replaced in Python afterwards.
    """

    def __init__(self, model: ProductionModel) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self._request: CachedRequest | None = None
        self._replay: Callable[[Tensor], Tensor] | None = None  # id [1] -> logits [1, V]

    def new_cache(self) -> CachedRequest:
        """An empty cache."""
        self.close()
        self._request = self.model.cache.admit()
        return self._request

    def close(self) -> None:
        """Release the sequence; its cache serves no longer."""
        if self._request is not None:
            self.model.cache.release(self._request)
            self._request = None

    @torch.inference_mode()
    def capture(self) -> None:
        """Compile the step of one token and record it, logits included, as a CUDA graph.

        From then on `forward` of one id replays it, for any cache; prompts stay eager, and so does
        everything while taps are captured. The row is padding meanwhile: no cache changes.

        Raises DeviceUnavailable on a CPU, and what torch raises where the step cannot be recorded.
        """
        step = self.model.prepare([], num_rows=1)
        fed = torch.full((1,), -1, dtype=torch.int64, device=self.device)
        try:
            run = record(lambda: self._logits_of_one(step, fed), self.device)
        finally:
            step.abort()

        def replay(ids: Tensor) -> Tensor:
            fed.copy_(ids)
            return run().clone()  # the next replay overwrites the result

        self._replay = replay

    def _logits_of_one(self, step: Step, ids: Tensor) -> Tensor:
        return self.model.trunk.logits(self.model.streams(step, ids, is_prefill=False))

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: CachedRequest, last_only: bool = False) -> Tensor:
        """Logits of T more tokens.

        ids [T] int64 on the model's device -> [T, V] FP32, or [1, V] of the last token only
        Raises RequestError for ids outside the vocabulary or a context that grows too long.
        """
        self._check_ids(ids, cache.length)
        if len(ids) == 1 and self._replay is not None and not taps.is_capturing():
            with self._prepared(cache, 1, num_rows=1):
                return self._replay(ids)
        outs = []
        for chunk in ids.split(self.model.limits.max_rows):
            streams = self._step(chunk, cache, is_prefill=len(ids) > 1)
            outs = [streams[-1:]] if last_only else [*outs, streams]
        return self.model.trunk.logits(torch.cat(outs))

    def _step(self, ids: Tensor, cache: CachedRequest, is_prefill: bool) -> Tensor:
        with self._prepared(cache, len(ids)) as step:
            return self.model.streams(step, ids, is_prefill)

    @contextmanager
    def _prepared(
        self, cache: CachedRequest, count: int, num_rows: int | None = None
    ) -> Iterator[Step]:
        """A step of `count` tokens; they count once the block ends."""
        step = self.model.prepare([(cache, count)], num_rows)
        try:
            yield step
        except BaseException:  # its rings may be half written
            step.abort()
            self.close()
            raise
        step.commit()

    def _check_ids(self, ids: Tensor, length: int) -> None:
        V, limit = self.config.vocab_size, self.model.max_context
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise RequestError("ids", "int64 [T]", f"{ids.dtype} {list(ids.shape)}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise RequestError("ids", f"0 to {V - 1}", f"{int(ids.min())} to {int(ids.max())}")
        if length + len(ids) > limit:
            fix = "raise --max-context, or shorten the prompt"
            raise RequestError("ids", f"at most {limit} positions", length + len(ids), fix)
