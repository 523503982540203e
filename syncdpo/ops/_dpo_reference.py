"""The specification of `dpo_loss` in plain PyTorch: forward, and the backward by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .paired_noise import noise_reference

MATERIALISED = 0  # the sign of a target that is given whole


class Options(NamedTuple):
    """Everything that is no tensor; the registered op takes the first two as tensors."""

    beta: list[float]
    sft_weight: float
    stream: list[int]
    sign: list[int]
    objective: str
    separate: bool
    normalize: bool
    label_smoothing: float
    interleaved: bool
    mean: bool
    stats: bool
    impl: str


def forward_reference(policy, reference, target, seed, mask, reference_error, pair_weight, options):
    """loss, margin [M, B], weight [B], errors [2, M, 2B] (policy, reference), slope [M, 2B].

    The gradient of a policy is slope · mask · (policy − target), times the loss's own gradient.
    """
    per_modality = [
        _errors(
            policy[m],
            None if reference_error is not None else reference[m],
            _target(target[m], seed[m], m, options),
            mask[m],
        )
        for m in range(len(policy))
    ]
    gain, policy_error, own_error, selected = (
        torch.stack(column) for column in zip(*per_modality, strict=True)
    )
    if reference_error is None:
        reference_error = own_error
    else:
        reference_error = reference_error.to(gain.dtype).reshape(gain.shape)
        gain = torch.where(selected > 0, policy_error - reference_error, 0.0)

    present = win(selected > 0, options) & lose(selected > 0, options)
    scale = gain.new_tensor(options.beta)[:, None] * -0.5
    if options.normalize:
        mean_error = win(reference_error, options) + lose(reference_error, options)
        scale = scale / (0.5 * mean_error)
    scale = torch.where(present, scale, 0.0)
    margin = scale * (win(gain, options) - lose(gain, options))

    logit = margin if options.separate else margin.sum(0, keepdim=True)
    weight = present if options.separate else present.any(0, keepdim=True)
    if pair_weight is None:
        pair_weight = torch.ones_like(margin[0])
    weight = weight * pair_weight.to(margin.dtype)
    value, slope = _objective(logit, options)
    loss = (weight * value).sum(0) + options.sft_weight * win(policy_error, options).sum(0)

    preference = weight * slope * scale
    slope = _join(preference + options.sft_weight, -preference, options)
    slope = torch.where(selected > 0, 2.0 * slope / selected, 0.0)
    if options.mean:
        loss, slope = loss.mean(), slope / margin.shape[1]
    errors = torch.stack([policy_error, reference_error])
    weight = present.any(0) * pair_weight.to(margin.dtype)
    return loss, margin, weight, errors if options.stats else errors[:0], slope


def _errors(policy, reference, target, mask):
    """e(policy) − e(reference), e(policy), e(reference) and the sum of the mask; each [2B].

    The difference is summed as (p − r)·(p + r − 2y): as a difference of two means it loses every
    digit just where training starts, at policy ≈ reference.
    """
    dtype = torch.promote_types(policy.dtype, torch.float32)
    target = target.to(dtype)
    to_policy = policy.to(dtype) - target
    mean, selected = _mean_over(mask, to_policy)
    policy_error = mean(to_policy.square())
    if reference is None:
        return policy_error, policy_error, policy_error, selected
    to_reference = reference.to(dtype) - target
    gain = mean((policy.to(dtype) - reference.to(dtype)) * (to_policy + to_reference))
    return gain, policy_error, mean(to_reference.square()), selected


def _mean_over(mask, like):
    """The function that averages over non-batch axes, and what it divides by; [2B].

    What the mask leaves out may hold anything, NaN too; where it selects nothing the mean is 0.
    """
    rows = len(like)
    if mask is None:
        count = like.new_full((rows,), like[0].numel())
        return lambda values: values.reshape(rows, -1).mean(1), count
    mask = mask.to(like.dtype).expand_as(like)
    count = mask.reshape(rows, -1).sum(1)

    def mean(values):
        total = torch.where(mask != 0, values * mask, 0.0).reshape(rows, -1).sum(1)
        return torch.where(count > 0, total / count, 0.0)

    return mean, count


def _objective(logit, options):
    """The value and the derivative of each logit's term; a logit that is not finite gives NaN."""
    smoothing = options.label_smoothing
    if options.objective == "sigmoid":
        value = -(1 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)
        slope = smoothing * logit.sigmoid() - (1 - smoothing) * (-logit).sigmoid()
    elif options.objective == "hinge":
        value = (1.0 - logit).clamp_min(0.0)
        slope = -(logit < 1.0).to(logit.dtype)
    else:
        value = (logit - 0.5).square()
        slope = 2.0 * (logit - 0.5)
    unknown = ~logit.isfinite()
    return value.masked_fill(unknown, torch.nan), slope.masked_fill(unknown, torch.nan)


def _target(target, seed, modality, options):
    sign = options.sign[modality]
    if sign == MATERIALISED:
        return target
    noise = noise_reference((len(seed), *target.shape[1:]), seed, options.stream[modality])
    if len(target) == len(seed):
        return _both(sign * (noise - target), options)
    return sign * (_both(noise, options) - target)


def win(values, options):
    return values[..., 0::2] if options.interleaved else values[..., : values.shape[-1] // 2]


def lose(values, options):
    return values[..., 1::2] if options.interleaved else values[..., values.shape[-1] // 2 :]


def _join(win, lose, options):
    joined = torch.stack([win, lose], -1 if options.interleaved else -2)
    return joined.flatten(-2)


def _both(values, options):
    """[B, …] → [2B, …], the same for winner and loser."""
    return values.repeat_interleave(2, 0) if options.interleaved else torch.cat([values, values])


def backward_reference(grad, slope, policy, target, seed, mask, options):
    """The gradient of each policy, from the loss's gradient (scalar, or [B])."""
    if not options.mean:
        grad = _both(grad, options)
    grads = []
    for m, p in enumerate(policy):
        factor = (grad * slope[m]).reshape(-1, *[1] * (p.ndim - 1))
        residual = p.to(slope.dtype) - _target(target[m], seed[m], m, options)
        if mask[m] is None:
            grads.append((residual * factor).to(p.dtype))
        else:
            weight = mask[m].to(slope.dtype)
            grads.append(torch.where(weight != 0, residual * (factor * weight), 0.0).to(p.dtype))
    return grads
