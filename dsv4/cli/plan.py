"""`dsv4 plan`: does it fit."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from dsv4.cli.model import NAMES, PUBLISHED, model_config
from dsv4.cli.terminal import Terminal, gib

SCHEMA = 1
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_size(text: str) -> int:
    """Bytes of "141G", "139.8GiB" or "1000000"; units are powers of 1024."""
    body = text.upper().removesuffix("IB").removesuffix("B").strip()
    unit = body[-1:] if body[-1:] in UNITS else ""
    try:
        size = float(body.removesuffix(unit)) * UNITS[unit]
    except ValueError as e:
        raise ArgumentTypeError(f"expected a size like 141G, got {text!r}") from e
    if not 1 <= size < 2**60:
        raise ArgumentTypeError(f"expected 1 byte to 2^60, got {text!r}")
    return int(size)


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, nano, flash or pro")
    parser.add_argument("--gpus", type=int, default=1, help="(default 1)")
    parser.add_argument("--ctx", type=int, metavar="TOKENS",
                        help="of one request (default 131072, or the model's limit)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="requests at a time (default 1)")
    parser.add_argument("--index-keys", choices=("fp8", "mxfp4"), default="fp8")
    parser.add_argument("--page-tokens", type=int, metavar="TOKENS", default=256)
    parser.add_argument("--memory", type=memory_size, metavar="SIZE",
                        help="of one GPU, like 141G; units are GiB and the like, powers of 1024 "
                        "(default: of the first GPU here)")  # fmt: skip
    parser.add_argument("--json", action="store_true")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code: 0, or 1 when it does not fit."""
    from dsv4.cache.plan import MemoryPlan, plan

    config = model_config(args.model, terminal, NAMES)
    memory = args.memory if args.memory is not None else _gpu_memory()
    p: MemoryPlan = plan(
        config, gpus=args.gpus, batch=args.batch, index_keys=args.index_keys,
        context=args.ctx if args.ctx is not None else min(131072, config.max_position_embeddings),
        page_tokens=args.page_tokens, memory_bytes=memory,
    )  # fmt: skip
    if args.json:
        numbers = {k: float(v) if isinstance(v, Fraction) else v for k, v in asdict(p).items()}
        terminal.json({"schema": SCHEMA, **numbers, "fits": p.fits, "spare_bytes": p.spare_bytes})
    else:
        source = " in the file" if args.model in PUBLISHED else ", from config.json"
        for line in _lines(p, config.max_position_embeddings, source):
            terminal.data(line)
    return 1 if p.fits is False else 0


def _gpu_memory() -> int | None:
    import torch

    return torch.cuda.mem_get_info(0)[1] if torch.cuda.is_available() else None


def _exact(growth: Fraction) -> str:
    """3850.25 without rounding; a fraction where no short decimal is exact."""
    text = f"{float(growth):,.7f}".rstrip("0").rstrip(".")
    is_exact = Fraction(text.replace(",", "")) == growth
    return text if is_exact else f"{growth.numerator:,}/{growth.denominator:,}"


def _lines(p: Any, limit: int, source: str) -> list[str]:
    each = f" -> {gib(p.weight_bytes)} a GPU" if p.gpus > 1 else ""
    where = " a GPU" if p.gpus > 1 else ""
    shared = p.kv_bytes - p.batch * p.kv_request_bytes
    lines = [
        f"weights    {gib(p.weight_file_bytes)}{each}  ({p.weight_file_bytes:,} bytes{source})",
        f"kv cache   {p.batch} x {p.context:,} tokens  {gib(p.kv_bytes)}{where}  "
        f"(pages {gib(p.kv_page_bytes)}, window and state {gib(p.kv_fixed_bytes)})",
        f"           grows by {_exact(p.kv_growth)} bytes a token of one request, in pages of "
        f"{p.page_tokens} tokens by {_exact(p.kv_token_bytes)}",
        f"           a request takes {p.kv_request_bytes:,} bytes: pages "
        f"{p.pages_per_request:,} x {p.kv_page_set_bytes:,}, "
        f"window and state {p.kv_fixed_per_request:,}",
        f"           allocated{where}: {p.kv_bytes:,} bytes, {shared:,} of them the null page "
        "and alignment",
    ]
    total = f"total      {gib(p.total_bytes)}{where}"
    if p.memory_bytes is None:
        return [*lines, f"{total}  (give --memory to judge the fit)"]
    verdict = f"FITS ({gib(p.spare_bytes)} spare)" if p.fits else (
        f"DOES NOT FIT ({gib(-p.spare_bytes)} short)"
    )  # fmt: skip
    lines.append(f"{total} of {gib(p.memory_bytes)}  {verdict}")
    is_limit = " (model limit)" if p.largest_context == limit else ""
    lines.append(f"largest context at this batch: {p.largest_context:,} tokens{is_limit}")
    return lines
