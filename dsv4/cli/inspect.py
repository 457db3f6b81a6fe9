"""`dsv4 inspect`: what is in a checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import defaultdict
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dsv4.cli.model import NAMES, model_folder
from dsv4.cli.terminal import Terminal, count, gib

if TYPE_CHECKING:
    from dsv4.core.config import ModelConfig
    from dsv4.core.inventory import TensorSpec

SCHEMA = 1
Row = tuple[str, "TensorSpec", str]


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, nano, flash or pro")
    parser.add_argument("--tensors", metavar="GLOB", help="list the tensors whose names match")
    parser.add_argument("--json", action="store_true")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code: 0, or 1 when --tensors matches none."""
    config, rows, source, notices = _open(args.model)
    if args.tensors is not None:
        rows = [r for r in rows if fnmatchcase(r[0], args.tensors)]
    code = 0 if rows else 1
    if not rows:
        terminal.note(f"no tensor matches {args.tensors}; --tensors '*' lists all")
    if args.json:
        terminal.json(_report(config, rows, source, notices, args.tensors is not None))
        return code
    for notice in notices:
        terminal.note(f"note: {notice}")
    if args.tensors is not None:
        for name, spec, file in rows:
            shape = "x".join(map(str, spec.shape)) or "scalar"
            terminal.data(
                f"{name:60} {spec.dtype:8} {shape:16} {spec.nbytes:>14,}  {file}".rstrip()
            )
        size = gib(sum(s.nbytes for _, s, _ in rows))
        terminal.note(f"{count(len(rows), 'tensor')}, {size}")
        return code
    for line in _summary(config, rows, source):
        terminal.data(line)
    return 0


def _open(model: str) -> tuple[ModelConfig, list[Row], str, list[str]]:
    """Config, tensors with their shard file, where they come from, notices."""
    if model in ("flash", "pro"):
        from dsv4.cli.model import model_config
        from dsv4.core.inventory import tensor_specs

        config = model_config(model)
        rows = [(name, spec, "") for name, spec in tensor_specs(config).items()]
        return config, rows, "computed from the config", []
    from dsv4.loader import Checkpoint

    checkpoint = Checkpoint.open(model_folder(model, NAMES))
    source = f"{count(len(checkpoint.shards), 'shard')}, {checkpoint.dialect} names"
    return checkpoint.config, list(checkpoint.tensors()), source, checkpoint.notices


def _summary(c: ModelConfig, rows: list[Row], source: str) -> list[str]:
    num_bytes = sum(s.nbytes for _, s, _ in rows)
    lines = [
        f"{len(rows):,} tensors, {num_bytes:,} bytes ({gib(num_bytes)}), {source}",
        f"hidden {c.hidden_size}, heads {c.num_attention_heads} x {c.head_dim} "
        f"(RoPE {c.qk_rope_head_dim}), vocabulary {c.vocab_size:,}, "
        f"context {c.max_position_embeddings:,}",
        f"experts {c.n_routed_experts} ({c.num_experts_per_tok} a token) + {c.n_shared_experts} "
        f"shared, width {c.moe_intermediate_size}, format {c.expert_format}; "
        f"linears {c.linear_format}",
        f"window {c.sliding_window}, index top-k {c.index_topk}, mHC streams {c.hc_mult}, "
        f"MTP blocks {c.num_nextn_predict_layers}, DSpark block {c.dspark_block_size}",
        "",
        f"{'layer':>13}  {'attention':9}  ratio  router  {'tensors':>7}  {'bytes':>14}",
    ]
    per_part = _per_part(rows)
    for j in range(c.num_hidden_layers):
        kind, router = c.layer_kind(j), "hash" if c.is_hash_layer(j) else "score"
        count, size = per_part.pop(f"layers.{j}")
        lines.append(
            f"{j:>13}  {kind.name:9}  {kind.ratio or '-':>5}  {router:6}  {count:>7,}  {size:>14,}"
        )
    lines += [
        f"{name:>13}  {'':9}  {'':5}  {'':6}  {n:>7,}  {b:>14,}"
        for name, (n, b) in per_part.items()
    ]
    lines += ["", f"{'dtype':8}  {'tensors':>7}  {'bytes':>18}"]
    for dtype, (count, size) in sorted(_per_dtype(rows).items()):
        lines.append(f"{dtype:8}  {count:>7,}  {size:>18,}")
    return lines


def _per_part(rows: list[Row]) -> dict[str, tuple[int, int]]:
    """(tensors, bytes) of "layers.3", "mtp.0", "embed", "head", ..."""

    def part(name: str) -> str:
        words = name.split(".")
        return ".".join(words[:2]) if words[0] in ("layers", "mtp") else words[0]

    return _count((part(name), spec.nbytes) for name, spec, _ in rows)


def _per_dtype(rows: list[Row]) -> dict[str, tuple[int, int]]:
    return _count((spec.dtype, spec.nbytes) for _, spec, _ in rows)


def _count(pairs: Any) -> dict[str, tuple[int, int]]:
    counts: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for key, size in pairs:
        count, total = counts[key]
        counts[key] = (count + 1, total + size)
    return dict(counts)


def _report(
    c: ModelConfig, rows: list[Row], source: str, notices: list[str], with_tensors: bool
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "source": source,
        "config": asdict(c),
        "layers": [
            {"layer": j, "attention": c.layer_kind(j).name, "ratio": c.layer_kind(j).ratio,
             "router": "hash" if c.is_hash_layer(j) else "score"}
            for j in range(c.num_hidden_layers)
        ],
        "num_tensors": len(rows),
        "num_bytes": sum(s.nbytes for _, s, _ in rows),
        "dtypes": {k: {"tensors": n, "bytes": b} for k, (n, b) in _per_dtype(rows).items()},
        "notices": notices,
    }  # fmt: skip
    if with_tensors:
        report["tensors"] = [
            {"name": name, "dtype": s.dtype, "shape": list(s.shape), "bytes": s.nbytes, "file": f}
            for name, s, f in rows
        ]
    return report
