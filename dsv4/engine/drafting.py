"""Drafts of the MTP block, verified in the next step: two rows a request, one or two tokens.

A draft is accepted where it is the very token that the request would have drawn, so the answer is
the one without drafts, greedy or sampled.

Both rows go into the cache before the verification. With one draft nothing has to wait for it: what
a rejected row overwrites is as much older as its ring is long, the next step begins at that same
row, and no query from there on sees so far back. (Two drafts and more would have to wait.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.cache.request import Step
from dsv4.core.errors import RequestError
from dsv4.engine.model import MAX_DECODE_ROWS, ProductionModel
from dsv4.engine.stepper import DECODE_SIZES, PROMPT_SIZES, Stepper, to_device


class DraftingStepper(Stepper):
    """A Stepper of a model that was loaded with its MTP block.

    A decode step gives [3, B]: the first token, the second, and how many of the two count.
    """

    rows_each = 2

    def __init__(
        self, model: ProductionModel, sizes: Sequence[int] = DECODE_SIZES,
        use_graphs: bool | None = None, prompt_sizes: Sequence[int] = PROMPT_SIZES,
    ) -> None:  # fmt: skip
        if model.mtp is None:
            raise RequestError("model", "one that was built with_mtp", "a model without drafts")
        most = min(model.limits.max_rows, MAX_DECODE_ROWS) // self.rows_each
        if model.limits.max_requests > most:
            got = model.limits.max_requests
            raise RequestError("max_requests", f"1 to {most}, two rows each", got)
        super().__init__(model, sizes, use_graphs, prompt_sizes)
        self.mtp, self.window = model.mtp, model.storage.layers[model.config.num_hidden_layers]
        self.draft = torch.zeros_like(self.table.token)  # after the last token, by slot

    def _draft_prompts(
        self, step: Step, ids: Tensor, streams: Tensor, following: Sequence[int], at: Tensor,
        chosen: Tensor,
    ) -> None:  # fmt: skip
        """Rows of prompts into the MTP window; a draft where the prompt has ended."""
        batch = self.model.batch(step, ids, is_prefill=True)
        next_ids = to_device(following, streams.device)
        next_ids[at] = chosen
        drafted = self.mtp.streams(streams, next_ids, batch, self.window)
        if len(at):
            self.draft[batch.rows.slot[at]] = self.mtp.logits(drafted[at]).argmax(dim=1)

    def _decode(self, step: Step, is_filtered: bool) -> Tensor:
        rows = step.rows
        live, at = self._table_rows(rows.slot)
        own = at[0::2]
        pairs = torch.stack((self.table.token[own], self.draft[own]), dim=1)
        ids = torch.where(live, pairs.flatten(), -1)
        batch = self.model.batch(step, ids, is_prefill=False)
        streams = self.model.trunk.streams(batch, self.model.storage)
        logits = self.model.trunk.logits(streams)
        drawn = self.table.draw(logits, at, rows.position + 1, is_filtered)
        is_accepted = drawn[0::2] == pairs[:, 1]
        drafted = self.mtp.streams(streams, drawn, batch, self.window)

        last = torch.arange(0, len(ids), 2, device=ids.device) + is_accepted
        self.table.token[own] = drawn[last]
        self.draft[own] = self.mtp.logits(drafted[last]).argmax(dim=1)
        return torch.stack((drawn[0::2], drawn[1::2], 1 + is_accepted.to(torch.int64)))
