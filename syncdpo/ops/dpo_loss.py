"""The DPO loss of a flow or diffusion model over pairs, for any number of modalities.

    e(p) = mean over non-batch axes of (p − target)²
    Δ_m  = [e(policy) − e(reference)]_win − [same]_lose
    L    = −log σ(−½ Σ_m β_m Δ_m)

Diffusion-DPO (arXiv 2311.12908, equation 14), per modality as in SyncDPO (arXiv 2605.12179).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import (
    ANY_FLOAT,
    FLOATS,
    check_choice,
    check_impl,
    check_number,
    check_tensor,
    per_modality,
)
from ._dpo_autograd import differentiable, weights
from ._dpo_reference import MATERIALISED, Options, lose, win
from .paired_noise import check_sample_size, check_seed, check_stream


@dataclass(frozen=True)
class Velocity:
    """target = sign·(ε − clean), rebuilt where it is needed and never stored.

    ε is that of `noise(clean.shape, seed, stream=stream)`; give the seeds that `paired_noise` got,
    and for modality m the stream + m that it used.

    Args:
        clean: [2B, …], or [B, …] where winner and loser share it.
        seed: int64 [B], one per pair.
        stream: the noise stream of this modality.
        sign: +1 for ε − clean (LTX-2), −1 for clean − ε (JavisDiT).
    """

    clean: Tensor
    seed: Tensor
    stream: int = 0
    sign: int = 1


class DPOStats(NamedTuple):
    """What the loss saw of each pair; detached, float32, from the same pass as the loss.

    `margin`: [M, B], −½·β_m·Δ_m, positive where the policy prefers the winner more than the
    reference does. `weight`: [B], `pair_weight`, and 0 where masks select nothing. The four errors:
    [M, B], mean squared errors; those of the reference come from `reference_error` where given.
    """

    margin: Tensor
    weight: Tensor
    policy_win: Tensor
    policy_lose: Tensor
    reference_win: Tensor
    reference_lose: Tensor

    @property
    def implicit_accuracy(self) -> Tensor:
        """Share of the pairs with weight whose margin, over all modalities, is positive; scalar.

        A margin of exactly 0, as before the first step, counts half. A pair whose margin is not
        finite is left out, as one without weight is. 0 where no pair counts.
        """
        return _share_positive(self.margin.sum(0), self.weight)

    @property
    def modality_accuracy(self) -> Tensor:
        """`implicit_accuracy` of each modality by itself; [M]."""
        return _share_positive(self.margin, self.weight)


def _share_positive(margin: Tensor, weight: Tensor) -> Tensor:
    counted = (weight != 0) & margin.isfinite()
    hit = torch.where(counted, (margin.sign() + 1.0) / 2.0, 0.0)
    return hit.sum(-1) / counted.sum(-1).clamp_min(1)


# ---------------------------------------------------------------- checks


def _check_numbers(beta, sft_weight, label_smoothing, count):
    """β per modality. Kinds alone: a compiler would make a constant of what is compared here."""
    beta = list(beta.unbind()) if isinstance(beta, Tensor) and beta.ndim else beta
    beta = per_modality("beta", beta, count, shared=True)
    for b in beta:
        check_number("beta", b)
    check_number("sft_weight", sft_weight)
    check_number("label_smoothing", label_smoothing)
    return beta


def _check_options(options, velocity, logistic, normalize, layout, reduction):
    check_choice("objective", options.objective, ("sigmoid", "hinge", "ipo"))
    check_choice("logistic", logistic, ("joint", "separate"))
    check_choice("normalize", normalize, ("reference", None))
    check_choice("layout", layout, ("halves", "interleaved"))
    check_choice("reduction", reduction, ("mean", "none"))
    for m, entry in enumerate(velocity):
        if entry is not None:
            check_stream(f"target[{m}].stream", entry.stream)
            check_choice(f"target[{m}].sign", entry.sign, (1, -1))
    smoothing = options.label_smoothing
    if not 0.0 <= smoothing <= 0.5:
        raise ValueError(f"label_smoothing: expected 0 to 0.5, got {smoothing}")
    if smoothing and options.objective != "sigmoid":
        with_objective = f"with objective={options.objective!r}"
        raise ValueError(f"label_smoothing: expected 0 {with_objective}, got {smoothing}")


def _check_tensors(policy, reference, target, mask, reference_error, pair_weight, impl):
    """Check everything against policy; the resolved `impl`."""
    if not policy:
        raise ValueError("policy: expected at least one modality, got an empty sequence")
    check_tensor("policy[0]", policy[0])
    if policy[0].ndim == 0 or policy[0].shape[0] == 0 or policy[0].shape[0] % 2:
        raise ValueError(f"policy[0]: expected [2B, …] with B > 0, got {list(policy[0].shape)}")
    rows, device = policy[0].shape[0], policy[0].device
    impl = check_impl(impl, device)
    # float64 in one modality asks for float64 in all, whatever their order
    doubles = any(isinstance(p, Tensor) and p.dtype == torch.float64 for p in policy)
    floats = (torch.float64,) if doubles and impl == "reference" else FLOATS
    for m, p in enumerate(policy):
        check_tensor(f"policy[{m}]", p, dtypes=floats, device=device)
        if p.ndim == 0 or p.shape[0] != rows or p.numel() == 0:
            expected = f"[{rows}, …], no axis empty"
            raise ValueError(f"policy[{m}]: expected {expected}, got {list(p.shape)}")
        if len(reference):
            check_tensor(f"reference[{m}]", reference[m], floats, p.shape, device)
        _check_target(f"target[{m}]", target[m], p, floats)
        if mask[m] is not None:
            _check_mask(f"mask[{m}]", mask[m], p)
    _check_reference_error(reference, reference_error, rows, len(policy), device)
    if pair_weight is not None:
        check_tensor("pair_weight", pair_weight, (*ANY_FLOAT, torch.bool), (rows // 2,), device)
    return impl


def _check_target(name, target, policy, floats):
    if not isinstance(target, Velocity):
        return check_tensor(name, target, floats, policy.shape, policy.device)
    rows, *rest = policy.shape
    clean = target.clean
    check_tensor(f"{name}.clean", clean, floats, device=policy.device)
    if list(clean.shape) not in ([rows, *rest], [rows // 2, *rest]):
        expected = f"{[rows, *rest]} or {[rows // 2, *rest]}"
        raise ValueError(f"{name}.clean: expected shape {expected}, got {list(clean.shape)}")
    check_sample_size(f"{name}.clean", clean.shape)
    check_seed(f"{name}.seed", target.seed, rows // 2, policy.device)


def _check_mask(name, mask, policy):
    check_tensor(name, mask, (*ANY_FLOAT, torch.bool), device=policy.device)
    sizes = zip(reversed(mask.shape), reversed(policy.shape), strict=False)
    if mask.ndim > policy.ndim or any(size not in (1, full) for size, full in sizes):
        expected = f"a shape that broadcasts to {list(policy.shape)}"
        raise ValueError(f"{name}: expected {expected}, got {list(mask.shape)}")


def _check_reference_error(reference, reference_error, rows, count, device):
    given = len(reference) > 0
    if given == (reference_error is not None):
        got = "both" if given else "neither"
        raise ValueError(f"reference: expected either it or reference_error, got {got}")
    if reference_error is not None:
        check_tensor("reference_error", reference_error)
        shape = (rows,) if reference_error.ndim == 1 and count == 1 else (count, rows)
        check_tensor("reference_error", reference_error, ANY_FLOAT, shape, device)


# ---------------------------------------------------------------- public


def dpo_loss(
    policy: Tensor | Sequence[Tensor],
    reference: Tensor | Sequence[Tensor] | None,
    target: Tensor | Velocity | Sequence[Tensor | Velocity],
    *,
    beta: float | Tensor | Sequence[float | Tensor],
    reference_error: Tensor | None = None,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    pair_weight: Tensor | None = None,
    objective: str = "sigmoid",
    logistic: str = "joint",
    normalize: str | None = None,
    sft_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    layout: str = "halves",
    reduction: str = "mean",
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, DPOStats]:
    """L = mean over pairs of w·f(−½ Σ_m β_m Δ_m) + sft_weight · Σ_m e_m(policy)_win, where

        e_m(p) = mean over non-batch axes of (p_m − target_m)²
        Δ_m    = [e_m(policy) − e_m(reference)]_win − [same]_lose
        f(h)   = −log σ(h)

    Diffusion-DPO (arXiv 2311.12908, equation 14) over several modalities of one clip, as SyncDPO
    (arXiv 2605.12179) trains with it. e(policy) − e(reference) is summed as (p − r)·(p + r − 2y),
    which keeps its digits where policy ≈ reference. All arithmetic and sums are in float32; the
    gradient flows to `policy` alone and comes in its dtype; of all the rest only per-sample scalars
    are kept for the backward.

    Args:
        policy: [2B, …], or a sequence with one tensor per modality; float32, float16 or bfloat16,
            any strides. The mean is over all axes but the first; docs/losses.md says how to give
            an axis a preference of its own. The reference implementation takes float64 as well,
            in policy, reference and target of all modalities or in none.
        reference: the frozen model's output, like `policy`; None with `reference_error`.
        target: what both should have put out, like `policy`; or a `Velocity`, per modality.
        beta: a finite number ≥ 0, or one per modality; usual values are 100 to 5000, about 5 with
            `normalize`. Under torch.compile it may change from step to step: the first change
            compiles once more, the others do not; with dynamic=False, where the compiler takes
            floats for constants, give a tensor on the CPU. A CUDA graph captured by hand keeps the
            β of its capture.
        reference_error: [2B] or [M, 2B], e(reference) computed beforehand; any float dtype.
        mask: non-negative weights of any float dtype, or bool, broadcastable to [2B, …], or one per
            modality (None: everything counts); the mean becomes Σ mask·(p − y)² ÷ Σ mask. A
            modality whose mask selects nothing in either half of a pair has error 0 and weight 0
            there.
        pair_weight: [B], w above, of any float dtype, or bool; it leaves the SFT term alone.
        objective: f of the margin h: "sigmoid" −log σ(h), "hinge" max(0, 1 − h), "ipo" (h − ½)²,
            which is Azar et al.'s (arXiv 2310.12036) times β².
        logistic: "joint", one preference per clip, as above; "separate", Σ_m f(−½ β_m Δ_m), the
            form of AV-DPO (JavisDiT++).
        normalize: "reference" divides Δ_m by the mean of the reference's errors on the pair, so
            that one β fits every model and modality.
        sft_weight: weight of the winner's own error; a number as `beta` is.
        label_smoothing: 0 to ½, the chance that a preference is the wrong way round: (1 − s)·f(h) +
            s·f(−h). For "sigmoid".
        layout: "halves", all winners first; "interleaved", winner, loser, winner, loser.
        reduction: "mean" over the pairs, or "none".
        return_stats: also give the pass's `DPOStats`.
        impl: "auto" (kernel on CUDA, reference on CPU), "kernel" or "reference".

    Returns:
        float32 scalar, or [B] for reduction="none"; with `return_stats` a pair (loss, DPOStats).

        The values of tensors are not looked at, which would mean to wait for the device:
        - a policy that is not finite, where no mask leaves it out, gives a loss that is not finite,
          even at weight 0;
        - a mask whose sum over a sample is negative or NaN selects nothing there: error and weight
          0; single negative weights count as they are;
        - a `pair_weight` of NaN gives NaN, a negative one pushes the pair the other way;
        - with `normalize`, a pair whose reference has no error at all gives NaN;
        - statistics show such pairs, `implicit_accuracy` leaves out those without a finite margin.

    Raises:
        TypeError: wrong kind or dtype. ValueError: wrong shape, length, device, choice or range.
        RuntimeError: when the gradient is differentiated; there is no second derivative.
    """
    policy = [policy] if isinstance(policy, Tensor) else list(policy)
    count = len(policy)
    reference = [] if reference is None else per_modality("reference", reference, count)
    target = per_modality("target", target, count)
    mask = [None] * count if mask is None else per_modality("mask", mask, count)
    velocity = [entry if isinstance(entry, Velocity) else None for entry in target]
    beta = _check_numbers(beta, sft_weight, label_smoothing, count)
    if not torch.compiler.is_compiling():  # or the registered op does, when it runs
        beta, sft_weight = weights(beta, sft_weight)
    options = Options(
        beta=beta,
        sft_weight=sft_weight,
        stream=[v.stream if v else 0 for v in velocity],
        sign=[v.sign if v else MATERIALISED for v in velocity],
        objective=objective,
        separate=logistic == "separate",
        normalize=normalize == "reference",
        label_smoothing=float(label_smoothing),
        interleaved=layout == "interleaved",
        mean=reduction == "mean",
        stats=return_stats,
        impl=_check_tensors(policy, reference, target, mask, reference_error, pair_weight, impl),
    )
    _check_options(options, velocity, logistic, normalize, layout, reduction)
    seed = [v.seed if v else None for v in velocity]
    target = [v.clean if v else given for v, given in zip(velocity, target, strict=True)]
    mask = [_rounded(own, p) for own, p in zip(mask, policy, strict=True)]
    rest = (reference, target, seed, mask, reference_error, pair_weight)
    loss, *stats = differentiable(policy, rest, options)
    return (loss, _stats(*stats, options)) if return_stats else loss


def _rounded(mask, policy):
    """A float64 mask as float32, unless all else is float64; kernels read no float64."""
    doubles = mask is not None and mask.dtype == torch.float64
    return mask.float() if doubles and policy.dtype != torch.float64 else mask


def _stats(margin, weight, errors, options):
    policy, reference = errors.detach()
    halves = (half(e, options) for e in (policy, reference) for half in (win, lose))
    return DPOStats(margin.detach(), weight.detach(), *halves)
