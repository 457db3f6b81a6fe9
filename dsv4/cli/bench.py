"""`dsv4 bench`: how far a step is from the physical limit, and how an engine bears a load."""

from __future__ import annotations

import json
import traceback
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli.model import NAMES, PUBLISHED, check_device, device_name, model_config, model_folder
from dsv4.cli.terminal import Terminal, gib
from dsv4.cli.tier2 import add_fusion_argument, split_fusions
from dsv4.core.errors import DeviceUnavailable, RequestError

if TYPE_CHECKING:
    from dsv4.core.config import ModelConfig
    from dsv4.engine.load import Load
    from dsv4.engine.model import EngineLimits, ProductionModel
    from dsv4.engine.plot import Point

MOST_AT_ONCE = 64  # requests of a load
NO_GPU = "bench needs a CUDA GPU; on a CPU: make bench"
PREFILL_ROWS = 8192  # of a step that fills contexts


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("phase", choices=("decode", "prefill", "load"))
    parser.add_argument("model", metavar="MODEL",
                        help="checkpoint folder, nano, or random flash, pro")  # fmt: skip
    parser.add_argument("--device", type=device_name, default="cuda", metavar="cuda|cuda:N")
    parser.add_argument("--layers", type=int, metavar="N", help="flash and pro: the first N")
    parser.add_argument("--experts", type=int, metavar="N", help="flash and pro: N a layer")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B",
                        help="decode: requests at a time (default 1); load: at most "
                        f"(default {MOST_AT_ONCE})")  # fmt: skip
    parser.add_argument("--context", type=int, nargs="+", default=[1024], metavar="TOKENS",
                        help="decode: tokens before the step; prefill: of the prompt "
                        "(default 1024)")  # fmt: skip
    add_fusion_argument(parser)
    parser.add_argument("--kernels", action="store_true", help="a table of kernels for each row")
    parser.add_argument("--trace", metavar="FILE", help="Chrome trace of the last step")
    parser.add_argument("--json", metavar="FILE", help="add the rows to FILE, one object a line")
    parser.add_argument("--plot", metavar="FILE.png",
                        help="decode: a picture of times and floors (extra plot)")  # fmt: skip
    load = parser.add_argument_group("load", "requests at random times, answers of fixed length")
    load.add_argument("--rate", type=float, nargs="+", metavar="R", help="requests a second")
    load.add_argument("--requests", type=int, default=200, metavar="N", help="default 200")
    load.add_argument("--prompt-tokens", type=_span, default=(128, 1024), metavar="A,B",
                      help="least and most (default 128,1024)")  # fmt: skip
    load.add_argument("--new-tokens", type=_span, default=(16, 256), metavar="C,D",
                      help="least and most (default 16,256)")  # fmt: skip


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code 0."""
    if args.device == "cpu":
        raise DeviceUnavailable("cpu", "bench times GPU kernels", NO_GPU)
    args.batch = args.batch or [MOST_AT_ONCE if args.phase == "load" else 1]
    for name in ("batch", "context"):
        if any(n < 1 for n in getattr(args, name)):
            raise RequestError(f"--{name}", "1 or more", getattr(args, name))
    loads = _loads(args)
    _check_plot(args)
    check_device(args.device, NO_GPU)
    model = _build(args, terminal)
    if loads:
        _run_loads(args, terminal, model, loads)
        return 0
    from dsv4.testing.bench import read_gbps

    peak = read_gbps()
    terminal.note(f"weights {gib(model.weight_bytes)}, read bandwidth {peak:.0f} GB/s")
    _run_steps(args, terminal, model, peak)
    return 0


def _run_steps(args: Namespace, terminal: Terminal, model: ProductionModel, peak: float) -> None:
    from dsv4.cli.bench_rows import decode_row, kernel_table, prefill_row, step_line
    from dsv4.engine.plot import Point

    points: dict[tuple[int, int], Point] = {}
    errors: list[Exception] = []
    for batch in args.batch if args.phase == "decode" else [1]:
        for context in args.context:
            with _others_go_on(terminal, f"batch {batch}, context {context}", errors):
                if args.phase == "decode":
                    row, times, floor_us = decode_row(args, model, batch, context, peak)
                    points[batch, context] = Point(batch, times, floor_us)
                else:
                    row, times = prefill_row(args, model, context)
                terminal.data(step_line(row))
                if args.kernels:
                    terminal.data(kernel_table(times))
                _keep(args, row)
    if args.plot and points:
        _plot(args, points)
    if errors:
        raise errors[0]


def _run_loads(
    args: Namespace, terminal: Terminal, model: ProductionModel, loads: list[Load]
) -> None:
    from dsv4.cli.bench_rows import load_line, load_row
    from dsv4.engine.engine import Engine

    engine = Engine(model)
    terminal.note(f"weights {gib(model.weight_bytes)}; ready")
    errors: list[Exception] = []
    for load in loads:
        with _others_go_on(terminal, f"rate {load.rate:g}", errors):
            row = load_row(args, engine, load)
            terminal.data(load_line(row))
            _keep(args, row)
    if errors:
        raise errors[0]


@contextmanager
def _others_go_on(terminal: Terminal, row: str, errors: list[Exception]) -> Iterator[None]:
    """A row that fails is named and kept in `errors`, which end the command after the others."""
    try:
        yield
    except Exception as error:
        terminal.note(f"{row}: {type(error).__name__}: {error}")
        traceback.clear_frames(error.__traceback__)  # which hold its graphs and buffers
        errors.append(error)


def _loads(args: Namespace) -> list[Load]:
    """The loads that the flags ask for; none in other phases."""
    if args.phase != "load":
        if args.rate:
            raise RequestError("--rate", "bench load beside it", args.phase)
        return []
    from dsv4.engine.load import Load

    if not args.rate:
        raise RequestError("--rate", "requests a second", args.rate, "give one rate or several")
    if len(args.batch) > 1:
        raise RequestError("--batch", "one number for a load", args.batch)
    return [Load(r, args.requests, args.prompt_tokens, args.new_tokens) for r in args.rate]


def _check_plot(args: Namespace) -> None:
    if not args.plot:
        return
    if args.phase != "decode":
        raise RequestError("--plot", "bench decode beside it", args.phase)
    if not args.plot.endswith(".png"):
        raise RequestError("--plot", "a file that ends in .png", args.plot)
    from dsv4.engine.plot import require_matplotlib

    require_matplotlib()


def _plot(args: Namespace, points: dict[tuple[int, int], Point]) -> None:
    """Over the batch, or over the context where there is one batch; a line for each other."""
    from dataclasses import replace

    from dsv4.engine.plot import save_roofline

    over_context = len(args.batch) == 1 and len(args.context) > 1
    series: defaultdict[str, list[Point]] = defaultdict(list)
    for (batch, context), point in points.items():
        x, label = (context, f"batch {batch}") if over_context else (batch, f"context {context:,}")
        series[label].append(replace(point, x=x))
    title = f"decode step of {args.model}"
    save_roofline(Path(args.plot), series, "context" if over_context else "batch", title)


def _keep(args: Namespace, row: dict[str, Any]) -> None:
    if args.json:
        with open(args.json, "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)


def _span(text: str) -> tuple[int, int]:
    """The value of --prompt-tokens and --new-tokens."""
    try:
        low, high = (int(word) for word in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"expected two numbers A,B, got {text!r}") from None
    return low, high


def _build(args: Namespace, terminal: Terminal) -> ProductionModel:
    from dsv4.core.inventory import of_trunk
    from dsv4.engine.model import ProductionModel
    from dsv4.engine.synthetic import sliced_config, synthetic_tensors
    from dsv4.loader import Checkpoint

    unfused = split_fusions(args.no_fusion)
    if args.model in PUBLISHED:
        config = sliced_config(model_config(args.model), args.layers, args.experts)
        stored = synthetic_tensors(config, args.device)
        return ProductionModel(config, stored, args.device, _limits(args, config), unfused=unfused)
    if args.layers is not None or args.experts is not None:
        raise RequestError("--layers", "flash or pro beside it", args.model)
    checkpoint = Checkpoint.open(model_folder(args.model, NAMES))
    config = checkpoint.config
    with terminal.progress("loading") as progress:
        stored = checkpoint.stream(progress, keep=of_trunk)
        return ProductionModel(config, stored, args.device, _limits(args, config), unfused=unfused)


def _limits(args: Namespace, config: ModelConfig) -> EngineLimits:
    from dsv4.engine.model import EngineLimits

    if args.phase == "load":
        return EngineLimits(args.prompt_tokens[1] + args.new_tokens[1], args.batch[0])
    most = max(args.context) + 1
    batch = max(args.batch) if args.phase == "decode" else 1
    rows = max(args.context) if args.phase == "prefill" else PREFILL_ROWS
    return EngineLimits(most, batch, batch * most, max(rows, batch))
