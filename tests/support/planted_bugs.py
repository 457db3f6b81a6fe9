"""Bugs that implementations of DeepSeek-V4 really have, each as a patch of one oracle.

The table is the point: name, what is patched, with what. test_planted_bugs.py runs the golden
checks with each of them in place and demands that they fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from dsv4.core.config import LayerKind
from dsv4.reference import compressor, experts, quant

LAYER, MODEL, WEIGHTS = "dsv4.reference.layer", "dsv4.reference.model", "dsv4.reference.weights"


@dataclass(frozen=True)
class Bug:
    """`target` (module.attribute) is replaced by `make(original)`; `check` must then fail."""

    name: str
    target: str
    make: Callable[[Any], Any]
    check: str = "prefill"  # prefill | decode | mtp | kvquant | w4a8


def _rope_sign(f):
    return lambda x, cos, sin, inverse=False: f(x, cos, -sin, inverse)


def _rope_one_way(f):
    return lambda x, cos, sin, inverse=False: x if inverse else f(x, cos, sin)


def _rope_half_split(f):
    def rotate(x, cos, sin, inverse=False):
        r = 2 * cos.shape[-1]
        nope, rope_ = x[..., :-r], x[..., -r:].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        out = f(torch.cat((nope, rope_), -1), cos, sin, inverse)
        back = out[..., -r:].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat((nope, back), -1)

    return rotate


def _rope_leading_dims(f):
    def rotate(x, cos, sin, inverse=False):
        return f(x.flip(-1), cos, sin, inverse).flip(-1)

    return rotate


def _no_yarn(f):
    return lambda config, kind: f(replace(config, yarn=None), kind)


def _one_theta(f):
    return lambda config, kind: f(replace(config, compress_rope_theta=config.rope_theta), kind)


def _swa_theta_for_all(f):
    return lambda config, kind: f(config, LayerKind.SWA)


def _mscale(f):
    return lambda q, kv, idx, sink, scale: f(q, kv, idx, sink, scale * 1.277**2)


def _scale_of_nope_dims(f):
    return lambda q, kv, idx, sink, scale: f(q, kv, idx, sink, (q.shape[-1] - 64) ** -0.5)


def _no_sink(f):
    return lambda q, kv, idx, sink, scale: f(q, kv, idx, torch.full_like(sink, -1e9), scale)


def _scaled_sink(f):
    return lambda q, kv, idx, sink, scale: f(q, kv, idx, sink * scale, scale)


def _sink_as_zero_key(f):
    """-1 treated as a row of zeros that takes part in the softmax."""

    def attend(q, kv, idx, sink, scale):
        kv = torch.cat((kv, torch.zeros_like(kv[:1])))
        return f(q, kv, torch.where(idx < 0, len(kv) - 1, idx), sink, scale)

    return attend


def _window(delta: int):
    return lambda f: lambda positions, first, window: f(positions, first, window + delta)


def _visible_early(f):
    return lambda positions, ratio: f(positions + 1, ratio)


def _visible_late(f):
    return lambda positions, ratio: f(positions - 1, ratio)


def _no_overlap(f):
    def pool(kappa, gamma):
        d = kappa.shape[-1] // 2
        return compressor.pool_windows(kappa[:, :, d:], gamma[:, :, d:])

    return pool


def _halves_swapped(f):
    def pool(kappa, gamma):
        d = kappa.shape[-1] // 2
        return f(kappa.roll(d, -1), gamma.roll(d, -1))

    return pool


def _softmax_over_windows_mean(f):
    return lambda kappa, gamma: kappa.mean(dim=1)


def _ape_shifted(f):
    return lambda x, positions, wkv, wgate, ape: f(x, positions + 1, wkv, wgate, ape)


def _ape_of_the_chunk(f):
    def rows(x, positions, wkv, wgate, ape):
        return f(x, positions - positions[0], wkv, wgate, ape)

    return rows


def _forget_previous_window(f):
    """The state of CSA dropped at a window boundary, as if only the open window were kept."""

    def compress(state, kappa, gamma, kind):
        entries, new = f(state, kappa, gamma, kind)
        if kind is LayerKind.CSA and new.length % 4 == 0 and len(new.kappa):
            new = replace(new, gamma=torch.full_like(new.gamma, -1e9))
        return entries, new

    return compress


def _last_token_position(f):
    """Entries rotated to the position of their last token instead of their first."""

    def cos_sin(positions, freqs, dtype):
        if len(positions) > 1 and int(positions[1] - positions[0]) in (4, 128):
            positions = positions + int(positions[1] - positions[0]) - 1
        return f(positions, freqs, dtype)

    return cos_sin


def _no_relu(f):
    def scores(q, keys, u, visible):
        s = torch.einsum("tij,sj,ti->ts", q, keys, u)
        return s.masked_fill(torch.arange(len(keys)) >= visible[:, None], float("-inf"))

    return scores


def _no_head_weights(f):
    return lambda q, keys, u, visible: f(q, keys, torch.ones_like(u), visible)


def _most_recent(f):
    def topk(scores, visible, k):
        recent = torch.arange(scores.shape[1]).float().expand_as(scores)
        return f(recent.masked_fill(scores.isinf(), float("-inf")), visible, k)

    return topk


def _window_only(f):
    return lambda scores, visible, k: f(scores, torch.zeros_like(visible), k)


def _worst(f):
    def topk(scores, visible, k):
        return f((-scores).masked_fill(scores.isinf(), float("-inf")), visible, k)

    return topk


def _one_less(f):
    return lambda scores, visible, k: f(scores, visible, k - 1)


def _bias_in_weights(f):
    return lambda scores, bias, k: f(scores, torch.zeros_like(bias), k)


def _no_renorm(f):
    return lambda scores, ids, scaling: scores.gather(1, ids) * scaling


def _no_scaling(f):
    return lambda scores, ids, scaling: f(scores, ids, 1.0)


def _softmax_scores(f):
    return lambda x, gate: F.linear(x.float(), gate.float()).softmax(dim=-1)


def _next_hash_row(f):
    return lambda table, ids: f(table, (ids + 1) % len(table))


def _no_clamp(f):
    return lambda gate, up, limit: f(gate, up, 1e9)


def _clamp_both_sides(f):
    return lambda gate, up, limit: f(gate.clamp(min=-limit), up, limit)


def _gate_and_up_swapped(f):
    return lambda gate, up, limit: f(up, gate, limit)


def _shared_unclamped(f):
    def run(x, ids, routing, routed, shared, limit, simulate=False):
        exact = f(x, ids, routing, routed, shared, limit, simulate)
        clamped = experts.expert(x, shared, limit)
        return exact - clamped + experts.expert(x, shared, 1e9)

    return run


def _no_shared(f):
    def run(x, ids, routing, routed, shared, limit, simulate=False):
        zero = tuple(torch.zeros_like(w) for w in shared)
        return f(x, ids, routing, routed, zero, limit, simulate)

    return run


def _comb_transposed(f):
    return lambda o, x, post, comb: f(o, x, post, comb.transpose(1, 2))


def _comb_uniform(f):
    return lambda o, x, post, comb: f(o, x, post, torch.full_like(comb, 0.25))


def _post_without_two(f):
    return lambda o, x, post, comb: f(o, x, post / 2, comb)


def _one_sinkhorn_round(f):
    return lambda mixes, scale, base, iters, eps: f(mixes, scale, base, 1, eps)


def _no_mhc_norm(f):
    return lambda x, fn, eps: F.linear(x.flatten(1), fn)


def _no_head_norm(f):
    return lambda latent, wq_b, heads, eps, act=False: F.linear(latent, wq_b).unflatten(
        -1, (heads, -1)
    )


def _interleaved_groups(f):
    def project(o, wo_a, wo_b, groups, act=False):
        order = torch.arange(o.shape[1]).view(groups, -1).T.flatten()
        return f(o[:, order], wo_a, wo_b, groups, act)

    return project


def _nibbles_swapped(f):
    def dequantize(t, dtype):
        if t.format.per_byte == 2:
            raw = t.data.view(torch.uint8)
            t = replace(t, data=((raw >> 4) | (raw << 4)).view(t.data.dtype))
        return f(t, dtype)

    return dequantize


def _scales_shifted(f):
    def dequantize(t, dtype):
        if t.format.per_byte == 2:
            t = replace(t, scale=t.scale.view(torch.uint8).roll(1, 1).view(t.scale.dtype))
        return f(t, dtype)

    return dequantize


def _norms_swapped(f):
    def join(streams, e, enorm, hnorm, e_proj, h_proj, eps, act=False):
        return f(streams, e, hnorm, enorm, e_proj, h_proj, eps, act)

    return join


def _mtp_without_embedding(f):
    def join(streams, e, *rest):
        return f(streams, torch.zeros_like(e), *rest)

    return join


def _quantise_rope_too(f):
    def round_kv(self, kv, rope_dim):
        return quant.simulate_fp8(kv, 64) if self.kv else kv

    return round_kv


def _kv_not_rounded(f):
    return lambda self, kv, rope_dim: kv


def _index_keys_fp8(f):
    return lambda x, *a: quant.simulate_index_fp8(x)


def _input_not_rounded(is_down: bool):
    """W1 and W3 have fewer rows than columns here, W2 has more."""

    def make(f):
        def linear(x, weight, simulate_activation=False):
            is_it = (weight.shape[0] > weight.shape[1]) == is_down
            return f(x, weight, simulate_activation and not is_it)

        return linear

    return make


def _scale_of_64_columns(f):
    return lambda x, group: f(x, 64)


def _routing_after_down(f):
    def run(x, weights, limit, routing=None, simulate_activation=False):
        return f(x, weights, limit, None, simulate_activation) * routing[:, None]

    return run


BUGS = (
    Bug("RoPE turns the wrong way", f"{LAYER}.apply_rope", _rope_sign),
    Bug("inverse RoPE of the output dropped", f"{LAYER}.apply_rope", _rope_one_way),
    Bug("RoPE on half-split pairs", f"{LAYER}.apply_rope", _rope_half_split),
    Bug("RoPE on the leading dims", f"{LAYER}.apply_rope", _rope_leading_dims),
    Bug("YaRN left out", f"{LAYER}.layer_frequencies", _no_yarn),
    Bug("compress theta left out", f"{LAYER}.layer_frequencies", _one_theta),
    Bug("one table for all layers", f"{LAYER}.layer_frequencies", _swa_theta_for_all),
    Bug("YaRN magnitude scale in the softmax", f"{LAYER}.sparse_attn", _mscale),
    Bug("softmax scale of the nope dims", f"{LAYER}.sparse_attn", _scale_of_nope_dims),
    Bug("sink dropped", f"{LAYER}.sparse_attn", _no_sink),
    Bug("sink multiplied by the scale", f"{LAYER}.sparse_attn", _scaled_sink),
    Bug("padding attended as zero rows", f"{LAYER}.sparse_attn", _sink_as_zero_key),
    Bug("window one token short", f"{LAYER}.window_indices", _window(-1)),
    Bug("entry visible one step early", f"{LAYER}.visible_entries", _visible_early),
    Bug("entry visible one step late", f"{LAYER}.visible_entries", _visible_late),
    Bug("CSA windows do not overlap", "dsv4.reference.compressor.pool_overlapping_windows",
        _no_overlap),
    Bug("CSA halves swapped", "dsv4.reference.compressor.pool_overlapping_windows",
        _halves_swapped),
    Bug("windows averaged", "dsv4.reference.compressor.pool_windows", _softmax_over_windows_mean),
    Bug("position bias shifted by one", f"{LAYER}.compressor_rows", _ape_shifted),
    Bug("entry rotated to its last token", f"{LAYER}.rope_cos_sin", _last_token_position),
    Bug("indexer without ReLU", f"{LAYER}.indexer_scores", _no_relu),
    Bug("indexer without head weights", f"{LAYER}.indexer_scores", _no_head_weights),
    Bug("indexer falls back to the most recent", f"{LAYER}.indexer_topk", _most_recent),
    Bug("indexer selects nothing", f"{LAYER}.indexer_topk", _window_only),
    Bug("indexer picks the worst", f"{LAYER}.indexer_topk", _worst),
    Bug("top-k one entry short", f"{LAYER}.indexer_topk", _one_less),
    Bug("router bias ignored", f"{LAYER}.router_topk", _bias_in_weights),
    Bug("routing weights not renormalised", f"{LAYER}.router_weights", _no_renorm),
    Bug("routed scaling factor left out", f"{LAYER}.router_weights", _no_scaling),
    Bug("softmax router", f"{LAYER}.router_scores", _softmax_scores),
    Bug("hash table read one row off", f"{LAYER}.router_hash", _next_hash_row),
    Bug("SwiGLU not clamped", "dsv4.reference.experts.clamped_swiglu", _no_clamp),
    Bug("SwiGLU gate clamped from below", "dsv4.reference.experts.clamped_swiglu",
        _clamp_both_sides),
    Bug("gate and up swapped", "dsv4.reference.experts.clamped_swiglu", _gate_and_up_swapped),
    Bug("shared expert not clamped", f"{LAYER}.moe", _shared_unclamped),
    Bug("shared expert left out", f"{LAYER}.moe", _no_shared),
    Bug("mHC comb transposed", f"{LAYER}.mhc_post", _comb_transposed),
    Bug("mHC comb uniform", f"{LAYER}.mhc_post", _comb_uniform),
    Bug("mHC post without its factor 2", f"{LAYER}.mhc_post", _post_without_two),
    Bug("one Sinkhorn round", f"{LAYER}.mhc_split_sinkhorn", _one_sinkhorn_round),
    Bug("mHC projection without the norm", f"{LAYER}.mhc_mixes", _no_mhc_norm),
    Bug("query heads not normalised", f"{LAYER}.query_heads", _no_head_norm),
    Bug("output groups interleaved", f"{LAYER}.grouped_output", _interleaved_groups),
    Bug("FP4 nibbles swapped", f"{WEIGHTS}.dequantize", _nibbles_swapped),
    Bug("FP4 scales off by one group", f"{WEIGHTS}.dequantize", _scales_shifted),
    Bug("position bias restarts with the chunk", f"{LAYER}.compressor_rows", _ape_of_the_chunk,
        "decode"),
    Bug("CSA forgets the previous window", f"{LAYER}.compress", _forget_previous_window, "decode"),
    Bug("MTP norms swapped", f"{MODEL}.mtp_input", _norms_swapped, "mtp"),
    Bug("MTP without the next token", f"{MODEL}.mtp_input", _mtp_without_embedding, "mtp"),
    Bug("KV cache not rounded", "dsv4.reference.simulation.QuantSimulation.round_kv",
        _kv_not_rounded, "kvquant"),
    Bug("RoPE dims rounded to FP8", "dsv4.reference.simulation.QuantSimulation.round_kv",
        _quantise_rope_too, "kvquant"),
    Bug("index keys in FP8 instead of MXFP4", "dsv4.reference.simulation.simulate_mxfp4",
        _index_keys_fp8, "kvquant"),
    Bug("W4A8 tokens not rounded", "dsv4.reference.experts.linear", _input_not_rounded(False),
        "w4a8"),
    Bug("W4A8 hidden rows not rounded", "dsv4.reference.experts.linear", _input_not_rounded(True),
        "w4a8"),
    Bug("W4A8 with a scale for 64 columns", "dsv4.reference.linear.simulate_fp8",
        _scale_of_64_columns, "w4a8"),
    Bug("W4A8 weighs after the rounding", "dsv4.reference.experts.expert", _routing_after_down,
        "w4a8"),
    Bug("W4A8 weights off by one group", "dsv4.reference.experts.dequantize", _scales_shifted,
        "w4a8"),
    Bug("no Hadamard rotation", "dsv4.reference.simulation.hadamard", lambda f: lambda x: x,
        "kvquant"),
)  # fmt: skip
