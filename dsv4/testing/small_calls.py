"""Small calls of every kernel, by family: for tools that watch one call at a time, and slowly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dsv4.testing.cases import activation, cache, embedding, indexer, linear, mhc, moe, norm, quant
from dsv4.testing.cases import router as routing
from dsv4.testing.cases.attention import AttentionCase, latent_kv_args
from dsv4.testing.cases.sampling import logit_rows, mixed_rows, request_rows

TOKENS = 1, 5, 70  # one; some, unaligned; more than kernels for few rows take
Calls = Mapping[str, dict[str, Any]]  # "op" or "op/variant" -> arguments


@dataclass(frozen=True)
class Family:
    """Calls for a number of tokens, and which kernels (parts of their names) they are for.

    tokens  for which every device function of the family starts in three of the calls
    """

    calls: Callable[[int], Calls]
    kernels: tuple[str, ...] = ("",)
    tokens: tuple[int, ...] = TOKENS


def requests(T: int) -> list[tuple[int, int]]:
    """Tokens before a step and in it, T together."""
    if T < 3:
        return [(300, T)]
    return [(300, 1), (0, 2), (150, T - 3)]


def mhc_calls(T: int) -> Calls:
    calls = {op: mhc.mhc_case(op, T, 4096) for op in mhc.OPS}
    quantised = {
        f"{op}/fp8": mhc.mhc_case(op, T, 4096, quantise=True)
        for op in ("mhc_post_pre", "mhc_pre_norm")
    }
    return calls | quantised


def router_calls(T: int) -> Calls:
    (E, K), scaling = routing.FLASH, routing.SCALING
    logits, bias = routing.router_logits(T, E)
    chosen = {"logits": logits, "bias": bias, "k": K, "scaling": scaling, "is_padding": None}
    table, ids = routing.hash_table(100, E, K), torch.arange(T) - 1
    lists = {"first_expert": 0, "num_experts": E, "block_size": 16}
    return {
        "router_topk": chosen,
        "router_topk/padding": chosen | {"is_padding": torch.arange(T) % 3 == 1},
        "router_hash": {"logits": logits, "tid2eid": table, "token_ids": ids, "scaling": scaling},
        "moe_align": {"experts": routing.distinct_experts(T, E, K), **lists},
        "moe_align/chunks": {"experts": routing.distinct_experts(10 * T, E, K), **lists},
    }


def sampling_calls(T: int, V: int = 20011) -> Calls:
    logits, none = logit_rows(T, V), {"top_k": None, "top_p": None, "min_p": None}
    return {
        "sample": {"logits": logits, **none, **request_rows(T)},
        "sample/filters": {"logits": logits, **mixed_rows(T)},
        "sample/bf16": {"logits": logits.bfloat16(), **mixed_rows(T)},
    }


def attention_calls(T: int) -> Calls:
    calls: dict[str, dict[str, Any]] = {
        "kv_step_pack": {"kv": torch.randn(T, 512).to(torch.bfloat16), "rope_dim": 64},
        "latent_kv_norm_pack": latent_kv_args(T, 1024),
    }
    for name, kind in {"csa": (4, 64, 512), "hca": (128, 2, None)}.items():
        for heads in (16, 64):
            args = AttentionCase(requests(T), heads, 512, 128, *kind, padding=1).args()
            calls[f"sparse_attn_decode/{name}_{heads}"] = args
            calls[f"sparse_attn_prefill/{name}_{heads}"] = args
            if name == "csa":
                calls[f"sparse_attn_decode_fp8/{heads}"] = args
                calls[f"sparse_attn_prefill_fp8/{heads}"] = args
    return calls


def indexer_calls(T: int) -> Calls:
    calls: dict[str, dict[str, Any]] = {}
    for keys in ("fp8", "mxfp4"):
        spans = [(2047 + start, n) for start, n in requests(T)]
        case = indexer.indexer_case(spans, 512, keys, num_heads=64, entries_per_page=64, padding=1)
        calls[f"indexer_scores_topk/{keys}"] = case.args()
    for S in (3000, 20000):
        lengths = torch.arange(T) * 97 % S + 1
        scores = indexer.select_scores(T, S)
        calls[f"topk_select/{S}"] = {"scores": scores, "lengths": lengths, "topk": 512}
    return calls


def linear_calls(T: int) -> Calls:
    calls: dict[str, dict[str, Any]] = {}
    for name, (N, K, groups) in {"wq_a": (1024, 4096, 1), "wo_a": (2048, 512, 8)}.items():
        weight, scale = linear.fp8_weight(N, K)
        x = linear.tokens(T, groups * K)
        args = {"x": x, "weight": weight, "scale": scale, "groups": groups}
        calls[f"linear_fp8/{name}"] = args | {"quantize_input": False}
        calls[f"linear_fp8/{name}_w8a8"] = args | {"quantize_input": True}
        code, byte = linear.fp8_tokens(T, groups * K)
        calls[f"linear_fp8_w8a8/{name}"] = args | {"x": code, "x_scale": byte}
    wide = torch.randn(256, 4096).to(torch.bfloat16)
    calls["wide_linear"] = {"x": linear.tokens(T, 4096), "weight": wide}
    calls["joined_wide_linear"] = linear.joined_args(T, 4096, linear.JOINED_FLASH["csa"])
    return calls


def moe_calls(T: int) -> Calls:
    calls: dict[str, dict[str, Any]] = {}
    for format in moe.GROUPS:
        for name, sizes in {"nano": (256, 128, 16), "wide": (512, 256, 16)}.items():
            case = moe.MoeCase.random(T, *sizes, format=format)
            case.ids[-1, 0] = -1
            calls[f"moe_routed/{name}_{format}"] = case.args()
            if format == "mxfp4":
                calls[f"moe_routed_w4a8/{name}"] = case.args_w4a8()
    return calls


def moe_shared_calls(T: int) -> Calls:
    calls: dict[str, dict[str, Any]] = {}
    for D, F in ((512, 512), (1024, 512), (512, 1024)):
        for format in moe.GROUPS:
            case = moe.MoeCase.random(T, D, F, 16, format=format)
            case.ids[-1, 0] = -1
            calls[f"moe_with_shared/{D}_{F}_{format}"] = case.args_with_shared()
    return calls


def one(op: str, calls: Callable[..., dict[str, Any]], *sizes: int) -> Callable[[int], Calls]:
    """A family of one op: `calls(T, *sizes)`."""
    return lambda T: {op: calls(T, *sizes)}


FAMILIES = {
    "attention": Family(attention_calls, tokens=(*TOKENS, 20, 140)),
    "moe_grouped": Family(moe_calls, ("moe_routed/grouped",)),
    "moe_w4a8": Family(moe_calls, ("moe_routed_w4a8/",)),
    "moe_decode": Family(moe_calls, ("moe_routed/sm90", "moe_routed/triton"), (*TOKENS, 48)),
    "moe_shared": Family(moe_shared_calls, tokens=(1,)),
    "indexer": Family(indexer_calls),
    "linear": Family(linear_calls, tokens=(*TOKENS, 24, 150, 200)),
    "cache": Family(partial(cache.cache_calls, head_dim=512)),
    "mhc": Family(mhc_calls, tokens=(*TOKENS, 257)),
    "sampling": Family(sampling_calls),
    "norm": Family(partial(norm.norm_calls, dims=1024, rows=128)),
    "quant": Family(partial(quant.quant_calls, dims=1024)),
    "router": Family(router_calls, tokens=(*TOKENS, 120, 200)),
    "embedding": Family(one("embed_streams", embedding.embedding_case, 64, 4096)),
    "activation": Family(one("gate_up_swiglu", activation.activation_case, 2048)),
}  # slowest first
