"""`dsv4 dump`: write named activations to a file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from dsv4.cli.model import (
    Runner,
    add_runtime_arguments,
    check_prompt,
    config_hash,
    context_limit,
    load_runner,
    model_config,
    open_tokenizer,
)
from dsv4.cli.prompt import add_prompt_arguments, prompt_text, read_ids, render_prompt
from dsv4.cli.terminal import Terminal, count, gib
from dsv4.core.config import MAX_CONTEXT
from dsv4.core.errors import RequestError


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    add_runtime_arguments(parser, defaults)
    add_prompt_arguments(parser)
    parser.add_argument("--ids", metavar="1,2,3|@FILE", help="token ids instead of a text")
    parser.add_argument("--taps", default="*", metavar="GLOB[,GLOB]",
                        help="which activations, see docs/taps.md (default all)")  # fmt: skip
    parser.add_argument("--chunk", type=int, metavar="N",
                        help="feed N tokens at a time (default: all at once)")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code 0."""
    if args.chunk is not None and not 1 <= args.chunk <= MAX_CONTEXT:
        raise RequestError("--chunk", f"1 to {MAX_CONTEXT:,}", args.chunk)
    from dsv4.diff.dump import check_output

    check_output(args.out)
    ids = read_ids(args.ids) if args.ids is not None else None
    if ids is not None and (args.prompt is not None or args.file):
        raise RequestError("--ids", "no prompt beside it", args.ids)
    config = model_config(args.model)
    if ids is None:
        prompt = render_prompt(args, prompt_text(args))
        ids = prompt.encode(open_tokenizer(args.model, config))
    check_prompt(ids, context_limit(args, config))
    runner, name = load_runner(args, terminal)
    from dsv4.core.taps import capture
    from dsv4.diff.dump import DumpInfo, write_dump

    with capture(g.strip() for g in args.taps.split(",")) as captured:
        _forward(runner, ids, args.chunk or len(ids))
    tensors = captured.tensors()
    if not tensors:
        raise RequestError("taps", "globs that match a tap", args.taps, "docs/taps.md lists them")
    quant = "cache" if args.simulate_kv_quant == "on" else ""
    quant = "production" if args.tier == 2 else quant
    info = DumpInfo(args.tier, args.dtype, name, config_hash(config), tuple(ids), quant)
    write_dump(args.out, tensors, info)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    terminal.note(
        f"{count(len(tensors), 'tap')} of {count(len(ids), 'token')}, {gib(size)}, in {args.out}"
    )
    return 0


def _forward(runner: Runner, ids: list[int], chunk: int) -> None:
    """Run the prompt, and the MTP block on all but its last position."""
    import torch

    from dsv4.reference.model import ReferenceModel

    cache = runner.new_cache()
    parts = torch.tensor(ids, device=runner.device).split(chunk)
    if not isinstance(runner, ReferenceModel):
        for part in parts:
            runner.forward(part, cache)
        return
    streams = []
    for part in parts:
        streams.append(runner.forward_streams(part, cache))
        runner.logits(streams[-1])
    if len(ids) > 1:
        for block in range(len(runner.mtp)):
            following = torch.tensor(ids[1:], device=runner.device)
            runner.forward_mtp(torch.cat(streams)[:-1], following, cache, block)
