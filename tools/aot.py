"""Compile every kernel ahead of time for Hopper and Blackwell; no GPU is needed.

`python tools/aot.py [--arch 90 100] [--only NAME]`

The arguments of the cases go through each kernel's own `launch`, which is stopped where it would
start the device function; so the signature and the constants are those of a real call.
"""

from __future__ import annotations

import argparse
import pkgutil
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import dsv4.kernels
from dsv4.testing.cases import cache_calls

POINTERS = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


def kernels() -> dict[str, list[ModuleType]]:
    """Modules of dsv4.kernels that have a SPEC, under the name of their op."""
    found: dict[str, list[ModuleType]] = {}
    for _, name, is_package in pkgutil.walk_packages(dsv4.kernels.__path__, "dsv4.kernels."):
        module = None if is_package else import_module(name)
        if module is not None and hasattr(module, "SPEC"):
            found.setdefault(module.REFERENCE.partition(":")[2], []).append(module)
    return found


def source(fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ASTSource:
    """What Triton would compile for a call, specialised as it does at run time."""
    values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(fn.params):
        value = values[parameter.name]
        kind = _kind(value, parameter.is_constexpr)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif kind[0] == "*" or (kind[0] == "i" and value % 16 == 0):
            attributes[(i,)] = ALIGNED
    return ASTSource(fn, signature, constants, attributes)


def _kind(value: Any, is_constexpr: bool) -> str:
    if is_constexpr or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def device_calls(module: ModuleType, args: dict[str, Any]) -> Iterator[tuple[ASTSource, dict]]:
    """Every device function that `launch` would start, with its compile options."""
    started: list[tuple[ASTSource, dict]] = []

    def record(fn: JITFunction, *values: Any, **kwargs: Any) -> None:
        own = {k: v for k, v in kwargs.items() if k in fn.arg_names}
        options = {k: v for k, v in kwargs.items() if k not in (*own, "grid", "warmup")}
        started.append((source(fn, values, own), options))

    out = {"out": module.outputs(**args)} if hasattr(module, "outputs") else {}
    with mock.patch.object(JITFunction, "run", record):
        module.launch(**args, **out)
    return iter(started)


def problem(assembly: str, options: dict) -> str:
    """What is wrong with compiled code, or ""."""
    if not options.get("enable_fp_fusion", True) and re.search(r"\bfma\.rn", assembly):
        return "holds fma although the kernel forbids it"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 100])
    parser.add_argument("--only", default="", help="part of a call's name")
    flags = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: it leaves nothing to compile")
    modules, failures, compiled = kernels(), 0, set()
    for name, args in cache_calls(8, head_dim=512, page_tokens=256).items():
        if flags.only not in name:
            continue
        for module in modules[name.partition("/")[0]]:
            for ast, options in device_calls(module, args):
                for arch in flags.arch:
                    target = GPUTarget("cuda", arch, 32)
                    code = triton.compile(ast, target=target, options=options)
                    wrong = problem(code.asm["ptx"], options)
                    failures += bool(wrong)
                    compiled.add(module.SPEC.name)
                    size, shared = len(code.asm["cubin"]), code.metadata.shared
                    print(f"{name:28} sm_{arch} {size:7} B {shared:6} B shared  {wrong or 'ok'}")
    missing = {m.SPEC.name for group in modules.values() for m in group} - compiled
    if missing and not flags.only:
        print("no case for:", ", ".join(sorted(missing)))
        failures += len(missing)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
