"""What compute-sanitizer watches; part of tools/sanitize.py.

`python tools/sanitize_run.py FAMILY TOKENS ...`
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from aot import kernels
from torch import Tensor

from dsv4.core.errors import KernelUnavailable
from dsv4.testing.small_calls import FAMILIES, Family


def family_calls(
    family: Family, tokens: int, modules: Mapping[str, list[ModuleType]]
) -> Iterator[tuple[str, ModuleType, dict[str, Any]]]:
    """Every kernel of the family with every call of its op."""
    for name, args in family.calls(tokens).items():
        for module in modules[name.partition("/")[0]]:
            if any(part in module.SPEC.name for part in family.kernels):
                yield name, module, args


def on(device: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the arguments there, so that calls that write do not see each other."""
    return {k: x.to(device, copy=True) if isinstance(x, Tensor) else x for k, x in args.items()}


def launch(module: ModuleType, args: Mapping[str, Any]) -> None:
    """One call of a kernel, its results left alone."""
    makers = {"out": "outputs", "scratch": "scratch"}
    made = {k: getattr(module, f)(**args) for k, f in makers.items() if hasattr(module, f)}
    module.launch(**args, **made)


def run_family(name: str, tokens: Iterable[int]) -> None:
    """What the sanitizer watches: all calls of a family on this machine's GPU."""
    if not torch.cuda.is_available():
        raise KernelUnavailable(f"{name}: needs a CUDA device")
    device, modules, count = torch.device("cuda"), kernels(), 0
    for T in tokens:
        for call, module, args in family_calls(FAMILIES[name], T, modules):
            if module.SPEC.why_not(device):
                continue
            try:
                launch(module, on("cuda", args))
            except KernelUnavailable as error:  # of this many tokens, say
                print(f"{call}, {T} tokens: {error}")
                continue
            torch.cuda.synchronize()
            count += 1
    print(f"ran {count} calls", flush=True)


if __name__ == "__main__":
    run_family(sys.argv[1], map(int, sys.argv[2:]))
