#!/usr/bin/env python3
"""Does tier 2 say what tier 1 says? Greedy tokens of many prompts, and how near the misses were.

python scripts/agreement.py nano                  # 200 prompts, 16 tokens each, on a GPU
python scripts/agreement.py nano --dtype float32  # tier 1 in FP32
python scripts/agreement.py nano --rounding       # tier 1 in BF16 against FP32 (CPU, 8 minutes)

Half the prompts are questions about facts, half are pieces of text. Tier 2 answers all of them
together; tier 1 then reads each prompt with tier 2's answer, and must itself choose every token of
it. Where it would not, the miss is a near-tie if tier 1's margin between its own token and the one
of tier 2 is at most NEAR times the error of tier 2's logits: root mean square over all rows that
both have read. The exit code is 1 unless 95 % of the questions get the same answer, 95 % of the
tokens that follow a text are the same, and all misses are near-ties. Whole answers to texts are
counted but not judged: a trained model of this size is often undecided between two words, and what
follows the first of them is another text. `--rounding` shows how much of that BF16 alone does.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from drafts import shuffled_gates
from gate_measures import FILLER

from dsv4.cli.main import tell_errors
from dsv4.cli.model import model_folder
from dsv4.core.inventory import of_trunk
from dsv4.core.sampling import SamplingParams
from dsv4.engine.engine import Engine
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.single import SingleSequence
from dsv4.loader.checkpoint import Checkpoint
from dsv4.reference.model import ReferenceModel
from dsv4.text.tokenizer import Tokenizer

SHORTEST, LONGEST = 16, 192  # tokens of a piece of text
ENOUGH, NEAR = 0.95, 6.0
LIMITS = EngineLimits(max_context=1024, max_requests=64)


@dataclass(frozen=True)
class Miss:
    """The first token of an answer that tier 1 would not have chosen.

    prompt  ids
    at      its position in the answer
    chosen, expected  ids: tier 2's and tier 1's
    rank    of tier 2's in tier 1, from 1; 2 is its runner-up
    margin  of tier 1's logits between the two
    """

    prompt: tuple[int, ...]
    at: int
    chosen: int
    expected: int
    rank: int
    margin: float


def prompts_of(
    tokenizer: Tokenizer, count: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Questions about facts, and pieces of text that make up the number."""
    rng = random.Random(seed)
    asked = [p for gate in shuffled_gates(seed) for p in gate.prompts]
    facts = [p.ids(tokenizer) for p in rng.sample(asked, min((count + 1) // 2, len(asked)))]
    text, pieces = tokenizer.encode(FILLER.read_text(encoding="utf-8")), []
    for _ in range(count - len(facts)):
        n = rng.randint(SHORTEST, LONGEST)
        start = rng.randrange(len(text) - n)
        pieces.append([tokenizer.bos_id, *text[start : start + n]])
    return facts, pieces


def answers_of_tier_1(
    model: ReferenceModel, prompts: Sequence[list[int]], max_new: int
) -> list[list[int]]:
    """One after another."""
    answers = []
    for prompt in prompts:
        cache, ids, answer = model.new_cache(), torch.tensor(prompt, device=model.device), []
        for _ in range(max_new):
            ids = model.forward(ids, cache)[-1:].argmax(dim=1)
            answer.append(int(ids))
        answers.append(answer)
    return answers


def answers_of_tier_2(
    model: ProductionModel, prompts: Sequence[list[int]], max_new: int
) -> list[list[int]]:
    """All together."""
    engine = Engine(model)
    params = SamplingParams(temperature=0, max_tokens=max_new, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return [request.tokens for request in requests]


@dataclass(frozen=True)
class Comparison:
    """One prompt.

    miss    the first one, None where all tokens are tier 1's
    equal, count  tokens that are, and all; tier 1 has read tier 2's before each
    square  mean square of the difference of the logits that gave the answer
    """

    miss: Miss | None
    equal: int
    count: int
    square: float


def compare(
    reference: ReferenceModel, one: SingleSequence | ReferenceModel, prompt: list[int],
    answer: list[int],
) -> Comparison:  # fmt: skip
    """Let both read a prompt and the answer of `one`, which is tier 2."""
    ids = torch.tensor(prompt + answer[:-1], device=one.device)
    first = len(prompt) - 1
    wanted = reference.forward(ids, reference.new_cache())[first:].double()
    error = (one.forward(ids, one.new_cache())[first:].double() - wanted).square().mean()
    own = wanted.argmax(dim=1).tolist()
    at = next((i for i, (a, b) in enumerate(zip(own, answer, strict=True)) if a != b), None)
    miss = None
    if at is not None:
        row, chosen = wanted[at], answer[at]
        rank, margin = 1 + int((row > row[chosen]).sum()), float(row.max() - row[chosen])
        miss = Miss(tuple(prompt), at, chosen, own[at], rank, margin)
    equal = sum(a == b for a, b in zip(own, answer, strict=True))
    return Comparison(miss, equal, len(answer), float(error))


def report(facts: Sequence[Comparison], texts: Sequence[Comparison], tokenizer: Tokenizer) -> bool:
    """Print every miss and the shares that agree; whether all is well."""
    everything = [*facts, *texts]
    error = (sum(c.square for c in everything) / len(everything)) ** 0.5
    good = True
    for miss in [c.miss for c in everything if c.miss is not None]:
        units = miss.margin / error if error else float("inf")
        good &= units <= NEAR
        chosen, expected = (tokenizer.decode([x]) for x in (miss.chosen, miss.expected))
        print(
            f"...{tokenizer.decode(miss.prompt[-12:])!r}, token {miss.at + 1}: tier 2 says "
            f"{chosen!r}, number {miss.rank} of tier 1, which says {expected!r}; margin "
            f"{miss.margin:.4f}, {units:.1f} times the error"
            f"{'' if units <= NEAR else ': NO NEAR-TIE'}"
        )
    print(
        f"logits differ by {error:.4f} rms; the margin of a near-tie is at most {NEAR:g} times that"
    )
    for name, own in (("questions", facts), ("texts", texts), ("all", everything)):
        alike, count = sum(c.miss is None for c in own), sum(c.count for c in own)
        tokens = sum(c.equal for c in own)
        judged = {"questions": alike / len(own), "texts": tokens / count}.get(name, 1.0)
        good &= judged >= ENOUGH
        print(
            f"{name:<10}{alike} of {len(own)} answers are equal, {alike / len(own):.1%}; "
            f"{tokens} of {count} tokens, {tokens / count:.1%}"
            f"{'' if judged >= ENOUGH else f': NOT {ENOUGH:.0%}'}"
        )
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="nano", help="checkpoint folder, or nano")
    parser.add_argument("--device", default="cuda",
                        help="needs a GPU (default cuda); cpu under TRITON_INTERPRET=1, very slowly"
                        )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="tier 1"
    )
    parser.add_argument("--rounding", action="store_true",
                        help="tier 1 in BF16 takes the place of tier 2, tier 1 in FP32 its own"
                        )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=200, help="2 or more (default 200)")
    parser.add_argument("--max-new", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder = model_folder(args.model)
    checkpoint, tokenizer = Checkpoint.open(folder), Tokenizer.open(folder)
    facts, texts = prompts_of(tokenizer, args.prompts, args.seed)
    prompts, weights = facts + texts, checkpoint.load()
    if args.rounding:
        one = ReferenceModel(checkpoint.config, weights, torch.bfloat16)
        reference = ReferenceModel(checkpoint.config, weights, torch.float32)
        answers = answers_of_tier_1(one, prompts, args.max_new)
    else:
        stored, dtype = checkpoint.stream(keep=of_trunk), getattr(torch, args.dtype)
        model = ProductionModel(checkpoint.config, stored, args.device, LIMITS)
        reference = ReferenceModel(checkpoint.config, weights, dtype, device=args.device)
        answers, one = answers_of_tier_2(model, prompts, args.max_new), SingleSequence(model)
    pairs = zip(prompts, answers, strict=True)
    results = [compare(reference, one, *pair) for pair in pairs]
    good = report(results[: len(facts)], results[len(facts) :], tokenizer)
    print("PASS" if good else "FAIL")
    return 0 if good else 1


if __name__ == "__main__":
    tell_errors()
    sys.exit(main())
