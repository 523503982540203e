"""Temporal warp, scale and shift: resample a batch along time, each sample by its own map."""

from __future__ import annotations

import torch
from torch import Tensor

from syncdpo.ops._checks import FLOATS, check_choice, check_impl, check_tensor

BOUNDARIES = ("edge", "wrap", "reflect")
# Positions this far out only have to fit an integer; the boundary decides what is read there.
FARTHEST = 2.0**30


# ---------------------------------------------------------------- checks


def _check_stream(x: Tensor, dim: int, frames: int | None, boundary: str, impl: str) -> None:
    check_tensor("x", x, dtypes=(*FLOATS, torch.float64))
    if not -x.ndim <= dim < x.ndim or dim % x.ndim == 0:
        raise ValueError(f"dim: expected an axis of x other than the batch axis 0, got {dim}")
    size = x.shape[dim]
    if frames is not None and (frames < 1 or size % frames):
        raise ValueError(f"frames: expected a divisor of axis {dim}'s length {size}, got {frames}")
    if (size if frames is None else frames) < 2:
        raise ValueError(f"x: expected at least two frames along axis {dim}, got {frames or size}")
    check_choice("boundary", boundary, BOUNDARIES)
    if check_impl(impl, x.device) == "kernel" and x.dtype is torch.float64:
        raise TypeError(
            "x: expected dtype float32, float16 or bfloat16 for the kernel, got float64"
        )


def _check_parameter(name: str, value: Tensor, x: Tensor, shape: str = "[B]") -> None:
    check_tensor(name, value, dtypes=(torch.float32,), device=x.device)
    axes = 1 if shape == "[B]" else 2
    right = value.ndim == axes and value.shape[0] == x.shape[0]
    if not right or (axes == 2 and value.shape[1] < 2):
        raise ValueError(
            f"{name}: expected shape {shape} with B = {x.shape[0]}, got {list(value.shape)}"
        )


def _check_values(name: str, expected: str, value: Tensor, right: Tensor) -> None:
    """Raise for the first sample that is not `right`, [B] of bool."""
    if not bool(right.all()):
        sample = int(right.logical_not().nonzero()[0])
        raise ValueError(f"{name}[{sample}]: expected {expected}, got {value[sample].tolist()}")


def _length(x: Tensor, dim: int, frames: int | None) -> int:
    """T, also where `dim` holds packed tokens."""
    return x.shape[dim] if frames is None else frames


