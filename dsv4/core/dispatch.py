"""Pick the first kernel that supports a device; say why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from dsv4.core.errors import KernelUnavailable


@dataclass(frozen=True)
class KernelSpec:
    """What one kernel needs.

    name           "kv_window_append/triton": the op, then what tells the variants apart
    launch         fills or changes the tensors it is given; allocates and reads back nothing
    arch           majors of compute capability it runs on; empty means any CUDA device
    runs_on_cpu    whether it takes CPU tensors: Triton under its interpreter does
    deterministic  whether equal inputs give equal bits
    requires       gives the reason why it cannot run in this installation, or None
    """

    name: str
    launch: Callable[..., None]
    arch: tuple[int, ...] = ()
    runs_on_cpu: bool = False
    deterministic: bool = True
    requires: Callable[[], str | None] = lambda: None

    def why_not(self, device: torch.device) -> str | None:
        """The reason why the kernel cannot run on `device`, or None if it can."""
        if reason := self.requires():
            return reason
        if device.type == "cpu":
            return None if self.runs_on_cpu else "needs a CUDA device, or TRITON_INTERPRET=1"
        if device.type != "cuda":
            return f"needs a CUDA device, the tensors are on {device}"
        major = torch.cuda.get_device_capability(device)[0]
        if self.arch and major not in self.arch:
            return f"needs SM {'/'.join(map(str, self.arch))}x, the device is SM {major}x"
        return None


@cache
def select(kernels: tuple[KernelSpec, ...], device: torch.device) -> KernelSpec:
    """The first of `kernels` that runs on `device`, best first.

    Raises KernelUnavailable with the reason of each.
    """
    reasons = [(kernel, kernel.why_not(device)) for kernel in kernels]
    for kernel, reason in reasons:
        if reason is None:
            return kernel
    raise KernelUnavailable("; ".join(f"{kernel.name}: {reason}" for kernel, reason in reasons))
