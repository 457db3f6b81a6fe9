"""Router oracles: which experts see a token, and with what weight (paper sec. 2.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dsv4.reference.linear import wide_linear


def router_scores(x: Tensor, gate: Tensor) -> Tensor:
    """Affinity of every expert.

        s = sqrt(softplus(W h))

    x [T, D], gate [E, D] -> [T, E] FP32, positive
    """
    return router_affinity(wide_linear(x, gate))


def router_affinity(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits)), elementwise."""
    return F.softplus(logits).sqrt()


def router_topk(scores: Tensor, bias: Tensor, k: int) -> Tensor:
    """Score layers: the k experts with the largest biased score; ties go to the lower id.

    scores [T, E], bias [E] FP32 -> ids [T, k] int64, best first. The bias balances load; it picks
    the experts and takes no part in their weights.
    """
    return (scores + bias).sort(dim=1, descending=True, stable=True).indices[:, :k]


def router_hash(tid2eid: Tensor, ids: Tensor) -> Tensor:
    """Hash layers: the experts of a token follow from its id alone.

    tid2eid [V, k], ids [T] -> [T, k] int64
    """
    return tid2eid[ids]


def router_weights(scores: Tensor, experts: Tensor, scaling: float) -> Tensor:
    """Weights of the chosen experts, in hash layers too.

        g_e = scaling * s_e / sum_{e' chosen} s_e'

    scores [T, E], experts [T, k] -> [T, k] FP32
    """
    chosen = scores.gather(1, experts)
    return chosen / chosen.sum(dim=1, keepdim=True) * scaling
