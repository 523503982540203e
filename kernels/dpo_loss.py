"""The DPO loss forward and backward, one launch each; see syncdpo/ops/dpo_loss.py.

Forward: a program sums one chunk of one pair and modality. The last program of a pair adds up the
pair's chunks, in a fixed order, and works out its margin, its loss and the slopes that the backward
needs; the last pair adds up the losses. Backward: a program writes one chunk of the gradient.
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
    Layout,
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
from ._dpo_pair import FLAGS_PER_MODALITY, MASKED_FLAG, OBJECTIVES, add_up, finish_pair, pair_row

# A program that adds up ends with a wait for memory that writing ones do not know: it does more
# before. Its elements decide the order of addition, so they are no function of the device either.
SUM_CHUNK = tl.constexpr(4096)
SUM_WARPS = 8
SUM_THREADS = tl.constexpr(32 * SUM_WARPS)

# ---------------------------------------------------------------- one chunk, forward


@triton.jit
def _rebuild(given, b_noise, inside, SIGN: tl.constexpr, EVEN: tl.constexpr):
    """The target: given whole (SIGN 0), or sign·(ε − clean); 0 beyond the sample's end."""
    if SIGN == 0:
        target = given
    else:
        target = b_noise - given if SIGN == 1 else given - b_noise
        if not EVEN:
            target = tl.where(inside, target, 0.0)
    return target


@triton.jit
def _sums(b_policy, b_reference, b_target, b_mask, MASKED: tl.constexpr):
    """The four sums over each thread's vector, [SUM_THREADS]."""
    to_policy = b_policy - b_target
    to_reference = b_reference - b_target
    gain = (b_policy - b_reference) * (to_policy + to_reference)
    policy = to_policy * to_policy
    reference = to_reference * to_reference
    if MASKED:
        gain = tl.where(b_mask != 0.0, gain * b_mask, 0.0)
        policy = tl.where(b_mask != 0.0, policy * b_mask, 0.0)
        reference = tl.where(b_mask != 0.0, reference * b_mask, 0.0)
    return tl.sum(gain, 1), tl.sum(policy, 1), tl.sum(reference, 1), tl.sum(b_mask, 1)


@triton.jit
def _join_quantities(gain, policy, reference, selected, QUANTITIES: tl.constexpr):
    """[SUM_THREADS, …], QUANTITIES / 2 per thread in the order above; none leaves its thread."""
    if QUANTITIES == 2:
        joined = gain
    elif QUANTITIES == 4:
        joined = tl.join(gain, policy)
    else:
        joined = tl.join(tl.join(gain, reference), tl.join(policy, selected))
    return joined


