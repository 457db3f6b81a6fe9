"""Compile the CUDA C++ kernels ahead of time with NVRTC; part of tools/aot.py."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from types import ModuleType

import triton

Result = tuple[str, str, str]  # name of a kernel, line to print, what is wrong or ""
LABEL = re.compile(r"(\.L\w+):")
STEP = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@\S+ )?([A-Z]\S*)([^;]*);")
WRITE = re.compile(r"(ST|STG|ATOM|ATOMG|RED|REDG|UTMASTG|UTMAREDG|UBLKRED)(\.|$)")


def early_write(code: str) -> str:
    """Where a kernel can write to global memory without having waited for the one before, or "".

    code  as nvdisasm prints it; what neither waits nor lets the next start is launched normally
    """
    for text in re.split(r"\n\.text\.", code)[1:]:
        steps: list[tuple[str, str, str]] = []  # guard, instruction, operands
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(steps)
            elif step := STEP.search(line):
                steps.append((step[1] or "", step[2], step[3].strip()))
        overlaps = any(name in ("ACQBULK", "PREEXIT") for _, name, _ in steps)
        todo, seen = [0] if overlaps else [], set()
        while todo:  # all that is reached without passing the wait
            at = todo.pop()
            if at in seen or at == len(steps):
                continue
            seen.add(at)
            guard, name, operands = steps[at]
            if WRITE.match(name) or name.startswith(("BRX", "JMX")):
                return f"{text.partition(':')[0]}: {name} may come before the wait"
            target = re.search(r"`\((\.L\w+)\)", operands)
            if target and name.startswith(("BRA", "CALL", "JMP")):
                todo.append(labels[target[1]])
            is_jump = name == "BRA" and operands.startswith("`")
            if guard or not (is_jump or name in ("ACQBULK", "EXIT")):
                todo.append(at + 1)
    return ""


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
        wrong = wrong or early_write(code.stdout)
        shape = " ".join(f"{key}={value}" for key, value in source.defines)
        yield name, f"{name:28} sm_90a {shape}  {wrong or 'ok'}", wrong
