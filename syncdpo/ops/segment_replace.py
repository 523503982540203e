"""Frame-audio segment replacement, one of the two best rules of SyncDPO (arXiv 2605.12179)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_choice, check_tensor

# The numbers are those of `enum class DType` in csrc/elements.h.
DTYPES = {torch.uint8: 0, torch.int16: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}


class Segments(NamedTuple):
    """Which stretches of time are overwritten, and by which: four tensors, all [B] or all [B, S].

    start, length, donor_start: seconds, all float32 or all float64, finite and at least 0.
    donor: int64, the sample of the batch that the replacement is taken from; b itself for another
        moment of the same clip.
    """

    start: Tensor
    length: Tensor
    donor: Tensor
    donor_start: Tensor


class _Options(NamedTuple):
    """What the implementations need besides tensors, one entry per stream."""

    rates: list[float]
    dims: list[int]
    crossfade: float
    clip: bool
    impl: str


# ---------------------------------------------------------------- checks


def _check_stream(name: str, x: Tensor, rate: float, dim: int, first: Tensor) -> int:
    """`dim` counted from the front."""
    check_tensor(name, x, tuple(DTYPES))
    check_tensor(name, x, device=first.device)
    if x.ndim < 2 or x.shape[0] != first.shape[0]:
        batch = first.shape[0] if first.ndim > 1 else "B"
        raise ValueError(f"{name}: expected [{batch}, ..., T, ...], got shape {list(x.shape)}")
    if not -x.ndim <= dim < x.ndim or dim % x.ndim == 0:
        raise ValueError(f"{name}_dim: expected an axis of {name} other than 0, got {dim}")
    if not 0 < rate < math.inf:
        raise ValueError(f"{name}_rate: expected frames per second, finite and above 0, got {rate}")
    return dim % x.ndim


def _check_segments(segments: Segments, x: Tensor) -> Segments:
    """Segments as [B, S]."""
    if not isinstance(segments, Segments):
        raise TypeError(f"segments: expected Segments, got {type(segments).__name__}")
    start = segments.start
    check_tensor("segments.start", start, (torch.float32, torch.float64))
    if start.ndim not in (1, 2) or start.shape[0] != x.shape[0]:
        batch = x.shape[0]
        raise ValueError(
            f"segments.start: expected shape [{batch}] or [{batch}, S], got {list(start.shape)}"
        )
    if start.device != x.device and start.device.type != "cpu":
        raise ValueError(f"segments.start: expected device {x.device}, got {start.device}")
    for name, value in segments._asdict().items():
        dtype = torch.int64 if name == "donor" else start.dtype
        check_tensor(f"segments.{name}", value, (dtype,), start.shape, start.device)
    return segments if start.ndim == 2 else Segments(*(value.unsqueeze(1) for value in segments))


def _check_out(name: str, x: Tensor, out: Tensor) -> None:
    check_tensor(f"out ({name})", out, (x.dtype,), x.shape, x.device)
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(f"out ({name}): expected tensors that need no gradient, got one that does")
    if torch.compiler.is_compiling():  # a traced tensor has no address, and results are copied
        return
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out ({name}): expected memory for every element, got an expanded tensor")
    same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    if not same and _overlap(x, out):
        raise ValueError(f"out ({name}): expected {name} itself or memory apart from it, got both")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the stretches of memory from first to last element meet."""

    def last(x: Tensor) -> int:
        steps = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr() + x.element_size() * steps

    return a.numel() > 0 and a.data_ptr() <= last(b) and b.data_ptr() <= last(a)


