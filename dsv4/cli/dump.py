"""`dsv4 dump`: write named activations to a file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from dsv4.cli.model import (
    NAMES,
    PUBLISHED,
    Runner,
    add_runtime_arguments,
    add_slice_arguments,
    check_prompt,
    config_hash,
    context_limit,
    load_runner,
    model_config,
    open_tokenizer,
    shorten,
    slice_config,
)
from dsv4.cli.prompt import add_prompt_arguments, prompt_text, read_ids, render_prompt
from dsv4.cli.terminal import Terminal, count, gib
from dsv4.cli.tier2 import split_fusions
from dsv4.core.config import MAX_CONTEXT, ModelConfig
from dsv4.core.errors import RequestError


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    add_runtime_arguments(parser, defaults)
    add_slice_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument("--ids", metavar="1,2,3|@FILE", help="token ids instead of a text")
    parser.add_argument("--tokens", type=int, metavar="N",
                        help="N random ids instead of a text, always the same")  # fmt: skip
    parser.add_argument("--taps", default="*", metavar="GLOB[,GLOB]",
                        help="which activations, see docs/taps.md (default all)")  # fmt: skip
    parser.add_argument("--chunk", type=int, metavar="N",
                        help="feed N tokens at a time (default: all at once)")  # fmt: skip
    parser.add_argument("--decode", type=int, default=0, metavar="N",
                        help="feed the last N tokens one by one (default 0)")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code 0."""
    _check_count("--chunk", args.chunk, 1)
    _check_count("--decode", args.decode, 0)
    from dsv4.diff.dump import check_output

    check_output(args.out)
    is_random = args.model in PUBLISHED
    if is_random and args.tier != 2:
        expected = f"2 for {args.model}, whose weights are random"
        raise RequestError("--tier", expected, args.tier, "add --tier 2")
    config = slice_config(args, model_config(args.model, names=NAMES))
    ids, limit = token_ids(args, config), context_limit(args, config)
    check_prompt(ids, limit, shorten("prompt", limit, config))
    if args.decode and args.decode >= len(ids):
        raise RequestError("--decode", f"less than the {len(ids)} tokens of the prompt",
                           args.decode)  # fmt: skip
    runner, name = load_runner(args, terminal, config if is_random else None)
    from dsv4.core.taps import capture
    from dsv4.diff.dump import DumpInfo, write_dump

    with capture(g.strip() for g in args.taps.split(",")) as captured:
        _forward(runner, ids, args.chunk or len(ids), args.decode)
    tensors = captured.tensors()
    if not tensors:
        raise RequestError("taps", "globs that match a tap", args.taps, "docs/taps.md lists them")
    quant = "cache" if args.simulate_kv_quant == "on" else ""
    quant = "production" if args.tier == 2 else quant
    parts = tuple(split_fusions(args.no_fusion)) if args.tier == 2 else ()
    info = DumpInfo(args.tier, args.dtype, name, config_hash(config), tuple(ids), quant, parts)
    write_dump(args.out, tensors, info)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    terminal.note(
        f"{count(len(tensors), 'tap')} of {count(len(ids), 'token')}, {gib(size)}, in {args.out}"
    )
    return 0


def _check_count(flag: str, value: int | None, low: int) -> None:
    if value is not None and not low <= value <= MAX_CONTEXT:
        raise RequestError(flag, f"{low} to {MAX_CONTEXT:,}", value)


def token_ids(args: Namespace, config: ModelConfig) -> list[int]:
    """The token ids that one of -p, -f, --ids and --tokens names."""
    _check_count("--tokens", args.tokens, 1)
    has_text = args.prompt is not None or bool(args.file)
    if has_text + (args.ids is not None) + (args.tokens is not None) > 1:
        got = args.ids if args.ids is not None else args.tokens
        raise RequestError("--ids", "one of a prompt, --ids and --tokens", got)
    if args.ids is not None:
        return read_ids(args.ids)
    if args.tokens is not None:
        import torch

        g = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (args.tokens,), generator=g).tolist()
    if args.model in PUBLISHED:
        expected = f"--tokens or --ids: {args.model} has no tokenizer here"
        raise RequestError("prompt", expected, args.prompt)
    prompt = render_prompt(args, prompt_text(args))
    return prompt.encode(open_tokenizer(args.model, config))


def _forward(runner: Runner, ids: list[int], chunk: int, decode: int = 0) -> None:
    """Run the prompt, and the MTP block on all but its last position."""
    import torch

    from dsv4.reference.model import ReferenceModel

    cache = runner.new_cache()
    first, last = torch.tensor(ids, device=runner.device).split([len(ids) - decode, decode])
    parts = [*first.split(chunk), *(last.split(1) if decode else ())]
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
