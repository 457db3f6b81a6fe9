"""Kernel timing: graph replays, warm and cold L2, next to a baseline and the roofs of the same run.

A row is one JSON object, the same for people (a line of a table) and for the baselines on file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NoReturn, ParamSpec

import torch
from torch import Tensor

COLD_BYTES = 128 << 20  # what passes through L2 between two uses of a line; H200's L2 is 50 MB
LATENCY_US = 2.0  # a kernel whose bytes take less than this has no roof worth naming
LAUNCHES, REPLAYS = 32, 15  # of short calls; of long ones as many as fit
GRAPH_US, MEASURE_US = 2e4, 1e5  # of one replay, and of all of them, about
WARM_US = 3e4  # of work before: clocks fall while a case is made, and take their time to rise
COMPILE_S = 20.0  # for all baselines of a run
RECOMPILES = 64  # of one oracle; torch gives up after 8

Call = Callable[[], object]
P = ParamSpec("P")


@dataclass(frozen=True)
class Case:
    """One thing to time.

    op, shape    key of the row
    calls        the same work on different buffers; timing goes round them
    nbytes       what one call must move through device memory, counted from shapes
    flops        floating point operations of one call
    is_compute   whether the matrix units decide, and not the bytes; the roof is theirs then
    baseline     name of what it is compared with, and its calls; none if it could not be had
    """

    op: str
    shape: dict[str, int | str]
    calls: Sequence[Call]
    nbytes: int
    flops: int = 0
    is_compute: bool = False
    baseline: str | None = None
    baseline_calls: Sequence[Call] = ()


Later = Callable[[], Case]
Turns = Iterable["Case | Later | Turns"]  # cases, some not yet made, some in groups


def later(make: Callable[P, Case]) -> Callable[P, Later]:
    """`make`, put off until the case's turn comes: what fails in it is one row, not the rest."""
    return lambda *args, **kwargs: partial(make, *args, **kwargs)


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


