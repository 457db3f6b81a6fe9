"""Work on the device, recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dsv4.core.errors import DeviceUnavailable
from dsv4.kernels.common.cuda import shared_counters

WARM_UPS = 2  # runs before the capture: they compile kernels and allocate what those keep


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: kernels keep memory for each stream that they have run on."""
    return torch.cuda.Stream(device)


def record(
    work: Callable[[], Tensor], device: torch.device, pool: tuple[int, int] | None = None
) -> Callable[[], Tensor]:
    """Run `work` until it is compiled, then record it; -> what replays it.

    A replay reads what now lies in the tensors that `work` read, and its result is one tensor,
    which the next replay overwrites. Graphs that are recorded here must not run side by side: they
    share counters, and those of one `pool` (torch.cuda.graph_pool_handle) memory too.

    Raises DeviceUnavailable for a CPU, and what torch raises where `work` cannot be recorded.
    """
    if device.type != "cuda":
        raise DeviceUnavailable(str(device), "CUDA graphs are recorded on a GPU")
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with shared_counters(device), torch.cuda.graph(graph, pool=pool):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
