"""A decode step of transformers' DeepseekV4 at the widths of V4-Flash, as a baseline.

    python benchmarks/transformers_step.py [--context 1024] [--json FILE] [--no-compile]

One layer of each kind, random BF16 weights (52 GB), batch 1, after a prompt in transformers' own
cache: eager, then with every layer under torch.compile. The step of the whole model is what the
layers take times how many of their kind it has, plus the rest of the step. `--device cpu --tiny`
tries the code.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dsv4.core.config import ModelConfig
from dsv4.testing.bench import commit

try:
    import transformers
    from transformers import AutoModelForCausalLM, DeepseekV4Config, DynamicCache
except ImportError:
    raise SystemExit("needs transformers >= 5.17: pip install 'dsv4-inference[hf]'") from None

ATTENTION = {
    0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention",
}  # fmt: skip
WARM_UP, STEPS = 4, 16  # multiples of 4: CSA makes an entry in every fourth step
COMPILE_S = 45
RECOMPILES = 64  # all layers are one function to it, which gives up after 8
TINY = {
    "vocab_size": 160, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "head_dim": 64, "partial_rotary_factor": 0.5, "q_lora_rank": 16, "o_groups": 2,
    "o_lora_rank": 16, "n_routed_experts": 8, "index_n_heads": 16, "index_topk": 8,
}  # fmt: skip

Kind = tuple[str, str]  # attention, experts
Mark = Callable[[], Any]


def kinds() -> Counter[Kind]:
    """How many layers of each kind V4-Flash has, in the order they come."""
    c = ModelConfig.flash()
    return Counter(
        (ATTENTION[c.compress_ratios[i]], "hash_moe" if c.is_hash_layer(i) else "moe")
        for i in range(c.num_hidden_layers)
    )


def build(device: str, is_tiny: bool) -> Any:
    """A model of one layer of each kind."""
    attention, experts = zip(*kinds(), strict=True)
    config = DeepseekV4Config(
        num_hidden_layers=len(attention), layer_types=list(attention),
        mlp_layer_types=list(experts), num_nextn_predict_layers=0, **(TINY if is_tiny else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # different experts for every token
                scores = torch.rand(len(table), config.n_routed_experts)
                table.copy_(scores.topk(table.shape[1]).indices)
    return model


@contextmanager
def layer_marks(layers: Any, mark: Mark) -> Iterator[list[tuple[int, Any]]]:
    """What `mark` gives before and after every layer, with the layer's index."""
    marks: list[tuple[int, Any]] = []

    def note(i: int) -> Callable[..., None]:
        return lambda *_: marks.append((i, mark()))

    hooks = []
    for i, layer in enumerate(layers):
        hooks += [layer.register_forward_pre_hook(note(i)), layer.register_forward_hook(note(i))]
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


def cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_us(a: Any, b: Any) -> float:
    return 1e6 * (b - a) if isinstance(a, float) else 1e3 * a.elapsed_time(b)


@torch.inference_mode()
def time_steps(model: Any, context: int) -> tuple[float, list[float]]:
    """Microseconds of a decode step, and of each layer in it; means over STEPS."""
    device, vocab = model.device, model.config.vocab_size
    on_gpu = device.type == "cuda"
    ids = torch.randint(0, vocab, (1, context), device=device)
    cache = DynamicCache(config=model.config)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    token = forward(ids)
    for _ in range(WARM_UP):
        token = forward(token)
    if on_gpu:
        torch.cuda.synchronize()
    with layer_marks(model.model.layers, cuda_mark if on_gpu else time.perf_counter) as marks:
        start = time.perf_counter()
        for _ in range(STEPS):
            token = forward(token)
        if on_gpu:
            torch.cuda.synchronize()
        step_us = 1e6 * (time.perf_counter() - start) / STEPS
    times: dict[int, list[float]] = {}
    for (i, before), (_, after) in zip(marks[::2], marks[1::2], strict=True):
        times.setdefault(i, []).append(between_us(before, after))
    return step_us, [statistics.mean(times[i]) for i in sorted(times)]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def compiled_steps(model: Any, context: int, seconds: int) -> tuple[float, list[float]] | None:
    """As `time_steps` with compiled layers; None, and the reason printed, if that fails."""
    from torch._dynamo.utils import counters

    try:
        torch._dynamo.config.recompile_limit = RECOMPILES
        with at_most(seconds):
            for layer in model.model.layers:
                layer.forward = torch.compile(layer.forward)
            time_steps(model, context)  # everything is compiled here
            before = counters["stats"]["unique_graphs"]
            found = time_steps(model, context)
    except Exception as error:  # whatever the compiler finds to complain about
        reason = str(error).strip().splitlines() or [""]
        print(f"compiled: none: {type(error).__name__}: {reason[0]}")
        return None
    if counters["stats"]["unique_graphs"] > before:
        print("compiled: some of it was compiled again while it was timed")
    return found


def report(mode: str, found: tuple[float, list[float]] | None, args: Any) -> dict[str, Any]:
    """Print one mode; -> its row. `us`, a measurement of dsv4, is null."""
    counts, c = kinds(), ModelConfig.flash()
    whole, each = None, {}
    if found is not None:
        step_us, layers = found
        rest = step_us - sum(layers)
        for (kind, count), us in zip(counts.items(), layers, strict=True):
            each[" ".join(kind)] = round(us, 1)
            print(f"{mode:9} {kind[0]:30} {kind[1]:9} x {count:2} {us:10.1f} us")
        whole = rest + sum(n * us for n, us in zip(counts.values(), layers, strict=True))
        print(f"{mode:9} {'rest of the step':47} {rest:8.1f} us")
        print(
            f"{mode:9} {f'step of {c.num_hidden_layers} layers, extrapolated':47} {whole:8.0f} us"
        )
    return {
        "op": "decode_step", "shape": {"config": "tiny" if args.tiny else "flash",
        "layers": c.num_hidden_layers, "context": args.context, "B": 1, "mode": mode},
        "us": None, "baseline": "transformers", "baseline_us": whole and round(whole, 1),
        "layer_us": each, "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "none",
        "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit(),
        "date": date.today().isoformat(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="other widths, to try the code")
    parser.add_argument("--no-compile", action="store_true", help="eager alone")
    parser.add_argument(
        "--compile-s", type=int, default=COMPILE_S, metavar="S", help="and no longer"
    )
    parser.add_argument("--json", type=Path, help="file the rows are added to")
    args = parser.parse_args()
    if args.context < 1:
        parser.error(f"--context: expected 1 or more, got {args.context}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --device cpu --tiny tries the code")
    model = build(args.device, args.tiny)
    experts = getattr(model.config, "_experts_implementation", "eager")
    print(f"transformers {transformers.__version__}, experts by {experts}", flush=True)
    keep(report("eager", time_steps(model, args.context), args), args.json)
    if not args.no_compile:
        found = compiled_steps(model, args.context, args.compile_s)
        keep(report("compiled", found, args), args.json)


def keep(row: dict[str, Any], path: Path | None) -> None:
    """Add a row to the file, if there is one, at once: compiling may end the process."""
    if path:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
