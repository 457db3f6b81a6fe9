"""`dsv4 convert`: write a checkpoint as BF16, or a slice of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from dsv4.cli.model import model_folder
from dsv4.cli.terminal import Terminal, count
from dsv4.core.errors import RequestError
from dsv4.core.safe_files import has_file, open_folder, read_small_file
from dsv4.text.generation import generation_config
from dsv4.text.tokenizer import MAX_FILE_BYTES

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json")


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or nano")
    parser.add_argument("--to", required=True, choices=("bf16", "slice"),
                        help="bf16: nothing quantised; slice: fewer layers or experts")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--layers", type=int, metavar="K", help="slice: keep the first K layers")
    parser.add_argument("--experts", type=int, metavar="N", help="slice: keep the first N experts")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in DIR")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code 0."""
    from dsv4.loader.convert import dequantize_checkpoint, slice_checkpoint
    from dsv4.loader.writer import write_file
    from dsv4.reference.quant import dequantize

    has_counts = args.layers is not None or args.experts is not None
    if args.to == "bf16" and has_counts:
        raise RequestError("layers, experts", "--to slice beside them", "--to bf16")
    if args.to == "slice" and not has_counts:
        raise RequestError("to", "--layers or --experts beside slice", "neither")
    for name, value in (("layers", args.layers), ("experts", args.experts)):
        if value is not None and value < 1:
            raise RequestError(name, "1 or more", value)
    source = open_folder(model_folder(args.model))
    texts = {
        name: read_small_file(source, name, MAX_FILE_BYTES)
        for name in TEXT_FILES
        if has_file(source, name)
    }
    generation = generation_config(source)
    if args.to == "bf16":
        config = dequantize_checkpoint(
            source, args.out, dequantize, generation_config=generation, overwrite=args.overwrite
        )
    else:
        config = slice_checkpoint(
            source, args.out, num_layers=args.layers, num_experts=args.experts,
            generation_config=generation, overwrite=args.overwrite,
        )  # fmt: skip
    for name, data in texts.items():
        write_file(Path(args.out), name, data)
    terminal.note(f"{count(config.num_hidden_layers, 'layer')}, "
                  f"{count(config.n_routed_experts, 'expert')}, "
                  f"{config.expert_format} experts, in {args.out}")  # fmt: skip
    return 0
