"""Embedding op, registered as torch.ops.dsv4.embed_streams."""

from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import embedding as kernels

EMBED_STREAMS = (kernels.embed_streams.SPEC,)


@dsv4_op(fake=kernels.embed_streams.outputs)
def embed_streams(ids: Tensor, table: Tensor, num_streams: int) -> Tensor:
    """See dsv4.reference.mhc.embed_streams."""
    out = kernels.embed_streams.outputs(ids, table, num_streams)
    select(EMBED_STREAMS, table.device).launch(ids, table, num_streams, out)
    return out
