"""MTP oracle: the input of a multi-token-prediction block."""

from __future__ import annotations

from torch import Tensor

from dsv4.reference.linear import linear
from dsv4.reference.norm import rms_norm


def mtp_input(
    streams: Tensor, next_embedding: Tensor, enorm: Tensor, hnorm: Tensor, e_proj: Tensor,
    h_proj: Tensor, eps: float, simulate_activation: bool = False,
) -> Tensor:  # fmt: skip
    """Join the trunk's streams at t with the embedding of token t + 1.

        X_j = W^E RMSNorm(embed(id_{t+1})) + W^H RMSNorm(X_last,j)

    streams        [T, N, D]  after the last trunk layer, before hc_head and the final norm
    next_embedding [T, D]
    enorm, hnorm [D]; e_proj, h_proj [D, D]
    ->             [T, N, D]; each stream is normalised on its own. The block that follows is an
                   ordinary SWA layer; its logits are for position t + 2.
    """
    e_TD = linear(rms_norm(next_embedding, enorm, eps), e_proj, simulate_activation)
    z_TND = rms_norm(streams, hnorm, eps)
    return e_TD[:, None, :] + linear(z_TND, h_proj, simulate_activation)
