"""Steps on the device: forward, the choice of the next tokens, one CUDA graph for each size.

The last token of a request stays on the device, in the row of its slot, so that the next step is
queued before the host has seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv4.cache.request import Step
from dsv4.core.sampling import SamplingParams
from dsv4.engine.graphs import record
from dsv4.engine.model import ProductionModel
from dsv4.engine.warm_up import prompts, size_classes
from dsv4.ops.sampling import sample

DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Rows of prompts. The host needs some 3 ms to start the kernels of a layer, whatever the rows: from
# about a thousand on the device needs longer.
PROMPT_SIZES = (16, 64, 128, 256, 512, 1024)
MAX_TEMPERATURE, MAX_TOP_K = 1e38, (1 << 31) - 1  # what the table's columns hold


class SlotTable:
    """What the device knows of the request in each slot; one row more for padding.

    token        int64, the last one chosen
    seed, temperature, top_k, top_p, min_p  as the sampler takes them
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((num_slots + 1,), value, dtype=dtype, device=device)

        self.token, self.seed = column(0, torch.int64), column(0, torch.int64)
        self.temperature, self.top_p = column(0, torch.float32), column(1, torch.float32)
        self.min_p, self.top_k = column(0, torch.float32), column(0, torch.int32)

    def set(self, slot: int, params: SamplingParams, seed: int, token: int = 0) -> None:
        """Write the row of a slot."""
        signed = seed - (1 << 64) if seed >> 63 else seed
        temperature = min(params.temperature, MAX_TEMPERATURE)  # all are alike from there on
        top_k = min(params.top_k, MAX_TOP_K)
        for column, value in (
            (self.token, token), (self.seed, signed), (self.temperature, temperature),
            (self.top_k, top_k), (self.top_p, params.top_p), (self.min_p, params.min_p),
        ):  # fmt: skip
            column[slot] = value

    def draw(self, logits: Tensor, row: Tensor, position: Tensor, is_filtered: bool) -> Tensor:
        """logits [B, V]; row [B] of the table; position [B] of the tokens drawn -> ids [B]"""
        filters: tuple[Tensor, ...] = ()
        if is_filtered:
            filters = self.top_k[row], self.top_p[row], self.min_p[row]
        return sample(logits, self.temperature[row], self.seed[row], position, *filters)


