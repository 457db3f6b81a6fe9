"""Every kernel under compute-sanitizer; needs a GPU and the tool, from CUDA's toolkit.

`python tools/sanitize.py [--family NAME ...] [--tool memcheck racecheck] [--jobs N] [--json FILE]`

Each family of kernels runs in a process of its own for each tool, several at a time: all calls of
dsv4.testing.small_calls at three numbers of tokens, every allocation by itself, so that what lies
beside a tensor is nobody's. The exit status is 1 if anything was found or did not run.
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
from pathlib import Path

from sanitize_report import Result, read_log, table

from dsv4.testing.small_calls import FAMILIES, TOKENS

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
    path = os.pathsep.join(
        [os.environ.get("PATH", ""), *([f"{home}/bin"] if home else []), *PLACES]
    )
    if found := shutil.which("compute-sanitizer", path=path):
        return found
    raise SanitizerMissing(MISSING)


def sanitize(program: str, family: str, tool: str, tokens: Sequence[int], limit: float) -> Result:
    """Run one family under one tool."""
    command = [
        program, "--tool", tool, "--report-api-errors", "no", "--print-limit", "5",
        sys.executable, str(CHILD), family, *map(str, tokens),
    ]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_MODULE_LOADING": "LAZY"}
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
    seconds = time.perf_counter() - start
    return read_log(family, tool, log.decode(errors="replace"), seconds, is_over)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", help="families of kernels; all unless given")
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="of a call; three numbers unless given"
    )
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--limit", type=float, default=280, help="seconds of a process")
    parser.add_argument("--json", type=Path, help="file for the results")
    flags = parser.parse_args(argv)
    flags.tokens = flags.tokens or TOKENS
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
    work = [(family, tool) for family in flags.family for tool in reversed(flags.tool)]
    with ThreadPoolExecutor(flags.jobs) as pool:
        tasks = [pool.submit(sanitize, program, *x, flags.tokens, flags.limit) for x in work]
        results = []
        for task in tasks:
            results.append(task.result())
            r = results[-1]
            print(f"{r.family} {r.tool}: {r}, {r.calls} calls, {r.seconds:.0f} s", flush=True)
    print(table(results, flags.tool))
    if flags.json:
        flags.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return 0 if all(r.is_clean for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
