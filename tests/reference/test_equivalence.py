"""Prefill == chunked prefill == step decode, for every layer kind, around every boundary."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.taps import capture
from dsv4.reference.compressor import CompressorState, compress
from dsv4.reference.model import ReferenceModel
from dsv4.reference.weights import resident_bytes
from dsv4.testing.numeric import relative_error
from dsv4.testing.tiny import random_weights, tiny_config

LIMIT = 1e-11  # FP64: chunking changes the order of no sum that matters
BOUNDARIES = (1, 3, 4, 5, 7, 8, 9, 127, 128, 129, 131, 132, 133, 255, 256, 257, 260)
RATIOS = {"SWA": 0, "CSA": 4, "HCA": 128}


def model_of(ratio: int, **overrides) -> ReferenceModel:
    config = tiny_config(
        num_hidden_layers=2, compress_ratios=(ratio, ratio), num_hash_layers=1,
        num_nextn_predict_layers=0, index_topk=8, sliding_window=16, **overrides,
    )  # fmt: skip
    return ReferenceModel(config, random_weights(config, seed=ratio), torch.float64)


def ids_of(config: ModelConfig, n: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (n,), generator=rng)


def in_chunks(model: ReferenceModel, ids: Tensor, sizes: list[int]) -> tuple[Tensor, dict]:
    cache, parts = model.new_cache(), []
    with capture(["layers.*.attn.kv", "layers.*.attn.compressed", "*.topk"]) as cap:
        for chunk in ids.split(sizes):
            parts.append(model.forward(chunk, cache))
    assert cache.length == len(ids)
    return torch.cat(parts), cap.tensors()


@pytest.mark.parametrize("kind", RATIOS)
@pytest.mark.parametrize("split", BOUNDARIES)
def test_one_split_anywhere(kind: str, split: int) -> None:
    model = model_of(RATIOS[kind])
    ids = ids_of(model.config, 264)
    whole, whole_taps = in_chunks(model, ids, [264])
    parts, parts_taps = in_chunks(model, ids, [split, 264 - split])
    assert relative_error(parts, whole) < LIMIT
    for name, want in whole_taps.items():
        assert relative_error(parts_taps[name].double(), want.double()) < LIMIT, name


@pytest.mark.parametrize("kind", RATIOS)
@pytest.mark.parametrize("seed", range(4))
def test_random_chunks(kind: str, seed: int) -> None:
    model, rng = model_of(RATIOS[kind]), random.Random(seed)
    n = rng.choice([130, 200, 256, 300])
    sizes = []
    while sum(sizes) < n:
        sizes.append(min(rng.choice([1, 1, 2, 3, 4, 5, 17, 127, 128, 129]), n - sum(sizes)))
    ids = ids_of(model.config, n, seed)
    whole, parts = in_chunks(model, ids, [n])[0], in_chunks(model, ids, sizes)[0]
    assert relative_error(parts, whole) < LIMIT


@pytest.mark.parametrize("kind", RATIOS)
@pytest.mark.parametrize("prefill", [1, 126, 128, 131])
def test_step_decode(kind: str, prefill: int) -> None:
    model = model_of(RATIOS[kind])
    ids = ids_of(model.config, prefill + 10)
    whole, whole_taps = in_chunks(model, ids, [prefill + 10])
    steps, step_taps = in_chunks(model, ids, [prefill, *[1] * 10])
    assert relative_error(steps, whole) < LIMIT
    for name, want in whole_taps.items():
        assert step_taps[name].shape == want.shape, name


def test_mixed_layers_and_quantised_cache() -> None:
    """The schedule of the golden model with the cache's roundings on: still chunk-independent."""
    from dsv4.reference.simulation import QuantSimulation

    config = tiny_config(
        num_hidden_layers=4, compress_ratios=(0, 4, 128, 4), sliding_window=16, index_topk=8,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    model = ReferenceModel(
        config, random_weights(config, 3), torch.float64, QuantSimulation.cache()
    )
    ids = ids_of(config, 200)
    whole, parts = in_chunks(model, ids, [200])[0], in_chunks(model, ids, [61, 70, 1, 1, 67])[0]
    assert relative_error(parts, whole) < LIMIT


def test_mtp_block_in_chunks() -> None:
    config = tiny_config(num_nextn_predict_layers=1, sliding_window=16)
    model = ReferenceModel(config, random_weights(config, 5), torch.float64)
    ids = ids_of(config, 60)
    cache = model.new_cache()
    streams = model.forward_streams(ids, cache)
    whole = model.forward_mtp(streams[:-1], ids[1:], model.new_cache())
    cache = model.new_cache()
    first = model.forward_mtp(streams[:20], ids[1:21], cache)
    rest = model.forward_mtp(streams[20:-1], ids[21:], cache)
    assert relative_error(torch.cat((first, rest)), whole) < LIMIT


@pytest.mark.parametrize("kind", [LayerKind.CSA, LayerKind.HCA], ids=lambda k: k.name)
def test_compressor_emits_every_entry_once(kind: LayerKind) -> None:
    r, width = kind.ratio, 8 if kind is LayerKind.CSA else 4
    rng = torch.Generator().manual_seed(0)
    n = 3 * r + 1
    kappa, gamma = (torch.randn(n, width, generator=rng, dtype=torch.float64) for _ in range(2))
    whole, state = compress(CompressorState.empty(width, kappa), kappa, gamma, kind)
    assert whole.shape == (3, 4)
    assert (state.start, state.length) == ((2 if kind is LayerKind.CSA else 3) * r, n)
    state, parts = CompressorState.empty(width, kappa), []
    for p in range(n):
        entries, state = compress(state, kappa[p : p + 1], gamma[p : p + 1], kind)
        assert len(entries) == ((p + 1) % r == 0)
        assert len(state.kappa) <= (2 * r - 1 if kind is LayerKind.CSA else r - 1)
        parts.append(entries)
    assert relative_error(torch.cat(parts), whole) < LIMIT


def test_empty_input_is_inert() -> None:
    model = model_of(4)
    ids, cache = ids_of(model.config, 20), model.new_cache()
    a = model.forward(ids, cache)
    assert model.forward(ids[:0], cache).shape == (0, model.config.vocab_size)
    assert cache.length == 20
    assert relative_error(a, model.forward(ids, model.new_cache())) == 0


def test_decode_cost_does_not_grow_with_the_context() -> None:
    """Per-step work is bounded: window keys stay at W - 1, open rows below two windows."""
    model = model_of(4)
    cache = model.new_cache()
    for chunk in ids_of(model.config, 400).split(50):
        model.forward(chunk, cache, last_only=True)
    for layer in cache.layers:
        assert len(layer.window) == model.config.sliding_window - 1
        assert layer.compressor is not None
        assert len(layer.compressor.kappa) < 8
        assert layer.entries is not None
        assert len(layer.entries) == 100


def test_bad_ids_are_refused() -> None:
    from dsv4.core.errors import RequestError

    model = model_of(0)
    V = model.config.vocab_size
    for bad in (torch.tensor([V]), torch.tensor([-1]), torch.zeros(1, 2).long(), torch.zeros(2)):
        with pytest.raises(RequestError, match="ids: expected"):
            model.forward(bad, model.new_cache())
    with pytest.raises(ValueError, match="dtype: expected"):
        ReferenceModel(model.config, {}, torch.float16)
    with pytest.raises(RequestError, match="block: expected"):
        model.forward_mtp(torch.zeros(1, 4, 8), torch.zeros(1).long(), model.new_cache())


def test_context_limit_is_refused() -> None:
    from dsv4.core.errors import RequestError

    model = model_of(0, max_position_embeddings=32)
    cache = model.new_cache()
    model.forward(ids_of(model.config, 32), cache)
    with pytest.raises(RequestError, match="at most 32 positions"):
        model.forward(ids_of(model.config, 1), cache)


@pytest.mark.parametrize("keep_packed", [False, True])
def test_keep_packed_changes_memory_only(keep_packed: bool) -> None:
    config = tiny_config()
    weights = random_weights(config, 1)
    ids = ids_of(config, 12)
    base = ReferenceModel(config, weights)
    other = ReferenceModel(config, weights, keep_packed=keep_packed)
    want = base.forward(ids, base.new_cache())
    assert torch.equal(other.forward(ids, other.new_cache()), want)
    held = [n for n in other.weights._ready if ".experts." in n]
    assert bool(held) is not keep_packed
    assert not set(other.weights._ready) & set(other.weights._stored)  # nothing is held twice


@pytest.mark.parametrize("keep_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resident_bytes_is_what_a_used_model_holds(keep_packed: bool, dtype: torch.dtype) -> None:
    config = tiny_config(num_nextn_predict_layers=0)
    weights = random_weights(config, 1)
    model = ReferenceModel(config, weights, dtype, keep_packed=keep_packed)
    model.forward(ids_of(config, 40), model.new_cache())
    for name in list(model.weights._stored):
        if not (keep_packed and ".experts." in name):
            _ = model.weights[name]  # experts that no token went to
    held = (*model.weights._ready.values(), *model.weights._stored.values())
    assert sum(x.nbytes for x in held) == resident_bytes(weights, dtype, keep_packed)
