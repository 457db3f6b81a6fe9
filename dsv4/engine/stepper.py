"""Steps on the device: forward, the choice of the next tokens, one CUDA graph for each batch size.

The last token of a request stays on the device, in the row of its slot, so that the next step is
queued before the host has seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv4.cache.request import Step
from dsv4.core.sampling import SamplingParams
from dsv4.engine.graphs import record
from dsv4.engine.model import ProductionModel
from dsv4.engine.warm_up import prompts, size_classes
from dsv4.layers.batch import Batch
from dsv4.ops.sampling import sample

DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64)
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
    use_graphs  capture decode steps (CUDA); else they run eagerly
    """

    rows_each = 1  # rows of a decode step that a request has

    def __init__(
        self, model: ProductionModel, sizes: Sequence[int] = DECODE_SIZES,
        use_graphs: bool | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        most = model.limits.max_requests
        self.sizes = sorted({min(size, most) for size in sizes} | {most})
        self.use_graphs = model.device.type == "cuda" if use_graphs is None else use_graphs
        self.table = SlotTable(most, model.device)
        self._graphs: dict[tuple[int, bool], Callable[[], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.use_graphs else None

    def padded(self, count: int) -> int:
        """The size of the decode step that serves `count` requests."""
        return next(size for size in self.sizes if size >= count)

    @torch.inference_mode()
    def prefill(
        self, step: Step, ids: Sequence[int], following: Sequence[int], last: Sequence[int]
    ) -> Pending:
        """Run the chunks of a step; choose a token after each row of `last`.

        following  the id after each row, of which those after `last` are not known: any number
        """
        device = self.model.device
        batch = self.model.batch(step, to_device(ids, device), is_prefill=True)
        streams = self.model.trunk.streams(batch, self.model.storage)
        at = to_device(last, device)
        slots = step.rows.slot[at]
        chosen = at
        if last:
            logits = self.model.trunk.logits(streams[at])
            position = step.rows.position[at] + 1
            chosen = self.table.draw(logits, slots, position, is_filtered=True)
            self.table.token[slots] = chosen
        self._draft_prompts(batch, streams, following, at, chosen)
        return _to_host(chosen)

    def _draft_prompts(
        self, batch: Batch, streams: Tensor, following: Sequence[int], at: Tensor, chosen: Tensor
    ) -> None:
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

    def warm_up(self) -> None:
        """Run prompts of all kinds of sizes: afterwards no kernel of a prompt is compiled."""
        most = self.model.limits.max_requests
        sizes = {*size_classes(self.model.limits.max_rows), *size_classes(most)}
        for num_rows in sorted(sizes, reverse=True):  # the largest first, as in `capture`
            with prompts(self.model, num_rows) as step:
                if step is not None:
                    ids, count = [0] * num_rows, num_rows if num_rows <= most else 1
                    self.prefill(step, ids, ids, range(count))

    @torch.inference_mode()
    def capture(self) -> None:
        """Compile and record every decode step; afterwards none compiles or allocates.

        The rows are padding meanwhile: what a step reads of a request lies on the device and is
        looked up when the graph runs.
        """
        if not self.use_graphs:
            return
        for size in reversed(self.sizes):  # the largest first: later graphs fit in its memory
            for is_filtered in (False, True):
                step = self.model.prepare([], num_rows=size * self.rows_each)
                work = partial(self._decode, step, is_filtered)
                self._graphs[size, is_filtered] = record(work, self.model.device, self._pool)
                step.commit()


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
