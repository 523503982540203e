"""Noise, and the noising of pairs, in one pass each; see syncdpo/ops/paired_noise.py.

A program takes one chunk of one pair: it reads winner and loser (once, where they are the same),
generates their common noise in registers and writes both halves.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    CHUNK,
    PLANS,
    THREADS,
    Memory,
    Plan,
    blocks,
    chunk_start,
    layout,
    load,
    memory,
    normals,
    offsets,
    row_start,
    store,
)

# Constant tuples are flat, numbers only: Triton 3.6 takes no others.
FLAGS_PER_MODALITY = tl.constexpr(8)

# ---------------------------------------------------------------- kernels


@triton.jit
def _noise_kernel(out, seed, stream, count, chunks, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    i_pair = tl.program_id(0) // chunks
    first = chunk_start(tl.program_id(0) % chunks, CHUNK, WIDE)
    b_seed = tl.load(seed + i_pair)
    p_out = row_start(out, i_pair, count, ALIGN)
    lane = tl.arange(0, 4)[None, :]
    for i_block in range(blocks(first, count, CHUNK, THREADS, 4, False)):
        start = first + i_block * (THREADS * 4) + tl.arange(0, THREADS) * 4
        offset = offsets(start[:, None], lane, (count,), (1,), True, ALIGN)
        tl.store(p_out + offset, normals(start, stream, b_seed, THREADS, 4), offset < count)


@triton.jit
def _paired_noise_kernel(
    win,
    lose,
    out,
    sigma,
    seed,
    stream,
    batch,
    chunks,
    total,
    layouts,
    FLAGS: tl.constexpr,
):
    """Tuples hold one entry per modality; a pair's programs go through its modalities in turn."""
    i_pair = tl.program_id(0) // total
    i_chunk = tl.program_id(0) % total
    for m in tl.static_range(len(win)):
        if (i_chunk >= 0) & (i_chunk < chunks[m]):
            _noise_chunk(
                win[m], lose[m], out[m], sigma[m], seed, stream + m, i_pair, i_chunk, batch,
                layouts[m], FLAGS, m,
            )  # fmt: skip
        i_chunk -= chunks[m]


@triton.jit
def _noise_chunk(
    win, lose, out, sigma, seed, stream, i_pair, i_chunk, batch, layout,
    FLAGS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    count, sizes, rows, strides = layout
    FIRST: tl.constexpr = M * FLAGS_PER_MODALITY
    VEC: tl.constexpr = FLAGS[FIRST]
    ROWWISE: tl.constexpr = FLAGS[FIRST + 1]
    WIDE: tl.constexpr = FLAGS[FIRST + 2]
    EVEN: tl.constexpr = FLAGS[FIRST + 3]
    SHARED: tl.constexpr = FLAGS[FIRST + 4]
    ALIGN_WIN: tl.constexpr = FLAGS[FIRST + 5]
    ALIGN_LOSE: tl.constexpr = FLAGS[FIRST + 6]
    ALIGN_OUT: tl.constexpr = FLAGS[FIRST + 7]

    b_seed = tl.load(seed + i_pair)
    b_sigma = tl.load(sigma + i_pair)
    b_clean = 1.0 - b_sigma
    p_win = row_start(win, i_pair, rows[0], ALIGN_WIN)
    p_out_win = row_start(out, i_pair, count, ALIGN_OUT)
    p_out_lose = row_start(out, i_pair + batch, count, ALIGN_OUT)
    first = chunk_start(i_chunk, CHUNK, WIDE)
    lane = tl.arange(0, VEC)[None, :]
    for i_block in range(blocks(first, count, CHUNK, THREADS, VEC, EVEN)):
        start = first + i_block * (THREADS * VEC) + tl.arange(0, THREADS) * VEC
        own = offsets(start[:, None], lane, (count,), (1,), True, ALIGN_OUT)
        inside = own < count
        offset = offsets(start[:, None], lane, sizes, strides[0], ROWWISE, ALIGN_WIN)
        b_win = load(p_win + offset, inside, EVEN)
        b_lose = b_win
        if not SHARED:
            p_lose = row_start(lose, i_pair, rows[1], ALIGN_LOSE)
            offset = offsets(start[:, None], lane, sizes, strides[1], ROWWISE, ALIGN_LOSE)
            b_lose = load(p_lose + offset, inside, EVEN)
        scaled = b_sigma * normals(
            start, stream, b_seed, THREADS, VEC
        )  # while both are on their way
        noised = tl.fma(b_win, b_clean, scaled)
        store(p_out_win + own, noised, inside, EVEN)
        if not SHARED:
            noised = tl.fma(b_lose, b_clean, scaled)
        store(p_out_lose + own, noised, inside, EVEN)


# ---------------------------------------------------------------- launchers


def _noise(shape: Sequence[int], seed: Tensor, stream: int) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32, device=seed.device)
    if out.numel() == 0:
        return out
    plan = _noise_plan(memory(out), stream)
    plan.launch([seed], out, seed, stream, *plan.numbers)
    return out


@lru_cache(PLANS)
def _noise_plan(out: Memory, stream: int) -> Plan:
    own = layout([out], ordered=True)
    chunks = own.chunks(CHUNK)
    return Plan(
        _noise_kernel, out[0][0] * chunks, (own.count, chunks), ALIGN=own.align[0], WIDE=own.wide
    )


def _paired_noise(
    win: Sequence[Tensor],
    lose: Sequence[Tensor | None],
    sigma: Sequence[Tensor],
    seed: Tensor,
    stream: int,
) -> list[Tensor]:
    batch = len(seed)
    out = [x.new_empty((2 * batch, *x.shape[1:])) for x in win]
    plan = _paired_noise_plan(
        tuple(map(memory, win)),
        tuple(y if y is None else memory(y) for y in lose),
        tuple(map(memory, out)),
        stream,
    )
    if plan is None:
        return out
    win, lose = tuple(win), tuple(x if y is None else y for x, y in zip(win, lose, strict=True))
    sigma, seed = tuple(level.contiguous() for level in sigma), seed.contiguous()
    plan.launch([*win, *lose, *sigma, seed], win, lose, tuple(out), sigma, seed, *plan.numbers)
    return out


@lru_cache(PLANS)
def _paired_noise_plan(
    win: tuple[Memory, ...], lose: tuple[Memory | None, ...], out: tuple[Memory, ...], stream: int
) -> Plan | None:
    """None where there is nothing to write."""
    batch = win[0][0][0]
    layouts = [layout((x, y or x, o), ordered=True) for x, y, o in zip(win, lose, out, strict=True)]
    chunks = tuple(own.chunks(CHUNK) for own in layouts)
    total = sum(chunks)
    flags = []
    for own, y in zip(layouts, lose, strict=True):
        flags += [own.vec, own.rowwise, own.wide, own.even(CHUNK), y is None, *own.align]
    numbers = (
        stream, batch, chunks, total,
        tuple((own.count, own.sizes, own.rows, own.strides) for own in layouts),
    )  # fmt: skip
    programs = batch * total
    return Plan(_paired_noise_kernel, programs, numbers, FLAGS=tuple(flags)) if programs else None
