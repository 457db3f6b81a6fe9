"""Tier 0: one prompt through transformers' DeepseekV4ForCausalLM in FP32, top to bottom.

    python scripts/tier_0_hf_reference.py nano -p "The capital of France is" --expect Paris

Needs the extra `hf`. Same flags and output as single_shot_baseline.py, so that two tiers can be
compared line by line; no line of the forward pass is shared with this package.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import dsv4.nano
from dsv4.cli.main import tell_errors
from dsv4.cli.model import config_hash
from dsv4.cli.tier0 import TransformersModel
from dsv4.core.taps import capture
from dsv4.diff.dump import DumpInfo, write_dump
from dsv4.loader import Checkpoint
from dsv4.text.detokenize import Detokenizer
from dsv4.text.tokenizer import Tokenizer

tell_errors()
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="checkpoint folder, or 'nano'")
parser.add_argument("-p", "--prompt", default="The capital of France is")
parser.add_argument("-n", "--max-tokens", type=int, default=16)
parser.add_argument("--dtype", choices=["float32"], default="float32")
parser.add_argument("--dump", metavar="FILE", help="write the taps of the prefill (safetensors)")
parser.add_argument("--expect", metavar="TEXT", help="the gate: fail unless the output has it")
args = parser.parse_args()

# 1. Checkpoint: config, then every tensor, checked, in the precision it is stored in.
started = time.perf_counter()
folder = dsv4.nano.path() if args.model == "nano" else args.model
checkpoint = Checkpoint.open(folder)
tokenizer = Tokenizer.open(folder)
model = TransformersModel(checkpoint.config, checkpoint.load())  # FP32, dequantised
print(f"loaded in {time.perf_counter() - started:.1f} s", file=sys.stderr)

# 2. Prefill: the whole prompt in one call.
ids = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
cache = model.new_cache()
with capture(["*"] if args.dump else []) as taps:
    logits = model.forward(torch.tensor(ids), cache)[-1]
if args.dump:
    name, config = Path(folder).resolve().name, config_hash(checkpoint.config)
    info = DumpInfo(0, args.dtype, name, config, tuple(ids))
    write_dump(args.dump, taps.tensors(), info)

# 3. Decode: greedy, one token a step, until end of sequence.
detokenizer, text = Detokenizer(tokenizer), ""
for _ in range(args.max_tokens):
    token = int(logits.argmax())
    if token == checkpoint.config.eos_token_id:
        break
    piece = detokenizer.push(token)
    text += piece
    print(piece, end="", flush=True)
    logits = model.forward(torch.tensor([token]), cache)[-1]
text += detokenizer.flush()
print()

# 4. The gate.
if args.expect is not None:
    verdict = "PASS" if args.expect in text else "FAIL"
    print(f"{verdict}: {args.prompt!r} -> {text!r}")
    sys.exit(verdict == "FAIL")
