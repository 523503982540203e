"""What the ops must give, naively, in float64; and how far float32 may be from it."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from syncdpo.ops import dpo_loss
from syncdpo.testing import assert_within_budget

# ---------------------------------------------------------------- dpo_loss


def dpo_terms(policy, reference, target, beta, mask, normalize, interleaved):
    """−½·β·Δ and the winner's error of one modality, [B] each."""

    def error(prediction):
        squares = (prediction - target).square()
        weight = torch.ones_like(squares) if mask is None else mask.double().expand_as(squares)
        rows = len(squares)
        total, count = (x.reshape(rows, -1).sum(1) for x in (squares * weight, weight))
        return torch.where(count > 0, total / count.clamp_min(1e-300), 0.0), count

    def halves(x):
        return (x[0::2], x[1::2]) if interleaved else x.chunk(2)

    (own, count), (other, _) = error(policy), error(reference)
    (own_win, own_lose), (other_win, other_lose) = halves(own), halves(other)
    gap = (own_win - own_lose) - (other_win - other_lose)
    if normalize:
        gap = gap / ((other_win + other_lose) / 2)
    present = (torch.stack(halves(count)) > 0).all(0)
    return torch.where(present, -0.5 * beta * gap, 0.0), own_win, present


def dpo_oracle(policy, reference, target, *, beta, mask=None, pair_weight=None, objective="sigmoid",
           logistic="joint", normalize=None, sft_weight=0.0, label_smoothing=0.0, layout="halves",
           reduction="mean"):  # fmt: skip
    beta = beta if isinstance(beta, (list, tuple)) else [beta]
    mask = mask if mask is not None else [None] * len(policy)
    columns = zip(policy, reference, target, beta, mask, strict=True)
    terms = [dpo_terms(*c, normalize is not None, layout == "interleaved") for c in columns]
    margin, winner, present = (torch.stack(x) for x in zip(*terms, strict=True))
    if logistic == "joint":
        margin, present = margin.sum(0, keepdim=True), present.any(0, keepdim=True)
    if objective == "sigmoid":
        value = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(
            -margin
        )
    else:
        value = F.relu(1 - margin) if objective == "hinge" else (margin - 0.5) ** 2
    weight = 1.0 if pair_weight is None else pair_weight.double()
    loss = (present * weight * value).sum(0) + sft_weight * winner.sum(0)
    return loss if reduction == "none" else loss.mean()


def to_double(tensors, grad=False):
    return [t.detach().double().requires_grad_(grad) for t in tensors]


def loss_and_gradient(function, policy, *args, **options):
    policy = [p.detach().requires_grad_() for p in policy]
    loss = function(policy, *args, **options)
    weights = torch.linspace(1.0, 2.0, loss.numel(), device=loss.device).view_as(loss)
    (loss * weights.to(loss.dtype)).sum().backward()
    return loss.detach(), [p.grad for p in policy]


def assert_matches_oracle(impl, policy, reference, target, **options):
    """Loss to 1e-6 (and what a rounding of e(p) − e(r) weighs in the margin), gradient to 1e-5."""
    loss, grads = loss_and_gradient(dpo_loss, policy, reference, target, impl=impl, **options)
    exact, exact_grads = loss_and_gradient(
        dpo_oracle, to_double(policy), to_double(reference), to_double(target), **options
    )
    eps = torch.finfo(torch.float32).eps
    beta = options["beta"] if isinstance(options["beta"], (list, tuple)) else [options["beta"]]
    rounding = 0.0
    for b, p, r, y in zip(beta, policy, reference, target, strict=True):
        p, r, y = p.double(), r.double(), y.double()
        gain = ((p - r) * (p + r - 2 * y)).reshape(len(p), -1).mean(1)
        rounding += b * eps * gain.abs().max().item()
    assert ((loss - exact).abs() <= 1e-6 * exact.abs() + rounding).all(), (loss, exact)
    for p, grad, exact_grad in zip(policy, grads, exact_grads, strict=True):
        assert grad.dtype == p.dtype
        budget = exact_grad + 1e-5 * exact_grad.abs().max()
        assert_within_budget(grad, exact_grad, baseline=budget)


# ---------------------------------------------------------------- warp


def frame_outside(index: int, frames: int, boundary: str) -> int:
    """The frame for an index outside the clip, found by walking there."""
    step, place = 1, 0
    while index < 0:  # one period up is the same frame
        index += {"edge": -index, "wrap": frames, "reflect": 2 * frames - 2}[boundary]
    if boundary == "edge":
        return min(index, frames - 1)
    if boundary == "wrap":
        return index % frames
    for _ in range(index):
        if not 0 <= place + step < frames:
            step = -step
        place += step
    return place


def warp_oracle(x, knots, dim, boundary):
    """y[b, t] by the definition, in float64, one frame at a time."""
    source = np.moveaxis(x.double().numpy(), dim, 1)
    y = np.empty_like(source)
    frames, last = source.shape[1], knots.shape[1] - 1
    for b in range(source.shape[0]):
        for t in range(frames):
            place = np.interp(t * last / (frames - 1), range(last + 1), knots[b].double().numpy())
            lower = int(np.floor(place))
            here, there = (frame_outside(i, frames, boundary) for i in (lower, lower + 1))
            y[b, t] = source[b, here] + (place - lower) * (source[b, there] - source[b, here])
    return torch.from_numpy(np.moveaxis(y, 1, dim).copy())


def warp_error(x, frames):
    """What float32 positions and one rounding to x's dtype may cost, element by element at most."""
    rounding = torch.finfo(x.dtype).eps + 2.0**-22
    return (2 * frames * 2.0**-22 * 2 + rounding) * x.abs().max().item()


def approximation(radius):
    """What approximate lg2, sqrt, sin and cos may cost a normal of that radius.

    lg2 near 1 has an absolute error of 2⁻²², so r² one of 2 ln 2 · 2⁻²² and small r much of it.
    """
    squared = 2 * math.log(2) * 2.0**-22 + radius.square() * 2.0**-21
    return squared / radius.clamp_min(squared**0.5) + radius * 2.0**-20


def radii(normals):
    """The Box-Muller radius of each element of float64 [B, 4k]."""
    return normals.unflatten(-1, (-1, 2)).square().sum(-1, keepdim=True).sqrt().expand(
        *normals.shape[:-1], -1, 2
    ).flatten(-2)  # fmt: skip
