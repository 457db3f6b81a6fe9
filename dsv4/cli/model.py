"""From the word MODEL to a config, a checkpoint, a tokenizer and a running model."""

from __future__ import annotations

import hashlib
import json
import re
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsv4.cli.terminal import Terminal
from dsv4.cli.tier2 import add_fusion_argument, check_production, load_production, load_random
from dsv4.core import env
from dsv4.core.errors import CheckpointError, DeviceUnavailable, RequestError, printable
from dsv4.core.safe_files import open_folder, read_json
from dsv4.text.generation import stop_ids
from dsv4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dsv4.core.config import ModelConfig

NANO = "nano"
DTYPES = ("float32", "bfloat16", "float64")
MAX_JSON_BYTES = 1 << 20
PUBLISHED = ("flash", "pro")  # whose configs the package knows
NAMES = "nano, flash or pro"  # of verbs that need no files


class Runner(Protocol):
    """A model of any tier, one sequence at a time."""

    config: ModelConfig
    device: torch.device

    def new_cache(self) -> Any:
        """An empty cache."""
        ...

    def forward(self, ids: Tensor, cache: Any, last_only: bool = False) -> Tensor:
        """Append ids [T], on `device`, to the cache; logits [T, V], or [1, V] of the last."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and what it took.

    model_ids stop ids of the model: end of sentence, and what generation_config.json adds
    """

    runner: Runner
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    name: str
    load_s: float


def add_runtime_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """MODEL and the flags that choose how it runs."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or nano")
    group = parser.add_argument_group("runtime")
    group.add_argument("--tier", type=int, choices=(0, 1, 2), default=defaults["DSV4_TIER"],
                       help="0: transformers, 1: the reference, 2: the production path "
                       "(default %(default)s)")  # fmt: skip
    group.add_argument("--dtype", choices=DTYPES, default=defaults["DSV4_DTYPE"],
                       help="of activations and weights (default %(default)s); tier 2 is always "
                       "bfloat16 over the stored weights")  # fmt: skip
    group.add_argument("--device", type=device_name, default="cpu", metavar="cpu|cuda|cuda:N",
                       help="tiers 1 and 2: where it computes (default cpu)")  # fmt: skip
    group.add_argument("--simulate-kv-quant", choices=("on", "off"), default="off",
                       help="tier 1: round the KV cache and indexer as the official cache does "
                       "(default off)")  # fmt: skip
    group.add_argument("--keep-packed", action="store_true",
                       help="tier 1: leave experts quantised in memory; slower")  # fmt: skip
    group.add_argument("--max-context", type=int, default=defaults["DSV4_MAX_CONTEXT"],
                       metavar="N", help="refuse longer prompts, stop there "
                       "(default: the model's limit; 32,768 in tier 2)")  # fmt: skip
    add_fusion_argument(group, "tier 2: ")
    group.add_argument("--threads", type=int, default=defaults["DSV4_THREADS"], metavar="N",
                       help="CPU threads")  # fmt: skip


def add_slice_arguments(group: Any) -> None:
    """--layers and --experts, of models of random weights."""
    group.add_argument("--layers", type=int, metavar="N", help="flash and pro: the first N")
    group.add_argument("--experts", type=int, metavar="N", help="flash and pro: N a layer")


def device_name(text: str) -> str:
    """The value of --device."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,11})?", text):
        raise ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return text


def check_device(name: str, fix: str = "") -> None:
    """Raises DeviceUnavailable for a GPU that torch cannot use here; with `fix` if it has none."""
    if name == "cpu":
        return
    count = _num_gpus()
    if count == 0:
        raise DeviceUnavailable(name, "torch finds no CUDA device", fix)
    if int(name.partition(":")[2] or 0) >= count:
        fix = "use --device cuda, the first; `dsv4 doctor` lists all"
        raise DeviceUnavailable(name, f"there are {count}, numbered from 0", fix)


