"""Every kernel under compute-sanitizer; needs a GPU and the tool, from CUDA's toolkit.

`python tools/sanitize.py [--family NAME ...] [--tool memcheck racecheck] [--jobs N] [--json FILE]`

All calls of dsv4.testing.small_calls, every allocation by itself, so that what lies beside a tensor
is nobody's. Each family of kernels runs in a process of its own for each tool and each number of
tokens, several at a time, on all GPUs that CUDA_VISIBLE_DEVICES leaves, in turn. The exit status is
1 if anything was found or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path

import torch
from sanitize_report import Result, joined, read_log, table

from dsv4.testing.small_calls import FAMILIES

TOOLS = "memcheck", "racecheck"
PLACES = "/usr/local/cuda/bin", "/opt/cuda/bin"
MISSING = (
    "compute-sanitizer: expected on PATH, in $CUDA_HOME/bin or /usr/local/cuda/bin, found none: "
    "install CUDA's toolkit, or pip install nvidia-cuda-sanitizer-api and put its bin on PATH"
)
CHILD = Path(__file__).with_name("sanitize_run.py")


class SanitizerMissing(Exception):
    """There is no compute-sanitizer."""


def find_sanitizer() -> str:
    """The program. Raises SanitizerMissing."""
    home = os.environ.get("CUDA_HOME")
    own = [f"{home}/bin"] if home else []
    path = os.pathsep.join([os.environ.get("PATH", ""), *own, *PLACES])
    if found := shutil.which("compute-sanitizer", path=path):
        return found
    raise SanitizerMissing(MISSING)


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one GPU each."""
    there = ",".join(str(i) for i in range(max(torch.cuda.device_count(), 1)))
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or there).split(",")


def sanitize(
    program: str, family: str, tool: str, tokens: int, gpu: str, limit: float, log_to: Path | None
) -> Result:
    """Run one family under one tool; what it says goes to `log_to` if it is not all well."""
    command = [
        program, "--tool", tool, "--report-api-errors", "no", "--print-limit", "5",
        sys.executable, str(CHILD), family, str(tokens),
    ]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_MODULE_LOADING": "LAZY", "CUDA_VISIBLE_DEVICES": gpu}
    start, is_over = time.perf_counter(), False
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        is_over = True
        os.killpg(child.pid, signal.SIGKILL)  # what it watches too
        log, _ = child.communicate()
    text = log.decode(errors="replace")
    result = read_log(family, tool, text, time.perf_counter() - start, is_over)
    if log_to and (result.warnings or not result.is_clean):
        with log_to.open("a") as f:
            f.write(f"==== {family} {tool}, {tokens} tokens\n{text}\n")
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", help="families of kernels; all unless given")
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--tokens", type=int, nargs="+", help="of a call; each family has its own")
    parser.add_argument("--jobs", type=int, help="at a time (8 for a GPU, with two cores each)")
    parser.add_argument("--limit", type=float, default=280, help="seconds of a process")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--log", type=Path, help="file for what was said where not all is well")
    flags = parser.parse_args(argv)
    flags.jobs = flags.jobs or max(1, min(8 * len(gpus()), (os.cpu_count() or 2) // 2))
    flags.family = flags.family or list(FAMILIES)
    if unknown := set(flags.family) - set(FAMILIES):
        parser.error(f"--family: expected some of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    try:
        program = find_sanitizer()
    except SanitizerMissing as error:
        print(error, file=sys.stderr)
        return 2
    turns, tasks, parts = cycle(gpus()), {}, []
    with ThreadPoolExecutor(flags.jobs) as pool:
        for family, tool in product(flags.family, reversed(flags.tool)):
            for tokens in sorted(flags.tokens or FAMILIES[family].tokens, reverse=True):
                work = program, family, tool, tokens, next(turns), flags.limit, flags.log
                tasks[pool.submit(sanitize, *work)] = tokens
        for task, tokens in tasks.items():
            parts.append(r := task.result())
            about = f"{r.family} {r.tool}, {tokens} tokens: {r}, {r.calls} calls"
            print(f"{about}, {r.seconds:.0f} s", flush=True)
    results = joined(parts)
    print(table(results, flags.tool))
    if flags.json:
        flags.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return 0 if all(r.is_clean for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
