"""Inputs and an error budget for tests of the ops, the project's own or those of a new op."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "permuted", "strided", "offset")


def restride(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory.

    "contiguous"; "permuted", the axes in reverse order; "strided", every second element of a wider
    last axis; "offset", dense but one element past an aligned address.
    """
    if layout == "contiguous":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "permuted":
        reverse = tuple(range(x.ndim))[::-1]
        return x.permute(reverse).contiguous().permute(reverse)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def predictions(
    *shapes: tuple[int, ...],
    gap: float = 0.3,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Policy, reference and target, one [2B, …] per shape; policy = reference·(1 + gap·noise)."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference, target = [], [], []
    for shape in shapes:
        own, other, truth = (torch.randn(shape, generator=generator) for _ in range(3))
        policy.append((own * (1.0 + gap * other)).to(device, dtype))
        reference.append(own.to(device, dtype))
        target.append((own + truth).to(device, dtype))
    return policy, reference, target


def assert_within_budget(
    actual: Tensor, exact: Tensor, *, baseline: Tensor | None = None, ulps: float = 1.0
) -> None:
    """|actual − exact| ≤ the largest error of `baseline` + `ulps` roundings of actual's dtype.

    `exact` is the float64 truth for the same (rounded) inputs, `baseline` what plain PyTorch makes
    of them in the dtype under test. One rounding is taken at the size of the element, and of the
    smallest normal number where that is larger.
    """
    exact = exact.double().to(actual.device)
    limits = torch.finfo(actual.dtype)
    budget = ulps * limits.eps * exact.abs().clamp_min(limits.tiny)
    if baseline is not None:
        budget = budget + (baseline.double().to(actual.device) - exact).abs().max()
    error = (actual.double() - exact).abs()
    worst = (error - budget).argmax()
    assert (error <= budget).all(), (
        f"element {worst.item()}: error {error.flatten()[worst].item():.3g}, "
        f"budget {budget.flatten()[worst].item():.3g}"
    )
