"""Inputs of kernels, one module a family, for tests, benchmarks and ahead-of-time compilation."""

from __future__ import annotations

import os
import pkgutil
from importlib import import_module
from typing import Any

import torch

# The interpreter takes CPU tensors, and is chosen for a whole process.
DEVICE = (
    "cuda"
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    else "cpu"
)


def aot_calls() -> dict[str, dict[str, Any]]:
    """Arguments of every op at the sizes of the real models, under "op" or "op/variant".

    Collected from the `aot_calls` of each module here; all tensors are on the CPU.
    """
    calls: dict[str, dict[str, Any]] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        found = import_module(module.name).aot_calls()
        if twice := calls.keys() & found.keys():
            raise RuntimeError(f"{module.name}: expected new names, got {sorted(twice)} again")
        calls |= found
    return calls
