"""The DPO loss forward and backward, one launch each; see syncdpo/ops/dpo_loss.py.

Forward: a program sums one chunk of one pair and modality. The last program of a pair adds up the
pair's chunks, in a fixed order, and works out its margin, its loss and the slopes that the backward
needs; the last pair adds up the losses. Backward: a program writes one chunk of the gradient.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    NUM_WARPS,
    THREADS,
    Layout,
    blocks,
    chunk_start,
    layout,
    load,
    normals,
    offsets,
    row_start,
    store,
)
from ._dpo_pair import FLAGS_PER_MODALITY, MASKED_FLAG, OBJECTIVES, add_up, finish_pair, pair_row

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
    """The four sums over each thread's vector, [THREADS]."""
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
    """[THREADS, …] with QUANTITIES / 2 per thread in the order above; none leaves its thread."""
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
    b_mask_win = tl.zeros([THREADS, VEC], tl.float32)
    b_mask_lose = b_mask_win
    b_noise = b_mask_win
    b_seed = tl.load(seed + i_pair) if SIGN != 0 else 0
    zero = tl.zeros([THREADS], tl.float32)
    gain_win, policy_win, reference_win, selected_win = zero, zero, zero, zero
    gain_lose, policy_lose, reference_lose, selected_lose = zero, zero, zero, zero

    first = chunk_start(i_chunk, WIDE)
    lane = tl.arange(0, VEC)[None, :]
    for i_block in range(blocks(first, count, VEC, EVEN)):
        start = first + i_block * (THREADS * VEC) + tl.arange(0, THREADS) * VEC
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
            b_noise = normals(start, stream, b_seed, VEC)
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
    return tl.sum(tl.reshape(both, [THREADS, QUANTITIES]), 0)


# ---------------------------------------------------------------- kernels


@triton.jit
def _forward_kernel(
    policy, reference, target, mask, seed, reference_error, pair_weight,
    loss, margin, weight, errors, slope, partials, sums, pair_loss, arrived,
    beta, stream, batch, chunks, total, layouts, sft_weight, smoothing,
    FLAGS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Tuples hold one entry per modality; a pair's programs go through its modalities in turn."""
    MODALITIES: tl.constexpr = len(policy)
    Q: tl.constexpr = OPTIONS[0]
    MEAN: tl.constexpr = OPTIONS[7]
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
        p_sums = sums + i_pair * MODALITIES * Q
        add_up(partials, p_sums, i_pair, chunks, total, Q)
        finish_pair(
            p_sums, reference_error, pair_weight, pair_loss, margin, weight, errors, slope, i_pair,
            batch, layouts, beta, sft_weight, smoothing, FLAGS, OPTIONS,
        )  # fmt: skip
        if MEAN:
            tl.debug_barrier()
            if tl.atomic_add(arrived + batch, 1, sem="acq_rel") == batch - 1:
                added = tl.zeros([THREADS], tl.float32)
                for first in range(0, batch, THREADS):
                    pair = first + tl.arange(0, THREADS)
                    added += tl.load(pair_loss + pair, pair < batch, 0.0, cache_modifier=".cg")
                tl.store(loss, tl.div_rn(tl.sum(added, 0), batch * 1.0))


@triton.jit
def _backward_kernel(
    grad_loss, grad_stride, slope, policy, target, mask, seed, grad, stream, batch, chunks, total,
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
    first = chunk_start(i_chunk, WIDE)
    lane = tl.arange(0, VEC)[None, :]
    for i_block in range(blocks(first, count, VEC, EVEN)):
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
            b_noise = normals(start, stream, b_seed, VEC)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, margin [M, B], weight [B], errors [2 or 0, M, 2B], slope [M, 2B]; all float32."""
    modalities, rows = len(policy), len(policy[0])
    batch = rows // 2
    # Without a reference the policy stands in; what is summed of it is not used.
    reference = list(reference) or list(policy)
    masks = _expanded(mask, policy)
    layouts = [
        layout(list(tensors), ordered=sign != 0)
        for *tensors, sign in zip(policy, reference, target, masks, options.sign, strict=True)
    ]
    total = sum(own.chunks for own in layouts)
    everything = options.normalize or options.stats or any(x is not None for x in mask)
    quantities = 8 if everything else 4 if options.sft_weight or reference_error is not None else 2

    def new(*shape: int) -> Tensor:
        return policy[0].new_empty(shape, dtype=torch.float32)

    loss, margin = new() if options.mean else new(batch), new(modalities, batch)
    weight, slope = new(batch), new(modalities, rows)
    errors = new(2 if options.stats else 0, modalities, rows)
    partials, sums = new(batch * quantities * total), new(batch * modalities * quantities)
    pair_loss = new(batch) if options.mean else loss
    arrived = torch.zeros(batch + 1, dtype=torch.int32, device=loss.device)
    errors_given = slope if reference_error is None else reference_error.float().contiguous()
    weights_given = weight if pair_weight is None else pair_weight.float().contiguous()
    constants = (
        quantities, reference_error is None, pair_weight is not None,
        OBJECTIVES.index(options.objective), options.separate, options.normalize,
        options.interleaved, options.mean, options.stats,
    )  # fmt: skip
    with torch.cuda.device_of(slope):
        _forward_kernel[(batch * total,)](
            tuple(policy), tuple(reference), tuple(target), masks, _seeds(seed, policy),
            errors_given, weights_given,
            loss, margin, weight, errors, slope, partials, sums, pair_loss, arrived,
            tuple(options.beta), tuple(options.stream), batch,
            tuple(own.chunks for own in layouts), total, _plain(layouts),
            options.sft_weight, options.label_smoothing,
            FLAGS=_flags(layouts, target, seed, mask, options), OPTIONS=constants,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, margin, weight, errors, slope


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
    batch = len(policy[0]) // 2
    masks = _expanded(mask, policy)
    grads = [torch.empty_like(p) for p in policy]
    layouts = [
        layout(list(tensors), ordered=sign != 0)
        for *tensors, sign in zip(policy, target, masks, grads, options.sign, strict=True)
    ]
    total = sum(own.chunks for own in layouts)
    with torch.cuda.device_of(slope):
        _backward_kernel[(batch * total,)](
            grad, grad.stride(0) if grad.ndim else 0, slope, tuple(policy), tuple(target), masks,
            _seeds(seed, policy), tuple(grads), tuple(options.stream), batch,
            tuple(own.chunks for own in layouts), total, _plain(layouts),
            FLAGS=_flags(layouts, target, seed, mask, options), INTERLEAVED=options.interleaved,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return grads


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


def _plain(layouts: Sequence[Layout]) -> tuple:
    return tuple((own.count, own.sizes, own.rows, own.strides) for own in layouts)


def _flags(layouts: Sequence[Layout], target, seed, mask, options) -> tuple[int, ...]:
    """What is compiled in: FLAGS_PER_MODALITY numbers for each modality."""
    flags = []
    for own, sign, y, s, k in zip(layouts, options.sign, target, seed, mask, strict=True):
        shared = s is not None and len(y) == len(s)
        flags += [own.vec, own.rowwise, own.wide, own.even, sign, shared, k is not None, *own.align]
    return tuple(flags)