def check_kernel_device(name: str, has_other_tiers: bool) -> None:
    """Raises DeviceUnavailable where the kernels of tier 2 cannot run.

    has_other_tiers  whether the verb and the model could do with tier 1
    """
    fix = "TRITON_INTERPRET=1 with --device cpu for a few tokens (minutes)"
    fix = f"use --tier 1, or {fix}" if has_other_tiers else f"use {fix}"
    check_device(name, fix)
    from dsv4.kernels.common.launch import INTERPRETED

    if name == "cpu" and not INTERPRETED:
        fix = "use --device cuda" if _num_gpus() else fix
        raise DeviceUnavailable("cpu", "tier 2 is made of GPU kernels", fix)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def model_folder(name: str, names: str = NANO) -> Path:
    """The folder that MODEL names; ./nano for a folder of that name.

    names  that the verb takes, for the error
    """
    if name == NANO:
        from dsv4.nano import path

        return path()
    if not Path(name).is_dir():
        fix = f"give a checkpoint folder, or: {names}"
        if name in PUBLISHED:
            fix = ("flash and pro are names only for plan and inspect, and as random weights for "
                   "bench, dump and diff; give a checkpoint folder")  # fmt: skip
        raise CheckpointError("folder", "", detail=f"{name} is no folder", fix=fix)
    return Path(name)


def model_config(name: str, terminal: Terminal | None = None, names: str = NANO) -> ModelConfig:
    """The config of MODEL, from config.json alone; `flash` and `pro` need no files.

    terminal  where to note the keys that are not understood, for who opens no checkpoint
    names     as of `model_folder`
    """
    from dsv4.core.config import ModelConfig

    if name in PUBLISHED:
        return ModelConfig.flash() if name == "flash" else ModelConfig.pro()
    from dsv4.core.config_dialects import parse_config

    folder = open_folder(model_folder(name, names))
    parsed = parse_config(read_json(folder, "config.json", MAX_JSON_BYTES))
    if terminal is not None:
        for key in parsed.unknown_keys:
            terminal.note(f"note: config.json: key {printable(key)} not understood")
    return parsed.config


def slice_config(args: Namespace, config: ModelConfig) -> ModelConfig:
    """`config` with the layers and experts that the flags leave. Raises RequestError."""
    if args.model in PUBLISHED:
        from dsv4.engine.synthetic import sliced_config

        return sliced_config(config, args.layers, args.experts)
    for flag, value in (("--layers", args.layers), ("--experts", args.experts)):
        if value is not None:
            raise RequestError(flag, "flash or pro beside it", args.model)
    return config


