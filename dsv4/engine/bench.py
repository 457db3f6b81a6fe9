"""How long steps of the production model take on a GPU, and where the time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dsv4.cache.request import CachedRequest, Step
from dsv4.core.kv_layout import KvRecord
from dsv4.core.sampling import SamplingParams
from dsv4.core.taps import capture
from dsv4.engine.model import ProductionModel
from dsv4.engine.stepper import Stepper

REPLAYS, RUNS, WARM_UPS = 11, 5, 3  # measurements, steps between two events, steps before
LONG_US = 5e4  # steps beyond it are measured one at a time, three times
FILL_LOW, FILL_HIGH = 0x30, 0x40  # bytes that are small numbers as FP8, BF16 and FP32
SCALE_LOW, SCALE_HIGH = 0x7C, 0x80  # UE8M0: 1/8 to 1


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in a step."""

    name: str
    launches: int
    us: float


@dataclass(frozen=True)
class StepTime:
    """One step: median time, and its kernels, the slowest first. Their sum may exceed the time,
    where kernels overlap, or fall short of it, where there are gaps."""

    us: float
    kernels: tuple[KernelTime, ...]
    experts_hit: float = 0.0  # different ones a layer, on average

    @property
    def launches(self) -> int:
        """Kernels and copies of one step."""
        return sum(kernel.launches for kernel in self.kernels)


def fill_contexts(model: ProductionModel, count: int, context: int) -> list[CachedRequest]:
    """Requests of `context` tokens whose cache holds numbers, but no text: nothing is computed."""
    schema, config = model.storage.schema, model.config
    for store in (model.storage.pages, model.storage.states):
        store.random_(FILL_LOW, FILL_HIGH)
    for layer, views in zip(schema.layers, model.storage.layers, strict=True):
        _fill_scales(views.window, config.sliding_window, KvRecord.of(config))
        if views.entries is not None:
            _fill_scales(views.entries, layer.entries_per_page, KvRecord.of(config))
    requests = [model.cache.admit() for _ in range(count)]
    for request in requests:
        while request.length < context:
            n = min(context - request.length, model.limits.max_rows)
            model.cache.prepare([(request, n)]).commit()
    return requests


def _fill_scales(pages: Tensor, rows: int, record: KvRecord) -> None:
    """Scales near 1 in every record: else all keys would be zeros, and all tokens alike."""
    pages[:, rows * record.data_bytes : rows * record.nbytes].random_(SCALE_LOW, SCALE_HIGH)


def time_decode(
    stepper: Stepper, requests: list[CachedRequest], trace: Path | None = None
) -> StepTime:
    """One decode step of all `requests`, replayed at the same position, each drawing its own way.

    Tokens go from step to step, so experts change; `experts_hit` is what one step hits.
    """
    vocabulary = stepper.model.config.vocab_size
    for i, request in enumerate(requests):
        assert request.slot is not None
        params = SamplingParams(temperature=1.0)
        stepper.table.set(request.slot, params, seed=i, token=(7919 * (i + 1)) % vocabulary)
    num_rows = stepper.rows_each * stepper.padded(len(requests))
    step = stepper.model.prepare([(r, stepper.rows_each) for r in requests], num_rows)
    try:
        with capture(["*.router.ids"]) as taps:
            stepper.run_eagerly(step, is_filtered=False)
        hit = [len(ids[ids >= 0].unique()) for ids in taps.tensors().values()]
        result = _measure(lambda: stepper.run_decode(step, is_filtered=False), trace)
        return replace(result, experts_hit=sum(hit) / len(hit))
    finally:
        step.abort()


def time_prefill(stepper: Stepper, num_tokens: int, trace: Path | None = None) -> StepTime:
    """A prompt of `num_tokens` in one step, logits of the last token included."""
    model = stepper.model
    request = model.cache.admit()
    num_rows = stepper.padded_prompt(num_tokens) or num_tokens
    step: Step = model.prepare([(request, num_tokens)], num_rows)
    ids = torch.full((num_rows,), -1, device=model.device)
    ids[:num_tokens].random_(model.config.vocab_size)

    @torch.inference_mode()
    def run() -> None:
        streams = stepper.prompt_streams(step, ids)
        model.trunk.logits(streams[num_tokens - 1 : num_tokens])

    try:
        return _measure(run, trace)
    finally:
        step.abort()
        model.cache.release(request)


def _measure(run: Callable[[], object], trace: Path | None) -> StepTime:
    for _ in range(WARM_UPS - 1):
        run()
    is_long = _elapsed_us(run, 1) > LONG_US
    replays, runs = (3, 1) if is_long else (REPLAYS, RUNS)
    times = [_elapsed_us(run, runs) for _ in range(replays)]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    totals: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name][0] += 1
            totals[event.name][1] += event.device_time
    kernels = (KernelTime(name, int(n), us) for name, (n, us) in totals.items())
    return StepTime(median(times), tuple(sorted(kernels, key=lambda k: -k.us)))


def _elapsed_us(run: Callable[[], object], runs: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / runs
