"""Tier 2: one prompt through the production path, top to bottom.

    python scripts/single_shot_production.py nano -p "The capital of France is" --expect Paris

Same flags and output as the scripts of tiers 0 and 1, so that two tiers can be compared line by
line. Needs a GPU; TRITON_INTERPRET=1 and --device cpu run the same kernels, very slowly.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import dsv4.nano
from dsv4.cli.main import tell_errors
from dsv4.cli.model import config_hash
from dsv4.core.inventory import of_trunk
from dsv4.core.taps import capture
from dsv4.diff.dump import DumpInfo, write_dump
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.single import SingleSequence
from dsv4.loader import Checkpoint
from dsv4.text.detokenize import Detokenizer
from dsv4.text.tokenizer import Tokenizer

tell_errors()
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="checkpoint folder, or 'nano'")
parser.add_argument("-p", "--prompt", default="The capital of France is")
parser.add_argument("-n", "--max-tokens", type=int, default=16)
parser.add_argument("--device", default="cuda",
                    help="needs a GPU (default cuda); cpu under TRITON_INTERPRET=1, very slowly"
                    )  # fmt: skip
parser.add_argument("--dump", metavar="FILE", help="write the taps of the prefill (safetensors)")
parser.add_argument("--expect", metavar="TEXT", help="the gate: fail unless the output has it")
args = parser.parse_args()

# 1. Checkpoint: every tensor to the device as it is stored; the cache is allocated once.
started = time.perf_counter()
folder = dsv4.nano.path() if args.model == "nano" else args.model
checkpoint = Checkpoint.open(folder)
tokenizer = Tokenizer.open(folder)
ids = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
limits = EngineLimits(max_context=len(ids) + args.max_tokens, max_rows=len(ids))
stored = checkpoint.stream(keep=of_trunk)
model = ProductionModel(checkpoint.config, stored, args.device, limits)

# 2. On a GPU a whole step of one token, from its id to its logits, is recorded as one CUDA graph.
one = SingleSequence(model)
if model.device.type == "cuda":
    one.capture()
print(f"loaded in {time.perf_counter() - started:.1f} s", file=sys.stderr)

# 3. Prefill: the whole prompt in one step, eagerly.
cache = one.new_cache()
with capture(["*"] if args.dump else []) as taps:
    logits = one.forward(torch.tensor(ids, device=args.device), cache)[-1]
if args.dump:
    name, config = Path(folder).resolve().name, config_hash(checkpoint.config)
    info = DumpInfo(2, "bfloat16", name, config, tuple(ids), "production")
    write_dump(args.dump, taps.tensors(), info)

# 4. Decode: greedy, one token a step (a replay where it was recorded), until end of sequence.
detokenizer, text = Detokenizer(tokenizer), ""
for count in range(1, args.max_tokens + 1):
    token = int(logits.argmax())
    if token == checkpoint.config.eos_token_id:
        break
    piece = detokenizer.push(token)
    text += piece
    print(piece, end="", flush=True)
    if count < args.max_tokens:
        logits = one.forward(torch.tensor([token], device=args.device), cache)[-1]
text += detokenizer.flush()
print()

# 5. The gate.
if args.expect is not None:
    verdict = "PASS" if args.expect in text else "FAIL"
    print(f"{verdict}: {args.prompt!r} -> {text!r}")
    sys.exit(verdict == "FAIL")
