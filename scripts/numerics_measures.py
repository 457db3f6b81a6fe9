"""What the numerics study measures of a variant: errors of sub-blocks, and of the whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from damage import patched
from gate_measures import FACTS, FEW
from lookback_gates import LookBack
from numerics_gates import right_answers
from numerics_variants import FULL, REFERENCE, Amount, Variant, build
from torch import Tensor

from dsv4.core.config import LayerKind
from dsv4.core.taps import capture
from dsv4.nano import path as nano_path
from dsv4.reference.attention import visible_entries
from dsv4.reference.layer import Layer
from dsv4.reference.model import ReferenceModel
from dsv4.testing.gates import load_countries
from dsv4.testing.lookback import Score
from dsv4.text.tokenizer import Tokenizer

BLOCKS = ("KV vectors", "SWA", "CSA", "HCA", "experts", "streams", "logits")
LOCAL = ("layers.*.kv", "layers.*.compressed", "layers.*.topk")  # taps of one sub-block
Errors = dict[str, list[tuple[float, float]]]  # block -> (cosine, relative rms) of layers and texts


@dataclass(frozen=True)
class Exact:
    """What the unquantised model did with one text: (input, output) of sub-blocks, and taps."""

    ids: Tensor
    calls: dict[str, tuple[Tensor, Tensor]]
    taps: dict[str, Tensor]


@dataclass(frozen=True)
class Figures:
    """Of one variant.

    chosen     share of the indexer's top-k that is the same, of layers and texts
    same_word  share of positions with the same best word; kl, loss: means over positions, nats
    gates      right answers; none where the variant is not asked
    """

    errors: Errors
    chosen: list[float]
    same_word: float
    kl: float
    loss: float
    gates: dict[str, Score]


@cache
def texts(amount: Amount) -> dict[str, list[int]]:
    """Texts of the kinds that nano was trained on; all but the facts longer than 2,000 tokens."""
    tokenizer = Tokenizer.open(nano_path())
    of = LookBack(build(REFERENCE), tokenizer, FEW)
    found = {"needles": list(of.needles("sentence", 1, amount.length)[0].ids)}
    if amount != FULL:
        return found
    rows = load_countries(FACTS)
    said = " ".join(f"The capital of {r['name']} is {r['capital']}." for r in rows)
    found["facts"] = [tokenizer.bos_id, *tokenizer.encode(said)[:511]]
    found["prose"] = [tokenizer.bos_id, *of.filler[: amount.length - 1]]
    return found


@cache
def exact(amount: Amount) -> tuple[Exact, ...]:
    """The unquantised reference on each text."""
    model, out = build(REFERENCE), []
    for ids in texts(amount).values():
        calls: dict[str, tuple[Tensor, Tensor]] = {}

        def recorded(part: str, call: Any, calls: Any = calls) -> Callable[..., Tensor]:
            def run(self: Layer, x: Tensor, *rest: Any) -> Tensor:
                y = call(self, x, *rest)
                calls[f"{self.name}.{part}"] = x, y
                return y

            return run

        with ExitStack() as stack, capture((*LOCAL, "*.streams")) as taps:
            for part in ("attention", "ffn"):
                stack.enter_context(patched(Layer, part, recorded(part, getattr(Layer, part))))
            logits = model.forward(torch.tensor(ids), model.new_cache())
        out.append(Exact(torch.tensor(ids), calls, taps.tensors() | {"logits": logits}))
    return tuple(out)


def distance(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Cosine, and |got - want| / |want|."""
    x, y = got.double().flatten(), want.double().flatten()
    return float(x @ y / (x.norm() * y.norm())), float((x - y).norm() / y.norm())


def same_choice(got: Tensor, want: Tensor) -> float:
    """Mean share of the k chosen entries that are the same, of queries that see more than k."""
    k = want.shape[1]
    visible = visible_entries(torch.arange(len(want)), LayerKind.CSA.ratio)
    none = torch.zeros(len(want), int(visible.max()) + 1, dtype=torch.bool)
    both = none.scatter(1, got + 1, True) & none.scatter(1, want + 1, True)
    return float((both[:, 1:].sum(1)[visible > k] / k).mean())


@torch.inference_mode()
def sub_blocks(model: ReferenceModel, of: Exact, errors: Errors, chosen: list[float]) -> None:
    """Every sub-block on the exact inputs, against its exact output."""
    for layer, layer_cache in zip(model.layers, model.new_cache().layers, strict=True):
        (x, attended), (z, fed) = (of.calls[f"{layer.name}.{p}"] for p in ("attention", "ffn"))
        with capture(LOCAL) as taps:
            y = layer.attention(x.to(model.dtype), layer_cache)
        errors[layer.kind.name].append(distance(y, attended))
        errors["experts"].append(distance(layer.ffn(z.to(model.dtype), of.ids), fed))
        for name, value in taps.tensors().items():
            if name.endswith(".topk"):
                chosen.append(same_choice(value, of.taps[name]))
            else:
                errors["KV vectors"].append(distance(value, of.taps[name]))


def whole(model: ReferenceModel, of: Exact, errors: Errors) -> tuple[Tensor, Tensor, Tensor]:
    """The whole model: errors of streams and logits; of each position agreement, KL and loss."""
    with capture(("*.streams",)) as taps:
        logits = model.forward(of.ids, model.new_cache())
    errors["streams"] += [distance(x, of.taps[name]) for name, x in taps.tensors().items()]
    want = of.taps["logits"]
    errors["logits"].append(distance(logits, want))
    a, b = logits.double().log_softmax(-1), want.double().log_softmax(-1)
    loss = F.nll_loss(a[:-1], of.ids[1:], reduction="none")
    return (logits.argmax(-1) == want.argmax(-1)).double(), (b.exp() * (b - a)).sum(-1), loss


def measure(variant: Variant, amount: Amount) -> Figures:
    """All figures of one variant."""
    model, errors, chosen, parts = build(variant), defaultdict(list), [], []
    for of in exact(amount):
        sub_blocks(model, of, errors, chosen)
        parts.append(whole(model, of, errors))
    gates = {}
    if variant.is_asked:
        gates = right_answers(model, Tokenizer.open(nano_path()), amount)
    same, kl, loss = (float(torch.cat(x).mean()) for x in zip(*parts, strict=True))
    return Figures(dict(errors), chosen, same, kl, loss, gates)
