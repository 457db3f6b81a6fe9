"""Muon for the matrices, AdamW for everything else, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Parameters whose rows are looked up or read one by one, and the small control tensors.
ADAMW_NAMES = ("embed.", "head.", "hc_", ".ape", "gate.weight", "indexer.", "attn_sink", "norm")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(gradients: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix; [..., M, N] -> same."""
    a, b, c = NEWTON_SCHULZ
    x = gradients.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(gradients.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices of one shape go through the iteration as one batch.

    The step has RMS 0.2 lr, whatever the shape. Stacked experts are batches already.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape[-2:], []).append(p)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group["lr"], group["momentum"])

    def _update(
        self, parameters: list[nn.Parameter], shape: torch.Size, lr: float, momentum: float
    ) -> None:
        buffers = []
        for p in parameters:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            buffer = state["momentum"].mul_(momentum).add_(p.grad)
            buffers.append(p.grad.add(buffer, alpha=momentum).view(-1, *shape))
        updates = orthogonalise(torch.cat(buffers))
        size = -lr * 0.2 * max(shape) ** 0.5
        start = 0
        for p in parameters:
            count = p.numel() // (shape[0] * shape[1])
            p.add_(updates[start : start + count].view_as(p), alpha=size)
            start += count


class Optimizer:
    """Both optimisers behind one learning-rate factor; the state is resumable."""

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float) -> None:
        muon, adamw = [], []
        for name, p in model.named_parameters():
            small = p.dim() < 2 or any(part in name for part in ADAMW_NAMES)
            (adamw if small else muon).append(p)
        fused = next(model.parameters()).is_cuda
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            Muon(muon, muon_lr, 0.95),
            torch.optim.AdamW(adamw, adamw_lr, (0.9, 0.95), 1e-10, weight_decay=0.0, fused=fused),
        )
        self.rates = (muon_lr, adamw_lr)

    def step(self, factor: float) -> None:
        """Update with both base rates times `factor`, then clear the gradients."""
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """The state of both parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule(step: int, progress: float, warmup: int = 100, decay: float = 0.3) -> float:
    """Linear warm-up in steps, constant, linear fall to 2 % over the last `decay` of the stage."""
    rising = min(1.0, (step + 1) / warmup)
    falling = min(1.0, (1 - progress) / decay) if decay else 1.0
    return rising * max(0.02, falling)