def _check_values(segments: Segments, frames: int, rate: float, clip: bool) -> None:
    """What only values tell: on the host by an error, on a device by an assertion there."""
    start, length, donor, donor_start = segments
    batch = len(donor)
    times = torch.stack([start, length, donor_start])
    right = ((times >= 0) & (times < math.inf)).all(0) & (donor >= 0) & (donor < batch)
    if not clip:
        right &= _frame_at(start.maximum(donor_start).double() + length.double(), rate) <= frames
    if right.device.type != "cpu":
        torch._assert_async(right.all(), "replace_segments: a segment is out of range")
        return
    if right.all():
        return
    b, s = (~right).nonzero()[0].tolist()
    at = f"[{b}, {s}]"
    for name in ("start", "length", "donor_start"):
        seconds = float(getattr(segments, name)[b, s])
        if not 0 <= seconds < math.inf:
            raise ValueError(f"segments.{name}{at}: expected seconds from 0 on, got {seconds}")
    if not 0 <= donor[b, s] < batch:
        raise ValueError(
            f"segments.donor{at}: expected 0 <= donor < {batch}, got {int(donor[b, s])}"
        )
    name = "start" if start[b, s] >= donor_start[b, s] else "donor_start"
    raise ValueError(
        f"segments.{name}{at} + length{at}: expected within {frames} frames at {rate} per second "
        f"(or clip=True), got {float(getattr(segments, name)[b, s])} + {float(length[b, s])} s"
    )


# ---------------------------------------------------------------- reference


def _frame_at(seconds: Tensor, rate: float) -> Tensor:
    """i(t) = floor(t × rate + 0.5), in float64."""
    return (seconds.double() * rate + 0.5).floor().long()


def _row(segments: Segments, row: int, frames: int, rate: float, crossfade: float):
    """One row of segments, frame by frame: the donor's weight [B, T] and its frame [B, T]."""
    start, length, _, donor_start = (value[:, row, None].double() for value in segments)
    first, donor_first = _frame_at(start, rate), _frame_at(donor_start, rate)
    count = (_frame_at(start + length, rate).clamp(max=frames) - first).clamp(min=0)
    # The donor's seconds fit: where rounding makes one frame too many of them, begin one earlier.
    fits = _frame_at(donor_start + length, rate) <= frames
    donor_first = torch.where(fits, donor_first.minimum(frames - count), donor_first)
    end = first + count.minimum(frames - donor_first).clamp(min=0)

    t = torch.arange(frames, device=start.device)
    edge = torch.minimum(t - first, end - 1 - t)  # frames to the nearer end; below 0 outside
    fade = math.floor(crossfade * rate + 0.5)
    rising = 0.5 - 0.5 * torch.cos(math.pi * (edge.double() + 0.5) / max(fade, 1))
    weight = torch.where(edge >= fade, 1.0, rising).where(edge >= 0, 0.0).float()
    return weight, (t + (donor_first - first)).clamp(0, max(frames - 1, 0))


def _per_frame(weight: Tensor, x: Tensor) -> Tensor:
    return weight.reshape(weight.shape + (1,) * (x.ndim - 2))


def _reference(x: Tensor, segments: Segments, rate: float, dim: int, crossfade: float) -> Tensor:
    original = x.movedim(dim, 1).float()
    y = original
    for row in range(segments.donor.shape[1]):
        weight, source = _row(segments, row, original.shape[1], rate, crossfade)
        weight = _per_frame(weight, y)
        donor = original[segments.donor[:, row, None], source]
        blended = torch.where(weight == 1, donor, y + weight * (donor - y))
        y = torch.where(weight == 0, y, blended)
    if not x.is_floating_point():
        y = y.round()
    return y.to(x.dtype).movedim(1, dim).contiguous()


def _reference_grad(
    grad: Tensor, segments: Segments, rate: float, dim: int, crossfade: float
) -> Tensor:
    """The transpose of the reference, which is linear: from the last row on, each takes its share
    of the gradient to its donor and leaves the rest to the rows before it."""
    g = grad.movedim(dim, 1).float()
    donors = torch.zeros_like(g)
    for row in reversed(range(segments.donor.shape[1])):
        weight, source = _row(segments, row, g.shape[1], rate, crossfade)
        weight = _per_frame(weight, g)
        # Accumulating index_put sorts on CUDA instead of using atomics: the same bits on every run.
        index = (segments.donor[:, row, None], source)
        donors = donors.index_put(index, weight * g, accumulate=True)
        g = (1 - weight) * g
    return (g + donors).to(grad.dtype).movedim(1, dim).contiguous()


# ---------------------------------------------------------------- kernels


