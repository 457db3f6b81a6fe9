"""Compile every kernel ahead of time for Hopper and Blackwell; no GPU is needed.

`python tools/aot.py [--arch 90 100] [--only NAME]`

The arguments of the cases go through each kernel's own `launch`, which is stopped where it would
start the device function; so the signature and the constants are those of a real call.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import triton
from aot_cuda import Result, compile_cuda
from aot_ptx import problem
from aot_source import source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import dsv4.kernels
from dsv4.kernels.common.cuda import nvrtc_version
from dsv4.testing.cases import aot_calls


def kernels() -> dict[str, list[ModuleType]]:
    """Modules of dsv4.kernels that have a SPEC, under the name of their op."""
    found: dict[str, list[ModuleType]] = {}
    for _, name, is_package in pkgutil.walk_packages(dsv4.kernels.__path__, "dsv4.kernels."):
        module = None if is_package else import_module(name)
        if module is not None and hasattr(module, "SPEC"):
            found.setdefault(module.REFERENCE.partition(":")[2], []).append(module)
    return found


def runs_on(module: ModuleType, arch: int) -> bool:
    """Whether the kernel is for that architecture."""
    return not module.SPEC.arch or arch // 10 in module.SPEC.arch


def device_calls(module: ModuleType, args: dict[str, Any]) -> Iterator[tuple[ASTSource, dict]]:
    """Every device function that `launch` would start, with its compile options."""
    started: list[tuple[ASTSource, dict]] = []

    def record(fn: JITFunction, *values: Any, **kwargs: Any) -> None:
        own = {k: v for k, v in kwargs.items() if k in fn.arg_names}
        options = {k: v for k, v in kwargs.items() if k not in (*own, "grid", "warmup")}
        started.append((source(fn, values, own), options))

    makers = {"out": "outputs", "scratch": "scratch"}
    out = {k: getattr(module, f)(**args) for k, f in makers.items() if hasattr(module, f)}
    with mock.patch.object(JITFunction, "run", record):
        module.launch(**args, **out)
    return iter(started)


def compile_for(target: GPUTarget, ast: ASTSource, options: dict) -> Any:
    """Compiled code; kernels that ask which target they are compiled for are told this one."""
    driver = SimpleNamespace(get_current_target=lambda: target)
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        return triton.compile(ast, target=target, options=options)


def compile_call(name: str, args: dict[str, Any], arches: Sequence[int]) -> Iterator[Result]:
    """Every device function of one call for every architecture."""
    for module in kernels()[name.partition("/")[0]]:
        expected = getattr(module, "tensor_core", lambda arch, args: None)
        products = getattr(module, "PRODUCTS", None)  # device functions that hold it; None: all
        for ast, options in () if hasattr(module, "sources") else device_calls(module, args):
            for arch in (a for a in arches if runs_on(module, a)):
                code = compile_for(GPUTarget("cuda", arch, 32), ast, options)
                is_product = products is None or ast.fn.__name__ in products
                instruction = expected(arch, args) if is_product else None
                wrong = problem(code.asm["ptx"], options, instruction)
                size, shared = len(code.asm["cubin"]), code.metadata.shared
                line = f"{name:28} sm_{arch} {size:7} B {shared:6} B shared  {wrong or 'ok'}"
                yield module.SPEC.name, line, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 100])
    parser.add_argument("--only", default="", help="part of a call's name")
    flags = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: it leaves nothing to compile")
    found, compiled, failures = kernels(), set(), 0
    results = [compile_call(n, a, flags.arch) for n, a in aot_calls().items() if flags.only in n]
    cuda = [m for group in found.values() for m in group if hasattr(m, "sources")]
    if 90 in flags.arch:
        print("NVRTC", ".".join(str(n) for n in nvrtc_version()))
        results += [compile_cuda(m) for m in cuda if flags.only in m.SPEC.name]
    for name, line, wrong in chain.from_iterable(results):
        print(line, flush=True)
        compiled.add(name)
        failures += bool(wrong)
    if 90 not in flags.arch:
        compiled |= {m.SPEC.name for m in cuda}
    wanted = [
        m for group in found.values() for m in group if any(runs_on(m, a) for a in flags.arch)
    ]
    missing = {m.SPEC.name for m in wanted} - compiled
    if missing and not flags.only:
        print("no case for:", ", ".join(sorted(missing)))
        failures += len(missing)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
