"""A stand-in for CUDA graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.cache.request import Step
from dsv4.engine import stepper


class Recorder:
    """Stands for `record`: a replay reads the tensors that the work read, and writes one result."""

    def __init__(self) -> None:
        self.num_replays, self.broken = 0, False

    def __call__(
        self, work: Callable[[], Tensor], device: torch.device, pool: tuple[int, int] | None = None
    ) -> Callable[[], Tensor]:
        result = work().clone()

        def replay() -> Tensor:
            if self.broken:
                raise RuntimeError("the device is lost")
            self.num_replays += 1
            return result.copy_(work())

        return replay


def record_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Let Steppers that use graphs record with what this returns."""
    found = Recorder()
    monkeypatch.setattr(stepper, "record", found)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    # A graph reads the buffers on the device, whichever step they are of by now.
    monkeypatch.setattr(Step, "rows", property(lambda step: step._rows))
    return found