def _readable(value: Tensor) -> bool:
    """Whether values can be checked: reading them must not wait for a device or break a graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


# ---------------------------------------------------------------- reference


def _inside(index: Tensor, frames: int, boundary: str) -> Tensor:
    """The frame that stands for each index, whether inside the clip or not."""
    if boundary == "edge":
        return index.clamp(0, frames - 1)
    if boundary == "wrap":
        return index.remainder(frames)
    return (frames - 1) - (index.remainder(2 * frames - 2) - (frames - 1)).abs()


def _taps(knots: Tensor, frames: int, boundary: str) -> tuple[Tensor, Tensor, Tensor]:
    """For each output frame the two source frames around τ and the weight of the second, [B, T].

    Works on δ(t) = τ(t) - t, whose fraction float32 keeps where τ itself is long. A δ within a
    few roundings of the longest position from a whole number is that number, so that rounding in
    the knots never blurs.
    """
    segments = knots.shape[1] - 1
    output = torch.arange(frames, device=knots.device)
    knot = torch.arange(segments + 1, device=knots.device)
    delta = knots - (knot * (frames - 1)).to(knots.dtype) / segments
    segment = (output * segments // (frames - 1)).clamp(max=segments - 1)
    along = (output * segments - segment * (frames - 1)).to(knots.dtype) / (frames - 1)
    here, there = delta[:, segment], delta[:, segment + 1]
    delta = torch.where(along == 0, here, here + along * (there - here))
    nearest = (delta + 0.5).floor()
    delta = torch.where((delta - nearest).abs() <= frames * 2.0**-22, nearest, delta)
    whole = delta.floor()
    index = output + whole.nan_to_num(0.0).clamp(-FARTHEST, FARTHEST).long()
    lower, upper = _inside(index, frames, boundary), _inside(index + 1, frames, boundary)
    return lower, upper, delta - whole


def _reference(x: Tensor, knots: Tensor, dim: int, boundary: str) -> Tensor:
    lower, upper, weight = _taps(knots, x.shape[dim], boundary)
    clip = torch.arange(x.shape[0], device=x.device)[:, None]
    frames_first = x.movedim(dim, 1)
    precision = torch.promote_types(x.dtype, torch.float32)
    here = frames_first[clip, lower].to(precision)
    there = frames_first[clip, upper].to(precision)
    weight = weight.to(precision).reshape(weight.shape + (1,) * (x.ndim - 2))
    y = torch.where(weight == 0, here, here + weight * (there - here))
    return y.to(x.dtype).movedim(1, dim).contiguous()


def _reference_grad(grad: Tensor, knots: Tensor, dim: int, boundary: str) -> Tensor:
    lower, upper, weight = _taps(knots, grad.shape[dim], boundary)
    frames_first = grad.movedim(dim, 1)
    rows = frames_first.to(torch.promote_types(grad.dtype, torch.float32)).flatten(0, 1)
    weight = weight.to(rows.dtype).reshape((-1,) + (1,) * (rows.ndim - 1))
    first_row = torch.arange(lower.shape[0], device=grad.device)[:, None] * lower.shape[1]
    result = torch.zeros_like(rows)
    for index, share in ((lower, 1 - weight), (upper, weight)):
        part = torch.where(share == 0, 0.0, share * rows)
        target = (first_row + index).flatten()
        if grad.is_cuda:  # index_add_ is atomic there, index_put_ sorts; on CPU the other way round
            result.index_put_((target,), part, accumulate=True)
        else:
            result.index_add_(0, target, part)
    return result.reshape(frames_first.shape).to(grad.dtype).movedim(1, dim).contiguous()


# ---------------------------------------------------------------- registration


def _forward(x: Tensor, knots: Tensor, dim: int, boundary: str, impl: str) -> Tensor:
    if impl == "reference":
        return _reference(x, knots, dim, boundary)
    from syncdpo.kernels.temporal_warp import warp_fwd

    return warp_fwd(x, knots, dim, boundary)


_warp = torch.library.custom_op("syncdpo::warp", _forward, mutates_args=())
# One gradient for both: training sees it seldom, and it is deterministic everywhere.
_warp_grad = torch.library.custom_op("syncdpo::warp_grad", _reference_grad, mutates_args=())


@_warp.register_fake
def _(x: Tensor, knots: Tensor, dim: int, boundary: str, impl: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_warp_grad.register_fake
def _(grad: Tensor, knots: Tensor, dim: int, boundary: str) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    _, knots, ctx.dim, ctx.boundary, _ = inputs
    ctx.save_for_backward(knots)


def _backward(ctx, grad: Tensor):
    (knots,) = ctx.saved_tensors
    return _warp_grad(grad, knots, ctx.dim, ctx.boundary), None, None, None, None


_warp.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------- public


def warp(
    x: Tensor,
    knots: Tensor,
    *,
    dim: int = 1,
    frames: int | None = None,
    boundary: str = "edge",
    impl: str = "auto",
) -> Tensor:
    """Resample each sample along time by its own piecewise-linear map.

        y[b, t] = (1 - w) x[b, i] + w x[b, i + 1],   i = floor(τ_b(t)),  w = τ_b(t) - i
        τ_b(k (T - 1) / (K - 1)) = knots[b, k],      linear in between

    One of the rules of SyncDPO (arXiv 2605.12179) in its most general form. Where τ falls on a
    whole frame, within T * 2^-22 of it, that frame's bits are moved and nothing is blurred.

    Args:
        x: [B, ...], float16, bfloat16 or float32, any strides; interpolated in float32. The
            reference also takes float64. Differentiable with respect to x.
        knots: [B, K] float32, K >= 2, never falling: the source position, in frames, of K output
            positions evenly spaced over [0, T - 1].
        dim: the time axis; any but the batch axis 0.
        frames: T where `dim` holds packed tokens, T * (tokens of one frame); whole frames move.
        boundary: what lies outside the clip: "edge" (the first or last frame), "wrap" (the clip
            again) or "reflect" (the clip backwards).
        impl: "kernel" (Triton, CUDA only), "reference", or "auto": the kernel on CUDA.

    Returns:
        y: shape and dtype of x, contiguous.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option; fewer than two frames;
            knots that fall, are not finite, or lie outside the clip by more than its length.
            Values are read on the CPU outside compiled graphs only; elsewhere any finite map
            follows the boundary and a NaN gives NaN frames.
    """
    _check_stream(x, dim, frames, boundary, impl)
    _check_parameter("knots", knots, x, "[B, K], K >= 2,")
    if _readable(knots):
        length = _length(x, dim, frames)
        near = (knots >= -length) & (knots <= 2 * length - 1)
        right = near.all(1) & (knots.diff(dim=1) >= 0).all(1)
        expected = f"finite, never falling and within one length of the clip's {length} frames"
        _check_values("knots", expected, knots, right)
    return resample(x, knots, dim=dim, frames=frames, boundary=boundary, impl=impl)


def scale(
    x: Tensor,
    rate: Tensor,
    *,
    dim: int = 1,
    frames: int | None = None,
    anchor: float = 0.5,
    boundary: str = "edge",
    impl: str = "auto",
) -> Tensor:
    """Play each sample faster or slower around a fixed point.

        y[b, t] = x[b, a + (t - a) rate[b]],   a = anchor (T - 1)

    `rate` [B] float32, finite and above 0: 2 plays twice as fast. `anchor` is a fraction of the
    clip. A two-knot `warp`; see there for the other arguments and the errors.
    """
    _check_stream(x, dim, frames, boundary, impl)
    _check_parameter("rate", rate, x)
    if _readable(rate):
        _check_values("rate", "finite and above 0", rate, rate.isfinite() & (rate > 0))
    last = _length(x, dim, frames) - 1
    fixed = anchor * last
    knots = torch.stack([fixed - fixed * rate, fixed + (last - fixed) * rate], dim=1)
    return resample(x, knots, dim=dim, frames=frames, boundary=boundary, impl=impl)


def shift(
    x: Tensor,
    offset: Tensor,
    *,
    dim: int = 1,
    frames: int | None = None,
    boundary: str = "edge",
    impl: str = "auto",
) -> Tensor:
    """Move each sample along time.

        y[b, t] = x[b, t - offset[b]]

    `offset` [B] float32, finite, in frames: positive is later, and a whole number moves bits. A
    two-knot `warp`; see there for the other arguments and the errors.
    """
    _check_stream(x, dim, frames, boundary, impl)
    _check_parameter("offset", offset, x)
    if _readable(offset):
        _check_values("offset", "finite", offset, offset.isfinite())
    last = _length(x, dim, frames) - 1
    knots = torch.stack([-offset, last - offset], dim=1)
    return resample(x, knots, dim=dim, frames=frames, boundary=boundary, impl=impl)


def resample(
    x: Tensor,
    knots: Tensor,
    *,
    dim: int = 1,
    frames: int | None = None,
    boundary: str = "edge",
    impl: str = "auto",
) -> Tensor:
    """`warp` behind its checks, for callers inside the package: its knots may fall, too."""
    axis = dim % x.ndim
    whole_frames = x if frames is None else x.unflatten(axis, (frames, -1))
    impl = check_impl(impl, x.device)
    traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    y = (_warp if traced else _forward)(whole_frames, knots, axis, boundary, impl)
    return y.reshape(x.shape)
