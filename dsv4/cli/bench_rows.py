"""What `dsv4 bench` measures, as rows of JSON and as lines."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4.engine.bench import StepTime
    from dsv4.engine.engine import Engine
    from dsv4.engine.load import Load, Percentiles
    from dsv4.engine.model import ProductionModel

SHOWN_KERNELS, NAME_WIDTH = 25, 58

Row = dict[str, Any]


def decode_row(
    args: Namespace, model: ProductionModel, batch: int, context: int, peak: float
) -> tuple[Row, StepTime, float]:
    """One step of `batch` requests after `context` tokens; also the least time of its bytes."""
    from dsv4.engine.bench import fill_contexts, time_decode
    from dsv4.engine.roofline import step_bytes
    from dsv4.engine.stepper import Stepper

    requests = fill_contexts(model, batch, context)
    try:
        stepper = Stepper(model, [batch], prompt_sizes=[])
        stepper.capture()
        times = time_decode(stepper, requests, _trace(args))
    finally:
        for request in requests:
            model.cache.release(request)
    nbytes = step_bytes(model.config, batch, context, experts_hit=times.experts_hit).total
    shape = {**_shape(args, model), "context": context, "B": batch}
    gbps = nbytes / times.us / 1e3
    row = _row("decode_step", shape, times.us, 1e6 * batch / times.us, model, gbps, gbps / peak)
    row |= {"launches": times.launches, "experts_hit": round(times.experts_hit, 1)}
    return row, times, nbytes / peak / 1e3


def prefill_row(args: Namespace, model: ProductionModel, context: int) -> tuple[Row, StepTime]:
    """A prompt of `context` tokens in one step."""
    from dsv4.engine.bench import time_prefill
    from dsv4.engine.stepper import PROMPT_SIZES, Stepper

    sizes = [size for size in PROMPT_SIZES if size >= context][:1]
    stepper = Stepper(model, [1], prompt_sizes=sizes)
    stepper.capture()
    times = time_prefill(stepper, context, _trace(args))
    shape = {**_shape(args, model), "T": context}
    row = _row("prefill", shape, times.us, 1e6 * context / times.us, model)
    return row | {"launches": times.launches, "experts_hit": round(times.experts_hit, 1)}, times


def load_row(args: Namespace, engine: Engine, load: Load) -> Row:
    """Requests that come at random times; `us` is the median time between two tokens."""
    from dsv4.engine.load import time_load

    times = time_load(engine, load)
    model, between = engine.model, times.between_tokens
    shape = {
        **_shape(args, model), "rate": load.rate, "requests": load.num_requests,
        "prompt": list(load.prompt_tokens), "new": list(load.new_tokens),
        "B": model.limits.max_requests,
    }  # fmt: skip
    us = 1e6 * between.p50 if between is not None else 0.0
    row = _row("load", shape, us, times.tokens / times.seconds, model)
    first = _milliseconds(times.first_token)
    return row | {"first_token_ms": first, "between_tokens_ms": _milliseconds(between)}


def step_line(row: Row) -> str:
    """A decode or prefill row for people."""
    roof = "" if row["roof"] is None else f", {row['gbps']:.0f} GB/s, {row['roof']:.1%} of the roof"
    return (f"{row['op']} {_words(row)}: {row['us']:,.0f} us, {row['tps']:,.0f} tokens/s, "
            f"{row['launches']} launches{roof}")  # fmt: skip


def load_line(row: Row) -> str:
    """A row of a load for people."""

    def words(times: dict[str, float] | None) -> str:
        return "none" if times is None else " / ".join(f"{ms:,.1f}" for ms in times.values())

    first, between = words(row["first_token_ms"]), words(row["between_tokens_ms"])
    return (f"{row['op']} {_words(row)}: {row['tps']:,.0f} tokens/s, first token {first} ms, "
            f"between tokens {between} ms (p50 / p95 / p99)")  # fmt: skip


def kernel_table(times: StepTime) -> str:
    """The slowest kernels of a step."""
    total = sum(k.us for k in times.kernels)
    lines = [f"{'kernel':{NAME_WIDTH}} {'launches':>8} {'us':>10} {'share':>6}"]
    for k in times.kernels[:SHOWN_KERNELS]:
        name = k.name if len(k.name) <= NAME_WIDTH else k.name[: NAME_WIDTH - 3] + "..."
        lines.append(f"{name:{NAME_WIDTH}} {k.launches:8} {k.us:10.1f} {k.us / total:6.1%}")
    lines.append(f"{'all kernels':{NAME_WIDTH}} {times.launches:8} {total:10.1f}")
    return "\n".join(lines)


def _row(
    op: str, shape: dict[str, Any], us: float, tps: float, model: ProductionModel,
    gbps: float = 0.0, roof: float | None = None,
) -> Row:  # fmt: skip
    from dsv4.testing.bench import about

    return {
        "op": op, "shape": shape, "us": round(us, 1), "gbps": round(gbps, 1), "tflops": 0.0,
        "roof": None if roof is None else round(roof, 4), "l2": "cold", "baseline": None,
        "baseline_us": None, "tps": round(tps, 1), **about(model.device),
    }  # fmt: skip


def _shape(args: Namespace, model: ProductionModel) -> dict[str, Any]:
    c = model.config
    return {"config": args.model, "layers": c.num_hidden_layers, "experts": c.n_routed_experts}


def _trace(args: Namespace) -> Path | None:
    return Path(args.trace) if args.trace else None


def _words(row: Row) -> str:
    return " ".join(
        f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}"
        for k, v in row["shape"].items()
    )


def _milliseconds(times: Percentiles | None) -> dict[str, float] | None:
    if times is None:
        return None
    return {name: round(1e3 * seconds, 2) for name, seconds in asdict(times).items()}