@cache
def _native() -> ModuleType:
    try:
        from syncdpo import _C
    except ImportError as error:
        raise ImportError(
            "syncdpo._C, the compiled part of syncdpo, is missing or does not load; install the "
            "package with `pip install .`, in a checkout with `pip install -e .`"
        ) from error
    return _C


def _kernel(streams: list[Tensor], outs: list[Tensor], segments: Segments, options: _Options):
    device = streams[0].device
    on_cuda = device.type == "cuda"
    rows = [value.to(device, non_blocking=True).contiguous() for value in segments]
    pointers = (*(r.data_ptr() for r in rows), rows[0].shape[1], rows[0].dtype == torch.float64)
    arguments, scratch = [], []
    for x, out, rate, dim in zip(streams, outs, options.rates, options.dims, strict=True):
        address, room = x.data_ptr(), 0
        if on_cuda and out.data_ptr() == address:
            # Touched only where a donor is itself overwritten, which the host cannot see.
            scratch.append(x.new_empty(x.numel() * x.element_size(), dtype=torch.uint8))
            room = scratch[-1].data_ptr()
        layout = (x.shape, x.stride(), out.stride())
        arguments.append((address, out.data_ptr(), room, DTYPES[x.dtype], *layout, dim, rate))
    crossfade = options.crossfade
    if on_cuda:
        stream = torch.cuda.current_stream(device).cuda_stream
        _native().replace_segments_cuda(
            arguments, pointers, crossfade, options.clip, device.index, stream
        )
    else:
        _native().replace_segments_cpu(arguments, pointers, crossfade, torch.get_num_threads())


def _check_kernel(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"impl: expected 'reference' for tensors on {device}, got the kernel")
    if device.type == "cuda" and _native().cuda_version is None:
        raise RuntimeError(
            "impl: the kernel of replace_segments for CUDA was not built, since there was no "
            "working nvcc; reinstall with SYNCDPO_CUDA=ON, or ask for impl='reference'"
        )


def _forward(
    streams: list[Tensor], outs: list[Tensor] | None, segments: Segments, options: _Options
) -> list[Tensor]:
    reference = options.impl == "reference"
    if reference or segments.donor.device.type == "cpu":
        for x, rate, dim in zip(streams, options.rates, options.dims, strict=True):
            _check_values(segments, x.shape[dim], rate, options.clip)
    if not reference:
        outs = [torch.empty_like(x) for x in streams] if outs is None else outs
        _kernel(streams, outs, segments, options)
        return outs
    segments = Segments(*(value.to(streams[0].device) for value in segments))
    results = [
        _reference(x, segments, rate, dim, options.crossfade)
        for x, rate, dim in zip(streams, options.rates, options.dims, strict=True)
    ]
    return results if outs is None else [out.copy_(y) for out, y in zip(outs, results, strict=True)]


# ---------------------------------------------------------------- registration


@torch.library.custom_op("syncdpo::replace_segments", mutates_args=())
def _op(
    streams: Sequence[Tensor],
    start: Tensor,
    length: Tensor,
    donor: Tensor,
    donor_start: Tensor,
    rates: Sequence[float],
    dims: Sequence[int],
    crossfade: float,
    clip: bool,
    impl: str,
) -> list[Tensor]:
    segments = Segments(start, length, donor, donor_start)
    return _forward(streams, None, segments, _Options(rates, dims, crossfade, clip, impl))


@_op.register_fake
def _(streams, start, length, donor, donor_start, rates, dims, crossfade, clip, impl):
    return [torch.empty_like(x) for x in streams]


def _save(ctx, inputs, output) -> None:
    _, *segments, ctx.rates, ctx.dims, ctx.crossfade, _, _ = inputs
    ctx.save_for_backward(*segments)


def _backward(ctx, grads):
    segments = Segments(*(value.to(grads[0].device) for value in ctx.saved_tensors))
    streams = [
        _reference_grad(grad, segments, rate, dim, ctx.crossfade)
        for grad, rate, dim in zip(grads, ctx.rates, ctx.dims, strict=True)
    ]
    return streams, *[None] * 9


_op.register_autograd(_backward, setup_context=_save)