def copies(num_bytes: int, most: int = 48) -> int:
    """Sets of buffers to go round: enough to exceed L2, within reason."""
    return max(1, min(most, -(-COLD_BYTES // num_bytes)))


class CompiledOracle:
    """torch.compile of an oracle, the baseline of an op.

    Compiled for any number of tokens from the sizes of the first use on, which should have the
    most, and again for one token. All of a run share the seconds of `limit_s`; what comes later,
    or does not compile as one graph, has no calls, and the reason is printed.
    """

    NAME: ClassVar[str] = "torch.compile"
    limit_s: ClassVar[float] = COMPILE_S
    spent_s: ClassVar[float] = 0.0

    def __init__(self, oracle: Callable[..., Any], backend: str = "inductor") -> None:
        torch._dynamo.config.recompile_limit = RECOMPILES
        # Nothing but what is marked below varies: sizes of the model stay constants.
        self.function = torch.compile(oracle, fullgraph=True, dynamic=False, backend=backend)
        self.name = getattr(oracle, "__name__", repr(oracle))
        self.by_token: list[str] | None = None  # arguments with a row for each token

    def calls(self, args: Sequence[Mapping[str, Any]], tokens: int | None = None) -> list[Call]:
        """A call for each set of arguments, or none.

        tokens  their number; what has as many rows at the first use has a row for each
        """
        if self.by_token is None:
            self.by_token = [k for k, x in args[0].items() if _rows(x) == tokens is not None]
        for one in args:
            for name in self.by_token:
                torch._dynamo.maybe_mark_dynamic(one[name], 0)
        if CompiledOracle.spent_s > CompiledOracle.limit_s:
            return self._nothing(tokens, f"{CompiledOracle.limit_s:g} s of compiling are used up")
        start = time.perf_counter()
        found = [partial(self.function, **one) for one in args]
        try:
            found[0]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                _graph(found[:1])
        except Exception as error:  # whatever a compiler finds to complain about
            return self._nothing(tokens, f"{type(error).__name__}: {str(error).strip()}")
        finally:
            CompiledOracle.spent_s += time.perf_counter() - start
        return found

    def _nothing(self, tokens: int | None, reason: str) -> list[Call]:
        print(f"no baseline: {self.name}, {tokens} tokens: {reason.splitlines()[0]}", flush=True)
        return []


def _rows(x: Any) -> int | None:
    return len(x) if isinstance(x, Tensor) and x.dim() else None


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
    sweep, alone = _sweep()
    with_call = [step for call in calls for step in (sweep, call)]
    both = _replay_us(with_call, LAUNCHES * 2) * 2
    return both - alone


@cache
def _sweep() -> tuple[Call, float]:
    """What puts other data into L2, and its microseconds."""
    data, out = torch.ones(COLD_BYTES // 4, device="cuda"), torch.empty((), device="cuda")
    sweep = partial(torch.sum, data, dim=0, out=out)
    return sweep, _replay_us([sweep], LAUNCHES)


def about(device: torch.device) -> dict[str, str]:
    """What a row says of the machine and the code it was measured with."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "torch": torch.__version__, "triton": _version("triton"), "commit": commit(),
        "date": date.today().isoformat(),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def measure(case: Case, peak_gbps: float, peak_tflops: float) -> list[Row]:
    """The cold and the warm row of a case."""
    times = {"cold": cold_us(case.calls, case.nbytes), "warm": warm_us(case.calls)}
    base: dict[str, float | None] = {"cold": None, "warm": None}
    if case.baseline_calls:
        try:
            cold = cold_us(case.baseline_calls, case.nbytes)
            base = {"cold": cold, "warm": warm_us(case.baseline_calls)}
        except Exception as error:
            if not _is_device_alive():
                raise
            print(f"no baseline: {case.op} {case.shape}: {_words(error)}", flush=True)
    is_latency = case.nbytes / peak_gbps / 1e3 < LATENCY_US
    of_run = about(torch.device("cuda"))
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
        rows.append(Row(*key, case.baseline, base[l2], **of_run))
    return rows


def run(cases: Turns, description: str) -> None:
    """Measure and print every case; `--json PATH` writes the rows, one object a line.

    A case that fails is reported, and the others are still measured; the exit status is 1 then.
    If making the cases fails, the rest of their group is lost, and the failure is reported.
    """
    flags = _flags(description)
    CompiledOracle.limit_s = flags.compile_s
    start = time.perf_counter()
    peak, rate = (0.0, 0.0) if flags.once else (read_gbps(), bf16_tflops())
    print(f"read bandwidth {peak:.0f} GB/s, BF16 rate {rate:.0f} TFLOP/s", flush=True)
    failed, (shard, shards) = flags.failed, flags.shard
    for number, turn in enumerate(_turns(cases)):
        if number < flags.first or number % shards != shard - 1:
            continue
        try:
            _take(turn, flags, peak, rate)
        except Exception as error:  # of whatever kernel or compiler
            failed += 1
            print(f"FAILED: case {number}, {_named(turn)}: {_words(error)}", flush=True)
            traceback.print_exc()
        else:
            continue
        if not _is_device_alive():
            _go_on(number + 1, failed)
    spent = time.perf_counter() - start
    print(f"{spent:.0f} s, {CompiledOracle.spent_s:.0f} of them compiling baselines")
    if failed:
        sys.exit(f"{failed} cases failed")


def _flags(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="file the rows are added to")
    parser.add_argument("--only", default="", help="part of an op's name")
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N",
        help="every Nth case from the Ith on, for one GPU of several",
    )  # fmt: skip
    parser.add_argument(
        "--once", action="store_true",
        help="call everything once and time nothing, which fills the compilers' caches",
    )  # fmt: skip
    parser.add_argument(
        "--compile-s", type=float, default=COMPILE_S, metavar="S",
        help=f"seconds for compiling baselines ({COMPILE_S:g}); those after it are left out",
    )  # fmt: skip
    for name in ("--first", "--failed"):  # where a process goes on after another lost the device
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    return flags


def _shard(text: str) -> tuple[int, int]:
    """The value of --shard."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text!r}")
    return int(index), int(count)


def _turns(cases: Turns) -> Iterator[Later]:
    """The cases one by one; where making them fails, that failure is the last of its group."""

    def fail(error: Exception) -> NoReturn:
        raise error

    turns = iter(cases)
    while True:
        try:
            case = next(turns)
        except StopIteration:
            return
        except Exception as error:
            yield partial(fail, error)
            return
        if isinstance(case, Case):
            yield partial(lambda x: x, case)
        elif isinstance(case, Iterable):
            yield from _turns(case)
        else:
            yield case


def _take(turn: Later, flags: argparse.Namespace, peak: float, rate: float) -> None:
    """Make and measure one case; its buffers are gone afterwards."""
    case = turn()
    if flags.only not in case.op:
        return
    if flags.once:
        for calls in (case.calls, case.baseline_calls):
            for call in calls[:1]:
                call()
        torch.cuda.synchronize()
        return
    for row in measure(case, peak, rate):
        print(_line(row), flush=True)
        if flags.json:
            with flags.json.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def _named(turn: Any) -> str:
    """What a case is made from, as far as it fits a line."""
    (*_, made) = turn.args or (None,)
    if isinstance(made, Case):
        return f"{made.op} {made.shape}"
    given = [*turn.args, *turn.keywords.values()]
    return f"{turn.func.__name__} {[x for x in given if isinstance(x, str | int | dict)]}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _is_device_alive() -> bool:
    """Whether the device still works after an error; memory that it left over is given back."""
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return False
    return True


def _go_on(number: int, failed: int) -> NoReturn:
    """The same command again from case `number` on: after some errors a process has no device."""
    print(f"the device is lost to this process, a new one goes on at case {number}", flush=True)
    rest = "--first", str(number), "--failed", str(failed)
    os.execv(sys.executable, [*sys.orig_argv, *rest])


def _replay_us(calls: Sequence[Call], launches: int) -> float:
    """Median microseconds of one call in a replayed graph of at most `launches` of them."""
    for call in calls:  # compile outside the capture
        call()
    # What takes long is launched less often, but an even number of times, as calls may be pairs.
    first = calls[:2]
    us = _elapsed_us(lambda: [call() for call in first]) / len(first)
    launches = max(2, min(launches, 2 * int(GRAPH_US / us / 2)))
    graph = _graph(list(islice(cycle(calls), launches)))
    times = [_elapsed_us(graph.replay) for _ in range(2)]
    for _ in range(int(WARM_US / times[-1])):
        graph.replay()
    replays = max(3, min(REPLAYS, int(MEASURE_US / times[-1])))
    return median(_elapsed_us(graph.replay) for _ in range(replays)) / launches


def _graph(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls in a CUDA graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _elapsed_us(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


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
