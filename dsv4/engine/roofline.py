"""The least that a decode step must read, counted from the config: the roof of its time."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.inventory import tensor_specs
from dsv4.core.kv_layout import IndexKeys, IndexRecord, KvRecord


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step reads, each once.

    linears  FP8, BF16 and FP32 matrices of the layers: every one of them
    experts  routed experts hit, as many as uniform routing hits on average
    head     the LM head
    cache    window rings, index keys, chosen entries of every request
    """

    linears: float
    experts: float
    head: float
    cache: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.linears + self.experts + self.head + self.cache


def step_bytes(
    config: ModelConfig, batch: int, context: int, index_keys: IndexKeys = "fp8",
    experts_hit: float | None = None,
) -> StepBytes:  # fmt: skip
    """Of a step with one token for each of `batch` requests of `context` tokens.

    experts_hit  different experts a layer; as many as uniform routing hits unless given
    """
    linears = experts = head = 0.0
    E, K = config.n_routed_experts, config.num_experts_per_tok
    share_hit = 1 - (1 - K / E) ** batch if experts_hit is None else experts_hit / E
    for name, spec in tensor_specs(config).items():
        if name.startswith(("mtp.", "embed.")) or name.endswith((".tid2eid", "input_scale")):
            continue  # of tables a step reads a row a token
        if ".experts." in name:
            experts += share_hit * spec.nbytes
        elif name.startswith("head."):
            head += spec.nbytes
        else:
            linears += spec.nbytes
    per_request = sum(
        _layer_cache_bytes(config, config.layer_kind(j), context, index_keys)
        for j in range(config.num_hidden_layers)
    )
    return StepBytes(linears, experts, head, batch * per_request)


def _layer_cache_bytes(
    config: ModelConfig, kind: LayerKind, context: int, index_keys: IndexKeys
) -> int:
    record = KvRecord.of(config).nbytes
    nbytes = min(context, config.sliding_window) * record
    if kind is LayerKind.SWA:
        return nbytes
    entries = context // kind.ratio
    if kind is LayerKind.HCA:
        return nbytes + entries * record
    keys = entries * IndexRecord.of(config, index_keys).nbytes
    return nbytes + keys + min(entries, config.index_topk) * record