def _run(
    streams: list[Tensor], outs: list[Tensor] | None, segments: Segments, options: _Options
) -> list[Tensor]:
    """As the registered op where a compiler or autograd looks on, else without its overhead."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in streams)
    if not (torch.compiler.is_compiling() or needs_grad):
        return _forward(streams, outs, segments, options)
    results = _op(streams, *segments, *options)
    if outs is None:
        return results
    return [out.copy_(result) for out, result in zip(outs, results, strict=True)]


# ---------------------------------------------------------------- public


def replace_segments(
    video: Tensor | None,
    audio: Tensor | None,
    segments: Segments,
    *,
    video_rate: float | None,
    audio_rate: float | None,
    video_dim: int = 1,
    audio_dim: int = 1,
    crossfade: float = 0.0,
    clip: bool = False,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Overwrite the same stretches of time, in seconds, in video and audio by other stretches.

        y[b, i(start) + k] = x[donor, i(donor_start) + k],   0 <= k < i(start + length) - i(start)
        i(t) = floor(t × rate + 0.5)

    for each segment of each sample; the rest keeps its bits. One of the two best rules of SyncDPO
    (arXiv 2605.12179). i is computed in float64, so that frames and sound of one second agree.
    Rows of [B, S] apply one after the other, so where they overlap the later one wins; donors are
    read as they were before, also in place. A segment of no frames in one stream leaves it alone.
    Where a donor's seconds fit its clip but their rounding asks for one frame more than there is,
    it begins one frame earlier.

    With a crossfade of F = i(crossfade) frames, the first and the last F frames of a segment are
    blended into what they replace: x + w (donor - x), w = ½ - ½ cos(π (k + ½) / F), k frames from
    the seam, in float32, integers rounded to the nearest, ties to even.

    Args:
        video, audio: [B, ..., T, ...], uint8, int16, float16, bfloat16 or float32, any strides;
            latents, or raw frames and waveforms. None, or a rate of None, and the stream is
            returned as it came.
        segments: on the streams' device; for CUDA also on the host, where they are checked at once.
        video_rate, audio_rate: frames (or samples of sound) per second.
        video_dim, audio_dim: the time axes; any but the batch axis 0.
        crossfade: seconds, at both seams of each segment.
        clip: cut segments that reach past the end of the clip or of the donor's.
        out: (video, audio) to write to: tensors of the streams' shapes and dtypes. The very streams
            replace in place and touch the replaced stretches only. On CUDA that too is one launch,
            a cooperative one, and sets aside memory of the streams' size, which is used only where
            a donor is itself overwritten.
        impl: "kernel" (C++ on CPU, CUDA C++ on CUDA), "reference", or "auto", the kernel.

    Returns:
        (video, audio), in `out` where it was given. Differentiable with respect to both, by sums
        in float32; not through `out`, and not with respect to segments.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, rate or option; times that are
            negative or not finite; donors outside the batch; segments past the end unless `clip`.
            Values on a device are checked there: a wrong one prints itself and ends the kernel.
    """
    check_choice("impl", impl, ("auto", "kernel", "reference"))
    if not 0 <= crossfade < math.inf:
        raise ValueError(f"crossfade: expected seconds, finite and at least 0, got {crossfade}")
    entries = {"video": (video, video_rate, video_dim), "audio": (audio, audio_rate, audio_dim)}
    names = [name for name, (x, rate, _) in entries.items() if x is not None and rate is not None]
    given = dict(zip(entries, out or (None, None), strict=True))
    if not names:
        return video, audio
    streams = [entries[name][0] for name in names]
    rates = [float(entries[name][1]) for name in names]
    dims = [_check_stream(name, *entries[name], streams[0]) for name in names]
    segments = _check_segments(segments, streams[0])
    for name in names:
        if given[name] is not None:
            _check_out(name, entries[name][0], given[name])
    if impl != "reference":
        _check_kernel(streams[0].device)
    options = _Options(rates, dims, float(crossfade), clip, impl)

    outs = None
    if out is not None:
        outs = [
            torch.empty_like(x) if given[name] is None else given[name]
            for name, x in zip(names, streams, strict=True)
        ]
    replaced = dict(zip(names, _run(streams, outs, segments, options), strict=True))
    return replaced.get("video", video), replaced.get("audio", audio)