def config_hash(config: ModelConfig) -> str:
    """16 hex digits that two equal configs share."""
    from dsv4.core.config_dialects import to_official

    text = json.dumps(to_official(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_tokenizer(name: str, config: ModelConfig) -> Tokenizer:
    """The tokenizer of MODEL. Raises CheckpointError when it is not one of this model."""
    tokenizer = Tokenizer.open(model_folder(name))
    for what, ours, theirs in (
        ("end of sentence", tokenizer.eos_id, config.eos_token_id),
        ("begin of sentence", tokenizer.bos_id, config.bos_token_id),
    ):
        if ours != theirs:
            raise _foreign_tokenizer(f"{what} {theirs}, as in config.json, got {ours}")
    if tokenizer.vocab_size > config.vocab_size:
        raise _foreign_tokenizer(f"at most {config.vocab_size} ids, got {tokenizer.vocab_size}")
    return tokenizer


def load_model(args: Namespace, terminal: Terminal) -> Loaded:
    """Open MODEL with its tokenizer, read its weights and build the tier that was asked for."""
    start = time.perf_counter()
    folder, config = model_folder(args.model), model_config(args.model)
    tokenizer = open_tokenizer(args.model, config)  # refused before the weights are read
    runner, name = load_runner(args, terminal, will_generate=True)
    load_s = time.perf_counter() - start
    return Loaded(runner, tokenizer, stop_ids(folder, config), name, load_s)


def load_runner(
    args: Namespace, terminal: Terminal, random: ModelConfig | None = None,
    will_generate: bool = False,
) -> tuple[Runner, str]:  # fmt: skip
    """Read the weights of MODEL and build the tier; the runner and the model's name. No text.

    random         the config of a model of random weights, which has no files
    will_generate  make it ready for many steps of one token
    """
    _check_runtime(args)
    if args.tier == 2:
        check_kernel_device(args.device, has_other_tiers=random is None)
    else:
        check_device(args.device)
    set_threads(args.threads)
    if random is not None:
        return load_random(args, random), args.model
    from dsv4.loader import Checkpoint

    folder = model_folder(args.model)
    checkpoint = Checkpoint.open(folder)
    for notice in checkpoint.notices:
        terminal.note(f"note: {notice}")
    name = NANO if args.model == NANO else folder.resolve().name
    with terminal.progress("loading") as progress:
        if args.tier == 2:
            return load_production(args, checkpoint, progress, will_generate), name
        weights = checkpoint.load(progress)
    return _build(args, checkpoint.config, weights), name


def set_threads(threads: int | None) -> None:
    """Limit torch to `threads` CPU threads."""
    if threads is None:
        return
    if not 1 <= threads <= env.MAX_THREADS:
        raise RequestError("--threads", f"1 to {env.MAX_THREADS:,}", threads)
    import torch

    torch.set_num_threads(threads)


def context_limit(args: Namespace, config: ModelConfig) -> int:
    """Tokens of prompt and answer together. Raises RequestError for an impossible --max-context."""
    limit = config.max_position_embeddings
    if args.max_context is None and args.tier == 2:
        from dsv4.engine.model import EngineLimits

        return EngineLimits().context(config)
    if args.max_context is None:
        return limit
    low = 2 if args.tier == 2 else 1  # a prompt and a token
    if not low <= args.max_context <= limit:
        raise RequestError("--max-context", f"{low} to {limit:,}", args.max_context)
    return args.max_context


def shorten(what: str, limit: int, config: ModelConfig) -> str:
    """The way out of a prompt beyond `limit`, which is at most the model's own."""
    is_raisable = limit < config.max_position_embeddings
    return f"shorten the {what}" + (", or raise --max-context" if is_raisable else "")


def check_prompt(ids: list[int], limit: int, fix: str) -> None:
    """Raises RequestError for an empty prompt, or, with `fix`, one beyond the context limit."""
    if not 1 <= len(ids) <= limit:
        expected = f"1 to {limit:,} tokens"
        raise RequestError("prompt", expected, len(ids), fix if ids else "give a prompt")


def check_stop_ids(ids: Sequence[int], config: ModelConfig) -> None:
    """Raises RequestError for a --stop-id that the model cannot say."""
    for token_id in ids:
        if not 0 <= token_id < config.vocab_size:
            raise RequestError("--stop-id", f"0 to {config.vocab_size - 1:,}", token_id)


def _check_runtime(args: Namespace) -> None:
    if args.tier == 0:
        for flag, is_set in (
            ("--simulate-kv-quant on", args.simulate_kv_quant == "on"),
            ("--keep-packed", args.keep_packed),
            (f"--dtype {args.dtype}", args.dtype != "float32"),
            (f"--device {args.device}", args.device != "cpu"),
        ):
            if is_set:
                raise RequestError("tier", f"1 for {flag}", 0, "use --tier 1")
    if args.tier == 2:
        check_production(args)
    elif args.no_fusion:
        raise RequestError("--no-fusion", "--tier 2 beside it", f"--tier {args.tier}")


def _build(args: Namespace, config: ModelConfig, weights: dict[str, Any]) -> Runner:
    if args.tier == 0:
        from dsv4.cli.tier0 import TransformersModel

        return TransformersModel(config, weights)
    import torch

    from dsv4.reference.model import ReferenceModel
    from dsv4.reference.simulation import QuantSimulation

    on = args.simulate_kv_quant == "on"
    simulate = QuantSimulation.cache() if on else QuantSimulation()
    dtype = getattr(torch, args.dtype)
    return ReferenceModel(config, weights, dtype, simulate, args.keep_packed, args.device)


def _foreign_tokenizer(detail: str) -> CheckpointError:
    return CheckpointError(
        "tokenizer", "tokenizer.json", detail=f"expected {detail}",
        fix="take tokenizer.json and config.json from one model",
    )  # fmt: skip