@triton.jit
def _chunk_sums(
    policy, reference, target, mask, seed, stream, i_pair, i_chunk, batch, layout,
    FLAGS: tl.constexpr, M: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTITIES: tl.constexpr,
):  # fmt: skip
    """The chunk's partial sums, [QUANTITIES]: winner and loser in turn for each quantity."""
    count, sizes, rows, strides = layout
    FIRST: tl.constexpr = M * FLAGS_PER_MODALITY
    VEC: tl.constexpr = FLAGS[FIRST]
    ROWWISE: tl.constexpr = FLAGS[FIRST + 1]
    WIDE: tl.constexpr = FLAGS[FIRST + 2]
    EVEN: tl.constexpr = FLAGS[FIRST + 3]
    SIGN: tl.constexpr = FLAGS[FIRST + 4]
    SHARED: tl.constexpr = FLAGS[FIRST + 5]
    MASKED: tl.constexpr = FLAGS[FIRST + MASKED_FLAG]
    ALIGN_POLICY: tl.constexpr = FLAGS[FIRST + 7]
    ALIGN_REFERENCE: tl.constexpr = FLAGS[FIRST + 8]
    ALIGN_TARGET: tl.constexpr = FLAGS[FIRST + 9]
    ALIGN_MASK: tl.constexpr = FLAGS[FIRST + 10]

    win = pair_row(i_pair, batch, 0, INTERLEAVED)
    lose = pair_row(i_pair, batch, 1, INTERLEAVED)
    p_policy_win = row_start(policy, win, rows[0], ALIGN_POLICY)
    p_policy_lose = row_start(policy, lose, rows[0], ALIGN_POLICY)
    p_reference_win = row_start(reference, win, rows[1], ALIGN_REFERENCE)
    p_reference_lose = row_start(reference, lose, rows[1], ALIGN_REFERENCE)
    p_target_win = row_start(target, i_pair if SHARED else win, rows[2], ALIGN_TARGET)
    p_target_lose = row_start(target, i_pair if SHARED else lose, rows[2], ALIGN_TARGET)
    b_mask_win = tl.zeros([SUM_THREADS, VEC], tl.float32)
    b_mask_lose = b_mask_win
    b_noise = b_mask_win
    b_seed = tl.load(seed + i_pair) if SIGN != 0 else 0
    zero = tl.zeros([SUM_THREADS], tl.float32)
    gain_win, policy_win, reference_win, selected_win = zero, zero, zero, zero
    gain_lose, policy_lose, reference_lose, selected_lose = zero, zero, zero, zero

    first = chunk_start(i_chunk, SUM_CHUNK, WIDE)
    lane = tl.arange(0, VEC)[None, :]
    for i_block in range(blocks(first, count, SUM_CHUNK, SUM_THREADS, VEC, EVEN)):
        start = first + i_block * (SUM_THREADS * VEC) + tl.arange(0, SUM_THREADS) * VEC
        inside = start[:, None] + lane < count
        o_target = offsets(start[:, None], lane, sizes, strides[2], ROWWISE, ALIGN_TARGET)
        o_policy = offsets(start[:, None], lane, sizes, strides[0], ROWWISE, ALIGN_POLICY)
        o_reference = offsets(start[:, None], lane, sizes, strides[1], ROWWISE, ALIGN_REFERENCE)
        b_target_win = load(p_target_win + o_target, inside, EVEN)
        b_target_lose = b_target_win if SHARED else load(p_target_lose + o_target, inside, EVEN)
        b_policy_win = load(p_policy_win + o_policy, inside, EVEN)
        b_policy_lose = load(p_policy_lose + o_policy, inside, EVEN)
        b_reference_win = load(p_reference_win + o_reference, inside, EVEN)
        b_reference_lose = load(p_reference_lose + o_reference, inside, EVEN)
        if MASKED:
            o_mask = offsets(start[:, None], lane, sizes, strides[3], ROWWISE, ALIGN_MASK)
            p_mask = row_start(mask, win, rows[3], ALIGN_MASK)
            b_mask_win = load(p_mask + o_mask, inside, EVEN)
            p_mask = row_start(mask, lose, rows[3], ALIGN_MASK)
            b_mask_lose = load(p_mask + o_mask, inside, EVEN)
        if SIGN != 0:
            b_noise = normals(start, stream, b_seed, SUM_THREADS, VEC)
        b_target_win = _rebuild(b_target_win, b_noise, inside, SIGN, EVEN)
        b_target_lose = _rebuild(b_target_lose, b_noise, inside, SIGN, EVEN)
        gain, own, other, chosen = _sums(
            b_policy_win, b_reference_win, b_target_win, b_mask_win, MASKED
        )
        gain_win += gain
        policy_win += own
        reference_win += other
        selected_win += chosen
        gain, own, other, chosen = _sums(
            b_policy_lose, b_reference_lose, b_target_lose, b_mask_lose, MASKED
        )
        gain_lose += gain
        policy_lose += own
        reference_lose += other
        selected_lose += chosen
    both = tl.join(
        _join_quantities(gain_win, policy_win, reference_win, selected_win, QUANTITIES),
        _join_quantities(gain_lose, policy_lose, reference_lose, selected_lose, QUANTITIES),
    )
    return tl.sum(tl.reshape(both, [SUM_THREADS, QUANTITIES]), 0)


# ---------------------------------------------------------------- kernels


