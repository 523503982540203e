"""Temporal warp: y[b, p, t, q] between x[b, p, i, q] and x[b, p, i + 1, q], i = floor(τ_b(t)).

One kernel for every warp, scale and shift. A tensor [B, ..., T, ...] is seen as [B, P, T, Q], what
stands before time and what stands after. A program fills one tile of one sample: frames by inner
elements, or, where time is last, rows by frames.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ._common import PLANS, Memory, Plan, memory

BOUNDARIES = {"edge": 0, "wrap": 1, "reflect": 2}


@triton.jit
def inside(index, frames, BOUNDARY: tl.constexpr):
    """The frame that stands for each index, whether inside the clip or not."""
    if BOUNDARY == 0:
        frame = tl.minimum(tl.maximum(index, 0), frames - 1)
    elif BOUNDARY == 1:
        frame = ((index % frames) + frames) % frames
    else:
        period = 2 * frames - 2
        frame = (frames - 1) - tl.abs(((index % period) + period) % period - (frames - 1))
    return frame


@triton.jit
def displacement_at(p_knots, knot, frames, segments):
    """δ at a knot: its source position less its own, [frames]; the latter rounded as in float32."""
    own = tl.div_rn((knot * (frames - 1)).to(tl.float32), segments.to(tl.float32))
    return tl.load(p_knots + knot) - own


@triton.jit
def taps(p_knots, output, frames, segments, DENSE: tl.constexpr, BOUNDARY: tl.constexpr):
    """Two source frames around τ and the weight of the second, for output frames below `frames`.

    Step by step as the reference does it; `output` is int64 where output * segments needs it.
    """
    if DENSE:  # a knot for each frame
        delta = tl.load(p_knots + output) - output.to(tl.float32)
    else:
        segment = tl.minimum(output * segments // (frames - 1), segments - 1)
        rest = (output * segments - segment * (frames - 1)).to(tl.float32)
        along = tl.div_rn(rest, (frames - 1).to(tl.float32))
        delta = displacement_at(p_knots, segment, frames, segments)
        there = displacement_at(p_knots, segment + 1, frames, segments)
        delta = tl.where(along == 0, delta, delta + along * (there - delta))
    nearest = tl.floor(delta + 0.5)
    snapped = tl.abs(delta - nearest) <= frames.to(tl.float32) * 2.384185791015625e-07  # 2^-22
    delta = tl.where(snapped, nearest, delta)
    whole = tl.floor(delta)
    bounded = tl.minimum(tl.maximum(whole, -1073741824.0), 1073741824.0)  # 2^30: fits an int32
    moved = tl.where(whole == whole, bounded, 0.0).to(tl.int32)
    index = output.to(tl.int32) + moved
    return inside(index, frames, BOUNDARY), inside(index + 1, frames, BOUNDARY), delta - whole


@triton.jit(do_not_specialize=["segments"])  # one segment is a number like others, no constant
def warp_kernel(
    p_x,  # [B, P, T, Q], any strides
    p_knots,  # [B, K] float32, contiguous
    p_y,  # [B, P, T, Q], contiguous
    rows,  # P
    frames,  # T
    inner,  # Q
    segments,  # K - 1
    stride_b,
    stride_p,
    stride_t,
    stride_q,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,  # inner elements, or rows where time is last
    TIME_LAST: tl.constexpr,
    DENSE: tl.constexpr,
    LONG: tl.constexpr,  # frames * segments needs 64 bits
    BOUNDARY: tl.constexpr,
):
    tiles_t = tl.cdiv(frames, BLOCK_T)
    tiles_n = tl.cdiv(rows if TIME_LAST else inner, BLOCK_N)
    i_tile = tl.program_id(0)
    i_n = i_tile % tiles_n
    i_t = (i_tile // tiles_n) % tiles_t
    i_row = i_tile // (tiles_n * tiles_t)  # sample, or sample and row: [B, P] where time is inner
    i_b = (i_row if TIME_LAST else i_row // rows).to(tl.int64)

    output = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = output < frames
    safe = tl.minimum(output, frames - 1)
    lower, upper, weight = taps(
        p_knots + i_b * (segments + 1),
        safe.to(tl.int64) if LONG else safe,
        frames,
        segments,
        DENSE,
        BOUNDARY,
    )
    n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if TIME_LAST:
        o_row = n.to(tl.int64)[:, None]
        p_source = p_x + i_b * stride_b + o_row * stride_p
        p_target = p_y + (i_b * rows + o_row) * frames + output[None, :]
        o_lower, o_upper = lower.to(tl.int64)[None, :], upper.to(tl.int64)[None, :]
        w, m = weight[None, :], (n < rows)[:, None] & m_t[None, :]
    else:
        p_source = p_x + i_b * stride_b + (i_row % rows).to(tl.int64) * stride_p
        p_source += n[None, :] * stride_q
        p_target = p_y + (i_row.to(tl.int64) * frames + output[:, None]) * inner + n[None, :]
        o_lower, o_upper = lower.to(tl.int64)[:, None], upper.to(tl.int64)[:, None]
        w, m = weight[:, None], m_t[:, None] & (n < inner)[None, :]
    here = tl.load(p_source + o_lower * stride_t, mask=m).to(tl.float32)
    # A whole frame needs no second one.
    there = tl.load(p_source + o_upper * stride_t, mask=m & (w != 0), other=0.0).to(tl.float32)
    y = tl.where(w == 0, here, here + w * (there - here))
    tl.store(p_target, y.to(p_y.dtype.element_ty), mask=m)


def plan(shape: tuple[int, int, int, int], knots: int, itemsize: int, boundary: str) -> dict:
    """The constexprs of `warp_kernel` for x of that shape [B, P, T, Q]: one 16-byte load or more
    per thread and tap, whole sectors along the contiguous axis."""
    _, rows, frames, inner = shape
    elements = 4096 // itemsize
    time_last = inner == 1
    if time_last:
        block_t = min(triton.next_power_of_2(frames), elements)
        block_n = min(triton.next_power_of_2(rows), elements // block_t)
    else:
        block_n = min(triton.next_power_of_2(inner), 512 // itemsize)
        block_t = min(triton.next_power_of_2(frames), elements // block_n)
    return {
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "TIME_LAST": time_last,
        "DENSE": knots == frames,
        "LONG": knots != frames and frames * knots >= 2**31,
        "BOUNDARY": BOUNDARIES[boundary],
    }


def warp_fwd(x: torch.Tensor, knots: torch.Tensor, dim: int, boundary: str) -> torch.Tensor:
    """x with time at axis `dim` > 0, knots [B, K] float32; a contiguous y of the same shape."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    source = x.flatten(dim + 1) if dim + 1 < x.ndim else x.unsqueeze(-1)
    source = source.flatten(1, dim - 1) if dim > 1 else source.unsqueeze(1)
    plan, knots = _plan(memory(source), knots.shape[1], boundary), knots.contiguous()
    plan.launch([source, knots], source, knots, y, *plan.numbers)
    return y


@lru_cache(PLANS)
def _plan(source: Memory, knots: int, boundary: str) -> Plan:
    shape, strides, dtype = source
    batch, rows, frames, inner = shape
    constants = plan(shape, knots, dtype.itemsize, boundary)
    tiles_t = triton.cdiv(frames, constants["BLOCK_T"])
    n, outer = (rows, batch) if constants["TIME_LAST"] else (inner, batch * rows)
    programs = outer * tiles_t * triton.cdiv(n, constants["BLOCK_N"])
    return Plan(warp_kernel, programs, (rows, frames, inner, knots - 1, *strides), **constants)
