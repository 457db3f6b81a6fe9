"""Compile the CUDA C++ kernels ahead of time with NVRTC; part of tools/aot.py."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from types import ModuleType

import triton

Result = tuple[str, str, str]  # name of a kernel, line to print, what is wrong or ""


def compile_cuda(module: ModuleType) -> Iterator[Result]:
    """Every source of a kernel for Hopper."""
    name = module.SPEC.name
    for source, instruction in module.sources():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(source.compile("sm_90a"))
            file.flush()
            tool = triton.knobs.nvidia.nvdisasm.path
            code = subprocess.run([tool, file.name], capture_output=True, text=True, check=True)
        wrong = "" if re.search(instruction, code.stdout) else f"holds no {instruction}"
        shape = " ".join(f"{key}={value}" for key, value in source.defines)
        yield name, f"{name:28} sm_90a {shape}  {wrong or 'ok'}", wrong
