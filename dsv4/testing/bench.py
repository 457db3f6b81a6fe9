"""Kernel timing: graph replays, warm and cold L2, next to a baseline and the roofs of the same run.

A row is one JSON object, the same for people (a line of a table) and for the baselines on file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

COLD_BYTES = 128 << 20  # what passes through L2 between two uses of a line; H200's L2 is 50 MB
LATENCY_US = 2.0  # a kernel whose bytes take less than this has no roof worth naming
LAUNCHES, REPLAYS = 32, 25

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One thing to time.

    op, shape    key of the row
    calls        the same work on different buffers; timing goes round them
    nbytes       what one call must move through device memory, counted from shapes
    flops        floating point operations of one call
    is_compute   whether the matrix units decide, and not the bytes; the roof is theirs then
    baseline     name of what it is compared with, and its calls
    """

    op: str
    shape: dict[str, int | str]
    calls: Sequence[Call]
    nbytes: int
    flops: int = 0
    is_compute: bool = False
    baseline: str | None = None
    baseline_calls: Sequence[Call] = ()


@dataclass(frozen=True)
class Row:
    """One measurement.

    roof  share of the read bandwidth, or of the BF16 rate, of the same run; null where neither
          is the limit
    """

    op: str
    shape: dict[str, int | str]
    us: float
    gbps: float
    tflops: float
    roof: float | None
    l2: str
    baseline: str | None
    baseline_us: float | None
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def copy_calls(num_bytes: int, copies: int) -> list[Call]:
    """Device copies that move `num_bytes` each, half read and half written."""
    half = max(num_bytes // 2, 1)
    pairs = torch.empty(copies, 2, half, dtype=torch.uint8, device="cuda")

    def copy(pair: Tensor) -> Call:
        source, target = pair.unbind()
        return lambda: target.copy_(source)

    return [copy(pair) for pair in pairs]


def read_gbps() -> float:
    """Read bandwidth of the device: a sum over 4 GiB."""
    x = torch.ones(1 << 30, device="cuda")
    out = torch.empty((), device="cuda")
    us = _replay_us([lambda: torch.sum(x, dim=0, out=out)], 4)
    return nbytes(x) / us / 1e3


def bf16_tflops() -> float:
    """Rate of a BF16 matrix product of normal numbers, 8192 wide."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    out = torch.empty_like(a)
    us = _replay_us([lambda: torch.mm(a, b, out=out)], 4)
    return 2 * 8192**3 / us / 1e6


def warm_us(calls: Sequence[Call]) -> float:
    """Microseconds of one call when its data was used just before."""
    return _replay_us(calls[:1], LAUNCHES)


def cold_us(calls: Sequence[Call], num_bytes: int) -> float:
    """Microseconds of one call when L2 holds none of its data.

    Goes round the buffers if together they exceed L2 by far. If not, L2 is swept between calls,
    and the time of the sweeps alone is subtracted; that is good to some tenths of a microsecond.
    """
    if len(calls) * num_bytes >= COLD_BYTES:
        return _replay_us(calls, max(len(calls), LAUNCHES))
    sweep_data = torch.ones(COLD_BYTES // 4, device="cuda")
    out = torch.empty((), device="cuda")

    def sweep() -> object:
        return torch.sum(sweep_data, dim=0, out=out)

    with_call = [step for call in calls for step in (sweep, call)]
    pairs = LAUNCHES * 2
    both = _replay_us(with_call, pairs) * 2
    return both - _replay_us([sweep], LAUNCHES)


def measure(case: Case, peak_gbps: float, peak_tflops: float) -> list[Row]:
    """The cold and the warm row of a case."""
    times = {"cold": cold_us(case.calls, case.nbytes), "warm": warm_us(case.calls)}
    base: dict[str, float | None] = {"cold": None, "warm": None}
    if case.baseline_calls:
        base["cold"] = cold_us(case.baseline_calls, case.nbytes)
        base["warm"] = warm_us(case.baseline_calls)
    is_latency = case.nbytes / peak_gbps / 1e3 < LATENCY_US
    about = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": version("triton"), "commit": commit(), "date": date.today().isoformat(),
    }  # fmt: skip
    rows = []
    for l2, us in times.items():
        gbps = case.nbytes / us / 1e3
        # Warm data comes from L2, so device memory is no roof there.
        tflops = case.flops / us / 1e6
        if case.is_compute:
            roof = tflops / peak_tflops
        else:
            roof = None if is_latency or l2 == "warm" else gbps / peak_gbps
        key = case.op, case.shape, us, gbps, tflops, roof, l2
        rows.append(Row(*key, case.baseline, base[l2], **about))
    return rows


def run(cases: Iterable[Case], description: str) -> None:
    """Measure and print every case; `--json PATH` writes the rows, one object a line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="file the rows are added to")
    parser.add_argument("--only", default="", help="part of an op's name")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    peak = read_gbps()
    rate = bf16_tflops()
    print(f"read bandwidth {peak:.0f} GB/s, BF16 rate {rate:.0f} TFLOP/s")
    for case in cases:
        if flags.only not in case.op:
            continue
        for row in measure(case, peak, rate):
            print(_line(row))
            if flags.json:
                with flags.json.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")


def _replay_us(calls: Sequence[Call], launches: int) -> float:
    """Median microseconds of one of `launches` calls in a replayed graph."""
    work = list(islice(cycle(calls), launches))
    for call in calls:  # compile outside the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in work:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return median(times[3:]) / launches


def _line(row: Row) -> str:
    shape = " ".join(f"{k}={v}" for k, v in row.shape.items())
    roof = "latency" if row.roof is None else f"{row.roof:6.1%}"
    base = "" if row.baseline_us is None else f" {row.baseline} {row.baseline_us:.2f} us"
    rate = f"{row.gbps:6.0f} GB/s" + (f" {row.tflops:5.0f} TFLOP/s" if row.tflops else "")
    return f"{row.op:24} {shape:34} {row.l2} {row.us:9.2f} us {rate} {roof}{base}"


def commit() -> str:
    """The commit of the working folder, short, or "unknown"."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
