"""The production model: with oracles in place of its ops it is the reference, exactly."""

from __future__ import annotations

import fnmatch
import gc
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.core.config import ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.inventory import tensor_specs
from dsv4.core.taps import capture
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.single import SingleSequence
from dsv4.layers import moe
from dsv4.layers.indexer import IndexerForm
from dsv4.model.block import EXACT, FUSED
from support.fusions import watch_fused
from support.oracle_ops import use_oracles
from support.production import production, random_ids, random_weights, reference, served_config

CONFIG = served_config()
TAPS = (Path(__file__).parents[2] / "docs/taps.md").read_text()
WEIGHTS = random_weights(CONFIG)
FORMS = [IndexerForm("fp8"), IndexerForm("mxfp4"), IndexerForm("fp8", is_rotated=False)]


def fed(model: ProductionModel, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits of all ids, fed in chunks."""
    one = SingleSequence(model)
    cache = one.new_cache()
    logits = torch.cat([one.forward(part, cache) for part in ids.split(chunks)])
    one.close()
    return logits


def rows_apart(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference in each row, as a share of the largest value."""
    return (a - b).abs().flatten(1).amax(dim=1) / b.abs().max()


def check_equal(a: Tensor, b: Tensor) -> None:
    """Equal in FP32, but for rows whose key or index lies next to the middle of two FP8 values.

    Which side FP32 noise puts such a value on is nobody's fault; it shows in few rows.
    """
    apart = rows_apart(a, b)
    assert float(apart.median()) < 2e-6
    assert float((apart < 1e-5).float().mean()) >= 0.9
    assert float(apart.max()) < 5e-3


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.keys}{'' if f.is_rotated else '_plain'}")
@pytest.mark.parametrize("page_tokens", [128, 256])
def test_prefill_chunks_and_steps_equal_the_reference(
    form: IndexerForm, page_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_oracles(monkeypatch)
    ids = random_ids(CONFIG, 290)
    model = reference(CONFIG, WEIGHTS, form=form)
    expected = model.forward(ids, model.new_cache())
    limits = EngineLimits(max_context=512, page_tokens=page_tokens)
    ours = production(CONFIG, WEIGHTS, limits=limits, form=form)
    for chunks in ([290], [1, 126, 2, 3, 129, 1, 1, 1, 26]):
        check_equal(fed(ours, ids, chunks), expected)


@pytest.mark.parametrize("expert_format", ["mxfp4", "nvfp4"])
def test_both_expert_formats(expert_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_oracles(monkeypatch)
    config = served_config(expert_format=expert_format)
    weights, ids = random_weights(config), random_ids(config, 40)
    model = reference(config, weights)
    expected = model.forward(ids, model.new_cache())
    ours = production(config, weights)
    check_equal(fed(ours, ids, [33, 7]), expected)


def test_taps_have_the_values_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    use_oracles(monkeypatch)
    ids = random_ids(CONFIG, 140)
    model = reference(CONFIG, WEIGHTS)
    with capture() as theirs:
        model.forward(ids, model.new_cache())
    with capture() as ours:
        fed(production(CONFIG, WEIGHTS), ids, [140])
    expected, got = theirs.tensors(), ours.tensors()
    rows = [line.split("|")[1:-1] for line in TAPS.splitlines() if line.startswith("| `")]
    promised = [row[0].strip(" `").replace("{j}", "*") for row in rows if row[-1].strip() == "yes"]
    assert all(fnmatch.filter(got, glob) for glob in promised)
    assert got.keys() == {name for glob in promised for name in fnmatch.filter(expected, glob)}
    for name, x in got.items():
        if x.is_floating_point():
            apart = rows_apart(x, expected[name])
            assert float(apart.median()) < 1e-5, name
            assert float(apart.max()) < 1e-3, name
        else:
            assert torch.equal(x.long(), expected[name].long()), name


@pytest.mark.parametrize("name", FUSED)
def test_an_unfused_step_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_oracles(monkeypatch)
    ids = random_ids(CONFIG, 100)  # of 25 entries CSA takes 16
    fused = production(CONFIG, WEIGHTS)
    whole, kept = fed(fused, ids, [99, 1]), fused.cache.storage
    used = watch_fused(monkeypatch, name)
    parts = production(CONFIG, WEIGHTS, unfused=[name])
    assert torch.equal(whole, fed(parts, ids, [99, 1]))
    assert torch.equal(kept.states, parts.cache.storage.states)
    assert torch.equal(kept.pages, parts.cache.storage.pages)
    assert not used
    fed(production(CONFIG, WEIGHTS), ids, [99, 1])
    assert used


def test_the_kernels_and_their_parts() -> None:
    """No oracle: a layer of CSA on three tokens, and on the one that completes its first entry."""
    config = served_config(num_hidden_layers=1, compress_ratios=(4,), num_hash_layers=0)
    weights, ids = random_weights(config), random_ids(config, 4)
    taps = []
    for unfused in ((), EXACT, FUSED):
        with capture() as captured:
            fed(production(config, weights, torch.bfloat16, unfused=unfused), ids, [3, 1])
        taps.append(captured.tensors())
    whole, exact, parts = taps
    for name in ("logits", "layers.0.attn.indexer.topk", "layers.0.attn.q", "layers.0.ffn.out"):
        assert torch.equal(whole[name], exact[name]), name
    assert float(rows_apart(parts["logits"], whole["logits"]).max()) < 2e-2


def test_a_fusion_that_there_is_not() -> None:
    with pytest.raises(RequestError, match="latent_kv_norm_pack"):
        production(CONFIG, WEIGHTS, unfused=["everything"])


def test_the_kernels_put_together() -> None:
    """No oracle: the kernels as the CPU can run them, a prompt and two more tokens."""
    config = served_config(num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
    weights, ids = random_weights(config), random_ids(config, 14)
    wide = reference(config, weights)
    exact = wide.forward(ids, wide.new_cache())
    narrow = reference(config, weights, torch.bfloat16)
    rounded = narrow.forward(ids, narrow.new_cache())
    ours = fed(production(config, weights, torch.bfloat16), ids, [12, 1, 1])
    limit = 2 * rows_apart(rounded, exact).max()  # what BF16 costs the reference, twice
    assert float(rows_apart(ours, exact).max()) < float(limit)


def test_a_model_holds_its_weights_once() -> None:
    """Joined matrices take the place of their parts; bytes are those of the checkpoint's trunk."""
    config = served_config(vocab_size=4096, hidden_size=256)
    model = production(config, random_weights(config), torch.bfloat16)
    gc.collect()
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(model)}
    extra = sum(x.bias.nbytes for b in model.trunk.blocks if (x := b.attention.projections))
    specs = tensor_specs(config)
    stored = sum(s.nbytes for s in specs.values())
    table = sum(s.nbytes for n, s in specs.items() if n.endswith(".tid2eid"))
    apes = sum(s.nbytes for n, s in specs.items() if n.endswith(".ape"))
    assert sum(held.values()) - extra == stored - table // 2 - apes
    assert model.weight_bytes == stored - table // 2


def tensors_of(model: ProductionModel) -> list[Tensor]:
    """Every tensor of the trunk, found through its dataclasses and dicts."""
    found, todo = [], [model.trunk]
    while todo:
        x = todo.pop()
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, (tuple, list)):
            todo += x
        elif is_dataclass(x) and not isinstance(x, ModelConfig):
            todo += [getattr(x, f.name) for f in fields(x)]
    return found


def test_prompts_of_any_length_take_the_experts_for_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_oracles(monkeypatch)
    seen = []

    def watched(op: Callable) -> Callable:
        def watching(x: Tensor, ids: Tensor, *rest: object) -> Tensor:
            seen.append((op.__name__, len(x), int((ids >= 0).any(dim=1).sum())))
            return op(x, ids, *rest)

        return watching

    for name in ("moe_routed", "moe_with_shared"):
        monkeypatch.setattr(moe, name, watched(getattr(moe, name)))
    one = SingleSequence(production(CONFIG, WEIGHTS))
    cache = one.new_cache()
    for n in (2, 64, 70, 1):
        one.forward(random_ids(CONFIG, n), cache)
    routed = [("moe_routed", *size) for size in ((65, 2), (65, 64), (70, 70))]
    calls = [*routed, ("moe_with_shared", 1, 1)]
    assert seen == [call for call in calls for _ in range(CONFIG.num_hidden_layers)]


class Launches(TorchDispatchMode):
    """Names of what runs, in order; ops that are `marked` add to them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def marked(self, op: Callable, before: str = "", after: str = "") -> Callable:
        def marking(*args: object) -> object:
            self.names += [before] * bool(before)
            out = op(*args)
            self.names += [after] * bool(after)
            return out

        return marking


def test_experts_that_start_early_follow_the_router_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`after_router`: a kernel between that lets them start would not have what the norm wrote."""
    use_oracles(monkeypatch)
    seen = Launches()
    for name in ("router_hash", "router_topk"):
        monkeypatch.setattr(moe, name, seen.marked(getattr(moe, name), after="router"))
    whole = moe.moe_with_shared
    monkeypatch.setattr(moe, "moe_with_shared", seen.marked(whole, before="experts"))
    one = SingleSequence(production(CONFIG, WEIGHTS))
    with seen:
        one.forward(random_ids(CONFIG, 1), one.new_cache())
    places = [i for i, name in enumerate(seen.names) if name == "experts"]
    assert len(places) == CONFIG.num_hidden_layers
    assert [seen.names[i - 1] for i in places] == ["router"] * len(places)


@pytest.mark.parametrize("name", ["moe_with_shared", "gate_up_swiglu", "moe_routed_shared"])
def test_experts_apart_are_not_one_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step of one row would not run what was asked to run as parts."""
    use_oracles(monkeypatch)
    used = watch_fused(monkeypatch, "moe_with_shared")
    for unfused, calls in (((name,), 0), ((), CONFIG.num_hidden_layers)):
        one = SingleSequence(production(CONFIG, WEIGHTS, unfused=unfused))
        one.forward(random_ids(CONFIG, 1), one.new_cache())
        assert len(used) == calls