@dataclass(frozen=True)
class Pending:
    """Tokens on their way to the host."""

    tokens: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> list:
        """The tokens, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.tokens.tolist()


class Stepper:
    """Runs prepared steps of a model: one row of a decode step for each request.

    sizes       batch sizes of decode steps; a smaller batch is padded
    use_graphs  capture steps (CUDA); else they run eagerly
    prompt_sizes  rows of steps of prompts; a smaller one is padded, a larger one runs eagerly, as
                all do without graphs
    """

    rows_each = 1  # rows of a decode step that a request has

    def __init__(
        self, model: ProductionModel, sizes: Sequence[int] = DECODE_SIZES,
        use_graphs: bool | None = None, prompt_sizes: Sequence[int] = PROMPT_SIZES,
    ) -> None:  # fmt: skip
        self.model = model
        most, most_rows = model.limits.max_requests, model.limits.max_rows
        self.sizes = sorted({min(size, most) for size in sizes} | {most})
        self.use_graphs = model.device.type == "cuda" if use_graphs is None else use_graphs
        self.table = SlotTable(most, model.device)
        self.prompt_sizes = sorted({min(size, most_rows) for size in prompt_sizes})
        self.prompt_sizes = self.prompt_sizes if self.use_graphs else []
        self._fed = torch.full((max([0, *self.prompt_sizes]),), -1, device=model.device)
        self._graphs: dict[tuple[int, bool], Callable[[], Tensor]] = {}
        self._prompts: dict[int, Callable[[], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.use_graphs else None

    def padded(self, count: int) -> int:
        """The size of the decode step that serves `count` requests."""
        return next(size for size in self.sizes if size >= count)

    def padded_prompt(self, count: int) -> int | None:
        """The rows of the step that feeds `count` ids of prompts; None for no padding."""
        return next((size for size in self.prompt_sizes if size >= count), None)

    @torch.inference_mode()
    def prefill(
        self, step: Step, ids: Sequence[int], following: Sequence[int], last: Sequence[int]
    ) -> Pending:
        """Run the chunks of a step; choose a token after each row of `last`.

        following  the id after each row, of which those after `last` are not known: any number
        """
        device, padding = self.model.device, [-1] * (len(step.rows.slot) - len(ids))
        fed = to_device([*ids, *padding], device)
        streams = self.prompt_streams(step, fed)
        at = to_device(last, device)
        slots = step.rows.slot[at]
        chosen = at
        if last:
            logits = self.model.trunk.logits(streams[at])
            position = step.rows.position[at] + 1
            chosen = self.table.draw(logits, slots, position, is_filtered=True)
            self.table.token[slots] = chosen
        self._draft_prompts(step, fed, streams, [*following, *padding], at, chosen)
        return _to_host(chosen)

    @torch.inference_mode()
    def prompt_streams(self, step: Step, ids: Tensor) -> Tensor:
        """ids [T] of all rows of a step, -1 for padding -> streams [T, N, D]

        The next step overwrites them.
        """
        run = self._prompts.get(len(ids))
        if run is None:
            return self.model.streams(step, ids, is_prefill=True)
        self._fed[: len(ids)] = ids
        return run()

    def _draft_prompts(
        self, step: Step, ids: Tensor, streams: Tensor, following: Sequence[int], at: Tensor,
        chosen: Tensor,
    ) -> None:  # fmt: skip
        """Nothing: see DraftingStepper."""

    @torch.inference_mode()
    def decode(self, step: Step, count: int, is_filtered: bool) -> Pending:
        """One more token for each of the first `count` requests of a padded step."""
        return _to_host(self.run_decode(step, is_filtered)[..., :count])

    @torch.inference_mode()
    def run_decode(self, step: Step, is_filtered: bool) -> Tensor:
        """The same for all rows, without a copy to the host."""
        run = self._graphs.get((len(step.rows.slot) // self.rows_each, is_filtered))
        return run() if run is not None else self._decode(step, is_filtered)

    @torch.inference_mode()
    def run_eagerly(self, step: Step, is_filtered: bool) -> Tensor:
        """The same without a graph, whatever was captured: taps see it."""
        return self._decode(step, is_filtered)

    def _decode(self, step: Step, is_filtered: bool) -> Tensor:
        rows = step.rows
        live, at = self._table_rows(rows.slot)
        ids = torch.where(live, self.table.token[at], -1)
        streams = self.model.streams(step, ids, is_prefill=False)
        logits = self.model.trunk.logits(streams)
        chosen = self.table.draw(logits, at, rows.position + 1, is_filtered)
        self.table.token[at] = chosen
        return chosen

    def _table_rows(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are live, and the row of the table of each; padding has the last."""
        live = slot >= 0
        return live, torch.where(live, slot, len(self.table.token) - 1)

    @torch.inference_mode()
    def capture(self) -> None:
        """Compile and record every step that is padded; afterwards none compiles or allocates.

        The rows are padding meanwhile: what a step reads of a request lies on the device and is
        looked up when the graph runs.
        """
        if not self.use_graphs:
            return
        device = self.model.device
        for size in reversed(self.prompt_sizes):  # the largest first: others fit in its memory
            with self._only_padding(size) as step:
                work = partial(self.model.streams, step, self._fed[:size], is_prefill=True)
                self._prompts[size] = record(work, device, self._pool)
        for size in reversed(self.sizes):
            for is_filtered in (False, True):
                with self._only_padding(size * self.rows_each) as step:
                    work = partial(self._decode, step, is_filtered)
                    self._graphs[size, is_filtered] = record(work, device, self._pool)

    @contextmanager
    def _only_padding(self, num_rows: int) -> Iterator[Step]:
        step = self.model.prepare([], num_rows)
        try:
            yield step
        finally:
            step.abort()

    def warm_up(self) -> None:
        """After `capture`: run prompts of all kinds of sizes, so that what is eager is compiled."""
        most = self.model.limits.max_requests
        eager = {n for n in size_classes(self.model.limits.max_rows) if not self.padded_prompt(n)}
        for num_rows in sorted({*eager, *size_classes(most)}, reverse=True):
            with prompts(self.model, num_rows, self.padded_prompt(num_rows)) as step:
                if step is not None:
                    ids, count = [0] * num_rows, num_rows if num_rows <= most else 1
                    self.prefill(step, ids, ids, range(count))
        for size in self.prompt_sizes:  # also those that the cache has no room for
            with self._only_padding(size) as step:
                self.prefill(step, [], [], [])


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Int64 numbers, copied without waiting for the steps that were queued before."""
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _to_host(tokens: Tensor) -> Pending:
    if tokens.device.type != "cuda":
        return Pending(tokens.clone(), None)
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Pending(host, event)
