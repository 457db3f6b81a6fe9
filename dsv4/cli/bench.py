"""`dsv4 bench`: how far a step is from the physical limit."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli.model import PUBLISHED, check_device, device_name, model_config, model_folder
from dsv4.cli.terminal import Terminal, gib
from dsv4.core.errors import DeviceUnavailable, RequestError

if TYPE_CHECKING:
    from dsv4.core.config import ModelConfig
    from dsv4.engine.bench import StepTime
    from dsv4.engine.model import EngineLimits, ProductionModel

SHOWN_KERNELS, NAME_WIDTH = 25, 58


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("phase", choices=("decode", "prefill"))
    parser.add_argument("model", metavar="MODEL",
                        help="checkpoint folder, nano, or random flash, pro")  # fmt: skip
    parser.add_argument("--device", type=device_name, default="cuda", metavar="cuda|cuda:N")
    parser.add_argument("--layers", type=int, metavar="N", help="flash and pro: the first N")
    parser.add_argument("--experts", type=int, metavar="N", help="flash and pro: N a layer")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B",
                        help="decode: requests at a time (default 1)")  # fmt: skip
    parser.add_argument("--context", type=int, nargs="+", default=[1024], metavar="TOKENS",
                        help="decode: tokens before the step; prefill: of the prompt "
                        "(default 1024)")  # fmt: skip
    parser.add_argument("--unfused", default="", metavar="NAME[,NAME]",
                        help="run these as their parts: mhc_post_pre, latent_kv_norm_pack, "
                        "joined_wide_linear, entry_and_key_insert, cache_step_append")  # fmt: skip
    parser.add_argument("--kernels", action="store_true", help="a table of kernels for each row")
    parser.add_argument("--trace", metavar="FILE", help="Chrome trace of the last step")
    parser.add_argument("--json", metavar="FILE", help="add the rows to FILE, one object a line")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code 0."""
    if args.device == "cpu":
        raise DeviceUnavailable("cpu", "a bench of GPU kernels")
    for name in ("batch", "context"):
        if any(n < 1 for n in getattr(args, name)):
            raise RequestError(f"--{name}", "1 or more", getattr(args, name))
    check_device(args.device)
    model = _build(args, terminal)
    from dsv4.testing.bench import read_gbps

    peak = read_gbps()
    terminal.note(f"weights {gib(model.weight_bytes)}, read bandwidth {peak:.0f} GB/s")
    for batch in args.batch if args.phase == "decode" else [1]:
        for context in args.context:
            row, times = _row(args, model, batch, context, peak)
            terminal.data(_line(row))
            if args.kernels:
                terminal.data(_table(times))
            if args.json:
                with open(args.json, "a", encoding="utf-8") as file:
                    print(json.dumps(row), file=file)
    return 0


def _build(args: Namespace, terminal: Terminal) -> ProductionModel:
    from dsv4.engine.model import ProductionModel
    from dsv4.engine.synthetic import sliced_config, synthetic_tensors
    from dsv4.loader import Checkpoint

    unfused = [word for word in args.unfused.split(",") if word]
    if args.model in PUBLISHED:
        config = sliced_config(model_config(args.model), args.layers, args.experts)
        stored = synthetic_tensors(config, args.device)
        return ProductionModel(config, stored, args.device, _limits(args, config), unfused=unfused)
    if args.layers is not None or args.experts is not None:
        raise RequestError("--layers", "flash or pro beside it", args.model)
    checkpoint = Checkpoint.open(model_folder(args.model))
    config = checkpoint.config
    with terminal.progress("loading") as progress:
        stored = checkpoint.stream(progress, keep=lambda name: not name.startswith("mtp."))
        return ProductionModel(config, stored, args.device, _limits(args, config), unfused=unfused)


def _limits(args: Namespace, config: ModelConfig) -> EngineLimits:
    from dsv4.engine.model import EngineLimits

    most = max(args.context) + 1
    batch = max(args.batch) if args.phase == "decode" else 1
    rows = max(args.context) if args.phase == "prefill" else 8192
    return EngineLimits(most, batch, batch * most, max(rows, batch))


def _row(
    args: Namespace, model: ProductionModel, batch: int, context: int, peak: float
) -> tuple[dict[str, Any], StepTime]:
    import torch

    from dsv4.engine.bench import fill_contexts, time_decode, time_prefill
    from dsv4.engine.roofline import step_bytes
    from dsv4.engine.stepper import Stepper
    from dsv4.testing.bench import commit

    trace = Path(args.trace) if args.trace else None
    c = model.config
    shape: dict[str, Any] = {
        "config": args.model, "layers": c.num_hidden_layers, "experts": c.n_routed_experts,
    }  # fmt: skip
    if args.phase == "decode":
        requests = fill_contexts(model, batch, context)
        stepper = Stepper(model, [batch])
        stepper.capture()
        times = time_decode(stepper, requests, trace)
        for request in requests:
            model.cache.release(request)
        shape |= {"context": context, "B": batch}
        nbytes = step_bytes(c, batch, context, experts_hit=times.experts_hit).total
        tokens = batch
    else:
        times = time_prefill(model, context, trace)
        shape |= {"T": context}
        nbytes, tokens = 0.0, context
    gbps = nbytes / times.us / 1e3
    row = {
        "op": "decode_step" if args.phase == "decode" else "prefill", "shape": shape,
        "us": round(times.us, 1), "gbps": round(gbps, 1), "tflops": 0.0,
        "roof": round(gbps / peak, 4) if nbytes else None, "l2": "cold", "baseline": None,
        "baseline_us": None, "tps": round(1e6 * tokens / times.us, 1), "launches": times.launches,
        "experts_hit": round(times.experts_hit, 1),
        "gpu": torch.cuda.get_device_name(model.device), "torch": torch.__version__,
        "triton": _version("triton"), "commit": commit(), "date": date.today().isoformat(),
    }  # fmt: skip
    return row, times


def _line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    roof = "" if row["roof"] is None else f", {row['gbps']:.0f} GB/s, {row['roof']:.1%} of the roof"
    return (f"{row['op']} {shape}: {row['us']:,.0f} us, {row['tps']:,.0f} tokens/s, "
            f"{row['launches']} launches{roof}")  # fmt: skip


def _table(times: StepTime) -> str:
    total = sum(k.us for k in times.kernels)
    lines = [f"{'kernel':{NAME_WIDTH}} {'launches':>8} {'us':>10} {'share':>6}"]
    for k in times.kernels[:SHOWN_KERNELS]:
        name = k.name if len(k.name) <= NAME_WIDTH else k.name[: NAME_WIDTH - 3] + "..."
        lines.append(f"{name:{NAME_WIDTH}} {k.launches:8} {k.us:10.1f} {k.us / total:6.1%}")
    lines.append(f"{'all kernels':{NAME_WIDTH}} {times.launches:8} {total:10.1f}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
