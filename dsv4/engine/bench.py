"""How long steps of the production model take on a GPU, and where the time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from dsv4.cache.request import CachedRequest, Step
from dsv4.core.sampling import SamplingParams
from dsv4.engine.model import ProductionModel
from dsv4.engine.stepper import Stepper

REPLAYS, WARM_UPS = 30, 3
FILL_LOW, FILL_HIGH = 0x30, 0x40  # bytes that are small numbers as FP8, BF16, UE8M0 and FP32


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

    @property
    def launches(self) -> int:
        """Kernels and copies of one step."""
        return sum(kernel.launches for kernel in self.kernels)


def fill_contexts(model: ProductionModel, count: int, context: int) -> list[CachedRequest]:
    """Requests of `context` tokens whose cache holds numbers, but no text: nothing is computed."""
    for store in (model.storage.pages, model.storage.states):
        store.random_(FILL_LOW, FILL_HIGH)
    requests = [model.cache.admit() for _ in range(count)]
    for request in requests:
        while request.length < context:
            n = min(context - request.length, model.limits.max_rows)
            model.cache.prepare([(request, n)]).commit()
    return requests


def time_decode(
    stepper: Stepper, requests: list[CachedRequest], trace: Path | None = None
) -> StepTime:
    """One decode step of all `requests`, replayed: greedy, the same position every time."""
    for request in requests:
        assert request.slot is not None
        stepper.table.set(request.slot, SamplingParams(temperature=0), seed=0, token=7)
    step = stepper.model.prepare([(r, 1) for r in requests], stepper.padded(len(requests)))

    def run() -> None:
        stepper.decode(step, len(requests), is_filtered=False)

    result = _measure(run, trace)
    step.abort()
    return result


def time_prefill(model: ProductionModel, num_tokens: int, trace: Path | None = None) -> StepTime:
    """A prompt of `num_tokens` in one step, logits of the last token included."""
    request = model.cache.admit()
    step: Step = model.prepare([(request, num_tokens)])
    ids = torch.randint(0, model.config.vocab_size, (num_tokens,), device=model.device)

    @torch.inference_mode()
    def run() -> None:
        model.trunk.logits(model.streams(step, ids, is_prefill=True)[-1:])

    result = _measure(run, trace)
    step.abort()
    model.cache.release(request)
    return result


def _measure(run: Callable[[], None], trace: Path | None) -> StepTime:
    for _ in range(WARM_UPS):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
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
