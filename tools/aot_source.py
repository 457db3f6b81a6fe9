"""What Triton would compile for a call; part of tools/aot.py."""

from __future__ import annotations

from typing import Any

import torch
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32",
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv", torch.int8: "*i8", torch.int16: "*i16", torch.bool: "*i1",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


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