@triton.jit
def _forward_kernel(
    policy, reference, target, mask, seed, reference_error, pair_weight,
    loss, margin, weight, errors, slope, partials, arrived,
    beta, sft_weight, smoothing, stream, batch, chunks, total, layouts,
    FLAGS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Tuples hold one entry per modality; a pair's programs go through its modalities in turn.

    After the partial sums lie their sums per pair, then, for a mean, the pairs' losses.
    """
    MODALITIES: tl.constexpr = len(policy)
    Q: tl.constexpr = OPTIONS[0]
    MEAN: tl.constexpr = OPTIONS[7]
    sums = partials + batch * total * Q
    pair_loss = sums + batch * MODALITIES * Q if MEAN else loss
    i_pair = tl.program_id(0) // total
    i_chunk = tl.program_id(0) % total
    p_partials = partials + i_pair.to(tl.int64) * Q * total + i_chunk
    for i in tl.static_range(MODALITIES):
        if (i_chunk >= 0) & (i_chunk < chunks[i]):
            b_sums = _chunk_sums(
                policy[i], reference[i], target[i], mask[i], seed[i], stream[i], i_pair, i_chunk,
                batch, layouts[i], FLAGS, i, OPTIONS[6], Q,
            )  # fmt: skip
            tl.store(p_partials + tl.arange(0, Q) * total, b_sums)
        i_chunk -= chunks[i]
    tl.debug_barrier()  # thread 0 announces what all threads have stored
    if tl.atomic_add(arrived + i_pair, 1, sem="acq_rel") == total - 1:
        tl.store(arrived + i_pair, 0)  # for the next launch
        p_sums = sums + i_pair * MODALITIES * Q
        add_up(partials, p_sums, i_pair, chunks, total, Q)
        finish_pair(
            p_sums, reference_error, pair_weight, pair_loss, margin, weight, errors, slope, i_pair,
            batch, layouts, beta, sft_weight, smoothing, FLAGS, OPTIONS,
        )  # fmt: skip
        if MEAN:
            tl.debug_barrier()
            if tl.atomic_add(arrived + batch, 1, sem="acq_rel") == batch - 1:
                tl.store(arrived + batch, 0)
                added = tl.zeros([SUM_THREADS], tl.float32)
                for first in range(0, batch, SUM_THREADS):
                    pair = first + tl.arange(0, SUM_THREADS)
                    added += tl.load(pair_loss + pair, pair < batch, 0.0, cache_modifier=".cg")
                tl.store(loss, tl.div_rn(tl.sum(added, 0), batch * 1.0))


@triton.jit
def _backward_kernel(
    grad_loss, slope, policy, target, mask, seed, grad, grad_stride, stream, batch, chunks, total,
    layouts, FLAGS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    i_pair = tl.program_id(0) // total
    i_chunk = tl.program_id(0) % total
    win = pair_row(i_pair, batch, 0, INTERLEAVED)
    lose = pair_row(i_pair, batch, 1, INTERLEAVED)
    b_grad = tl.load(grad_loss + i_pair * grad_stride)
    for i in tl.static_range(len(policy)):
        if (i_chunk >= 0) & (i_chunk < chunks[i]):
            factor_win = b_grad * tl.load(slope + i * 2 * batch + win)
            factor_lose = b_grad * tl.load(slope + i * 2 * batch + lose)
            _chunk_gradient(
                policy[i], target[i], mask[i], grad[i], seed[i], stream[i], factor_win,
                factor_lose, i_pair, win, lose, i_chunk, layouts[i], FLAGS, i,
            )  # fmt: skip
        i_chunk -= chunks[i]


@triton.jit
def _chunk_gradient(
    policy, target, mask, grad, seed, stream, factor_win, factor_lose, i_pair, win, lose, i_chunk,
    layout, FLAGS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    count, sizes, rows, strides = layout
    FIRST: tl.constexpr = M * FLAGS_PER_MODALITY
    VEC: tl.constexpr = FLAGS[FIRST]
    ROWWISE: tl.constexpr = FLAGS[FIRST + 1]
    WIDE: tl.constexpr = FLAGS[FIRST + 2]
    EVEN: tl.constexpr = FLAGS[FIRST + 3]
    SIGN: tl.constexpr = FLAGS[FIRST + 4]
    SHARED: tl.constexpr = FLAGS[FIRST + 5]
    MASKED: tl.constexpr = FLAGS[FIRST + MASKED_FLAG]
    ALIGN_POLICY: tl.constexpr = FLAGS[FIRST + 7]
    ALIGN_TARGET: tl.constexpr = FLAGS[FIRST + 8]
    ALIGN_MASK: tl.constexpr = FLAGS[FIRST + 9]
    ALIGN_GRAD: tl.constexpr = FLAGS[FIRST + 10]

    b_seed = tl.load(seed + i_pair) if SIGN != 0 else 0
    b_noise = tl.zeros([THREADS, VEC], tl.float32)
    p_target_win = row_start(target, i_pair if SHARED else win, rows[1], ALIGN_TARGET)
    p_target_lose = row_start(target, i_pair if SHARED else lose, rows[1], ALIGN_TARGET)
    first = chunk_start(i_chunk, CHUNK, WIDE)
    lane = tl.arange(0, VEC)[None, :]
    for i_block in range(blocks(first, count, CHUNK, THREADS, VEC, EVEN)):
        start = first + i_block * (THREADS * VEC) + tl.arange(0, THREADS) * VEC
        inside = start[:, None] + lane < count
        o_policy = offsets(start[:, None], lane, sizes, strides[0], ROWWISE, ALIGN_POLICY)
        o_target = offsets(start[:, None], lane, sizes, strides[1], ROWWISE, ALIGN_TARGET)
        o_grad = offsets(start[:, None], lane, sizes, strides[3], ROWWISE, ALIGN_GRAD)
        b_policy_win = load(row_start(policy, win, rows[0], ALIGN_POLICY) + o_policy, inside, EVEN)
        b_policy_lose = load(
            row_start(policy, lose, rows[0], ALIGN_POLICY) + o_policy, inside, EVEN
        )
        b_target_win = load(p_target_win + o_target, inside, EVEN)
        b_target_lose = b_target_win if SHARED else load(p_target_lose + o_target, inside, EVEN)
        if SIGN != 0:
            b_noise = normals(start, stream, b_seed, THREADS, VEC)
        b_target_win = _rebuild(b_target_win, b_noise, inside, SIGN, EVEN)
        b_target_lose = _rebuild(b_target_lose, b_noise, inside, SIGN, EVEN)
        b_grad_win = factor_win * (b_policy_win - b_target_win)
        b_grad_lose = factor_lose * (b_policy_lose - b_target_lose)
        if MASKED:
            o_mask = offsets(start[:, None], lane, sizes, strides[2], ROWWISE, ALIGN_MASK)
            b_mask = load(row_start(mask, win, rows[2], ALIGN_MASK) + o_mask, inside, EVEN)
            b_grad_win = tl.where(b_mask != 0.0, b_grad_win * b_mask, 0.0)
            b_mask = load(row_start(mask, lose, rows[2], ALIGN_MASK) + o_mask, inside, EVEN)
            b_grad_lose = tl.where(b_mask != 0.0, b_grad_lose * b_mask, 0.0)
        store(row_start(grad, win, rows[3], ALIGN_GRAD) + o_grad, b_grad_win, inside, EVEN)
        store(row_start(grad, lose, rows[3], ALIGN_GRAD) + o_grad, b_grad_lose, inside, EVEN)


# ---------------------------------------------------------------- launchers


def _fwd(
    policy: Sequence[Tensor],
    reference: Sequence[Tensor],
    target: Sequence[Tensor],
    seed: Sequence[Tensor | None],
    mask: Sequence[Tensor | None],
    reference_error: Tensor | None,
    pair_weight: Tensor | None,
    options,
    *,
    keep_counters: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, margin [M, B], weight [B], errors [2 or 0, M, 2B], slope [M, 2B]; all float32."""
    modalities, rows = len(policy), len(policy[0])
    batch = rows // 2
    # Without a reference the policy stands in; what is summed of it is not used.
    streams = (tuple(policy), tuple(reference or policy), tuple(target), _expanded(mask, policy))
    plan = _forward_plan(
        _memories(*streams), tuple(x is not None for x in mask), reference_error is None,
        pair_weight is not None, options.sft_weight != 0, tuple(options.stream),
        tuple(options.sign), options.objective, options.separate, options.normalize,
        options.interleaved, options.mean, options.stats,
    )  # fmt: skip

    def new(*shape: int) -> Tensor:
        return policy[0].new_empty(shape, dtype=torch.float32)

    loss, margin = new() if options.mean else new(batch), new(modalities, batch)
    weight, slope = new(batch), new(modalities, rows)
    errors, scratch = new(2 if options.stats else 0, modalities, rows), new(plan.scratch)
    seeds = _seeds(seed, policy)
    given = (
        slope if reference_error is None else reference_error.float().contiguous(),
        weight if pair_weight is None else pair_weight.float().contiguous(),
    )
    plan.launch(
        [x for stream in (*streams, seeds, given) for x in stream],
        *streams, seeds, *given, loss, margin, weight, errors, slope, scratch,
        _counters(slope, batch + 1, keep_counters), tuple(options.beta), options.sft_weight,
        options.label_smoothing, *plan.numbers,
    )  # fmt: skip
    return loss, margin, weight, errors, slope


@lru_cache(PLANS)
def _forward_plan(
    memories, masked, has_reference, has_weight, has_sft, stream, sign, objective, separate,
    normalize, interleaved, mean, stats,
) -> Plan:  # fmt: skip
    batch = memories[0][0][0][0] // 2
    layouts = _layouts(memories, sign)
    chunks = tuple(own.chunks(SUM_CHUNK) for own in layouts)
    total = sum(chunks)
    everything = normalize or stats or any(masked)
    quantities = 8 if everything else 4 if has_sft or not has_reference else 2
    mean = mean and batch > 1  # one pair is its own mean
    constants = (
        quantities, has_reference, has_weight, OBJECTIVES.index(objective), separate, normalize,
        interleaved, mean, stats,
    )  # fmt: skip
    plan = Plan(
        _forward_kernel, batch * total, (stream, batch, chunks, total, _plain(layouts)),
        warps=SUM_WARPS, FLAGS=_flags(layouts, SUM_CHUNK, memories, masked, sign),
        OPTIONS=constants,
    )  # fmt: skip
    # Partial sums, their sums per pair, and the pairs' losses.
    plan.scratch = batch * (quantities * (total + len(layouts)) + mean)
    return plan


def _bwd(
    grad: Tensor,
    slope: Tensor,
    policy: Sequence[Tensor],
    target: Sequence[Tensor],
    seed: Sequence[Tensor | None],
    mask: Sequence[Tensor | None],
    options,
) -> list[Tensor]:
    """The gradient of each policy, from that of the loss (scalar, or [B])."""
    grads = [torch.empty_like(p) for p in policy]
    streams = (tuple(policy), tuple(target), _expanded(mask, policy))
    plan = _backward_plan(
        _memories(*streams, grads), tuple(x is not None for x in mask), tuple(options.stream),
        tuple(options.sign), options.interleaved, grad.stride(0) if grad.ndim else 0,
    )  # fmt: skip
    seeds = _seeds(seed, policy)
    plan.launch(
        [grad, slope, *(x for stream in (*streams, seeds) for x in stream)],
        grad, slope, *streams, seeds, tuple(grads), *plan.numbers,
    )  # fmt: skip
    return grads


@lru_cache(PLANS)
def _backward_plan(memories, masked, stream, sign, interleaved, grad_stride) -> Plan:
    batch = memories[0][0][0][0] // 2
    layouts = _layouts(memories, sign)
    chunks = tuple(own.chunks(CHUNK) for own in layouts)
    total = sum(chunks)
    return Plan(
        _backward_kernel, batch * total,
        (grad_stride, stream, batch, chunks, total, _plain(layouts)),
        FLAGS=_flags(layouts, CHUNK, memories, masked, sign), INTERLEAVED=interleaved,
    )  # fmt: skip


_KEPT_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def _counters(like: Tensor, count: int, keep: bool) -> Tensor:
    """Zeros, which a launch leaves as zeros; so those of a stream serve all its launches, one after
    the other. Not where a graph is captured, which may be replayed beside anything."""
    if not (keep and like.is_cuda) or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    place = (like.device, triton.runtime.driver.active.get_current_stream(like.device.index))
    kept = _KEPT_COUNTERS.get(place)
    if kept is None or len(kept) < count:
        kept = torch.zeros(max(count, 1024), dtype=torch.int32, device=like.device)
        _KEPT_COUNTERS[place] = kept
    return kept


def _expanded(mask: Sequence[Tensor | None], policy: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each mask in the shape of its policy, bool as bytes; the policy stands in for none."""
    expanded = []
    for own, p in zip(mask, policy, strict=True):
        if own is not None and own.dtype == torch.bool:
            own = own.view(torch.uint8)
        expanded.append(p if own is None else own.expand_as(p))
    return tuple(expanded)


def _seeds(seed: Sequence[Tensor | None], policy: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(p if s is None else s.contiguous() for s, p in zip(seed, policy, strict=True))


def _memories(*streams: Sequence[Tensor]) -> tuple[tuple[Memory, ...], ...]:
    """Per modality, what a launch depends on of its tensors."""
    return tuple(tuple(map(memory, own)) for own in zip(*streams, strict=True))


def _layouts(memories, sign) -> list[Layout]:
    return [layout(own, ordered=s != 0) for own, s in zip(memories, sign, strict=True)]


def _plain(layouts: Sequence[Layout]) -> tuple:
    return tuple((own.count, own.sizes, own.rows, own.strides) for own in layouts)


def _flags(layouts: Sequence[Layout], size, memories, masked, sign) -> tuple[int, ...]:
    """What is compiled in: FLAGS_PER_MODALITY numbers for each modality."""
    flags = []
    for own, tensors, masks, s in zip(layouts, memories, masked, sign, strict=True):
        rows = tensors[0][0][0]
        shared = any(shape[0] != rows for shape, _, _ in tensors)  # the clean latents, [B, …]
        flags += [own.vec, own.rowwise, own.wide, own.even(size), s, shared, masks, *own.align]
    return tuple(flags)
