"""One pair of the DPO loss, from the partial sums of its chunks to margin, loss and slopes."""

import triton
import triton.language as tl

# What is summed over a sample, for winner and loser each, in the order of the partial sums.
GAIN = tl.constexpr(0)  # (p − r)·(p + r − 2y)
POLICY = tl.constexpr(2)  # (p − y)²
REFERENCE = tl.constexpr(4)  # (r − y)²
SELECTED = tl.constexpr(6)  # the mask
PARTIALS_PER_TILE = tl.constexpr(512)  # of each quantity, read at once when they are added up

OBJECTIVES = ("sigmoid", "hinge", "ipo")
SIGMOID, HINGE = tl.constexpr(0), tl.constexpr(1)
# Constant tuples are flat, numbers only: Triton 3.6 takes no others.
FLAGS_PER_MODALITY = tl.constexpr(11)
MASKED_FLAG = tl.constexpr(6)


@triton.jit
def pair_row(i_pair, batch, half: tl.constexpr, INTERLEAVED: tl.constexpr):
    return 2 * i_pair + half if INTERLEAVED else i_pair + half * batch


@triton.jit
def add_up(partials, sums, i_pair, chunks, total, QUANTITIES: tl.constexpr):
    """Partial sums of every modality of a pair, added in a fixed order → sums [M, QUANTITIES].

    All modalities at once: their loads are under way together, and wait for memory once.
    """
    MODALITIES: tl.constexpr = len(chunks)
    ROWS: tl.constexpr = triton.next_power_of_2(MODALITIES)
    TILE: tl.constexpr = PARTIALS_PER_TILE // ROWS
    m = tl.arange(0, ROWS)[:, None, None]
    quantity = tl.arange(0, QUANTITIES)[None, :, None]
    first, end = tl.zeros_like(m), tl.zeros_like(m)
    border = 0
    for i in tl.static_range(MODALITIES):
        first = tl.where(m == i, border, first)
        border += chunks[i]
        end = tl.where(m == i, border, end)
    p_partials = partials + (i_pair.to(tl.int64) * QUANTITIES + quantity) * total
    added = tl.zeros([ROWS, QUANTITIES, TILE], tl.float32)
    for i_tile in range(0, total, TILE):
        chunk = i_tile + tl.arange(0, TILE)[None, None, :]
        own = (chunk >= first) & (chunk < end)
        added += tl.load(p_partials + chunk, own, 0.0, cache_modifier=".cg")
    p_sums = sums + m * QUANTITIES + quantity
    tl.store(p_sums, tl.sum(added, 2, keep_dims=True), m < MODALITIES)
    tl.debug_barrier()


@triton.jit
def _log1p_exp(x):
    """log(1 + eˣ) and its derivative, without cancellation or overflow."""
    small = tl.exp(-tl.abs(x))
    one = 1.0 + small
    log1p = tl.where(one == 1.0, small, tl.log(one) * tl.div_rn(small, one - 1.0))
    derivative = tl.where(x > 0.0, 1.0, small) / one
    return tl.maximum(x, 0.0) + log1p, derivative


@triton.jit
def _objective(margin, smoothing, OBJECTIVE: tl.constexpr):
    """Value and derivative; NaN where the margin is not finite."""
    if OBJECTIVE == SIGMOID:
        right, right_slope = _log1p_exp(-margin)
        wrong, wrong_slope = _log1p_exp(margin)
        value = (1.0 - smoothing) * right + smoothing * wrong
        slope = smoothing * wrong_slope - (1.0 - smoothing) * right_slope
    elif OBJECTIVE == HINGE:
        value = tl.maximum(1.0 - margin, 0.0)
        slope = tl.where(margin < 1.0, -1.0, 0.0)
    else:
        value = (margin - 0.5) * (margin - 0.5)
        slope = 2.0 * (margin - 0.5)
    finite = tl.abs(margin) < float("inf")
    return tl.where(finite, value, float("nan")), tl.where(finite, slope, float("nan"))


@triton.jit
def _mean(sums, quantity: tl.constexpr, divisor, m, MODALITIES: tl.constexpr, Q: tl.constexpr):
    """The mean of one quantity per modality; 0 where its mask selects nothing."""
    total = tl.load(sums + m * Q + quantity, m < MODALITIES, 0.0)
    return tl.where(divisor > 0.0, tl.div_rn(total, tl.where(divisor > 0.0, divisor, 1.0)), 0.0)


@triton.jit
def _divisors(sums, half: tl.constexpr, layouts, m, FLAGS: tl.constexpr, Q: tl.constexpr):
    """What the means divide by, per modality: the elements, or the sum of the mask."""
    divisor = tl.zeros_like(m).to(tl.float32)
    for i in tl.static_range(len(layouts)):
        if FLAGS[i * FLAGS_PER_MODALITY + MASKED_FLAG]:
            divisor = tl.where(m == i, tl.load(sums + i * Q + SELECTED + half), divisor)
        else:
            divisor = tl.where(m == i, layouts[i][0] * 1.0, divisor)
    return divisor


@triton.jit
def finish_pair(
    sums, reference_error, pair_weight, loss, margin, weight, errors, slope, i_pair, batch,
    layouts, beta, sft_weight, smoothing, FLAGS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Margin, loss and slopes of one pair, on vectors over its modalities; its loss is returned."""
    MODALITIES: tl.constexpr = len(layouts)
    Q: tl.constexpr = OPTIONS[0]
    HAS_REFERENCE: tl.constexpr = OPTIONS[1]
    HAS_WEIGHT: tl.constexpr = OPTIONS[2]
    OBJECTIVE: tl.constexpr = OPTIONS[3]
    SEPARATE: tl.constexpr = OPTIONS[4]
    NORMALIZE: tl.constexpr = OPTIONS[5]
    INTERLEAVED: tl.constexpr = OPTIONS[6]
    MEAN: tl.constexpr = OPTIONS[7]
    STATS: tl.constexpr = OPTIONS[8]
    m = tl.arange(0, triton.next_power_of_2(MODALITIES))
    real = m < MODALITIES
    row_win = m * 2 * batch + pair_row(i_pair, batch, 0, INTERLEAVED)
    row_lose = m * 2 * batch + pair_row(i_pair, batch, 1, INTERLEAVED)
    n_win = _divisors(sums, 0, layouts, m, FLAGS, Q)
    n_lose = _divisors(sums, 1, layouts, m, FLAGS, Q)
    present = real & (n_win > 0.0) & (n_lose > 0.0)

    policy_win, policy_lose = tl.zeros_like(n_win), tl.zeros_like(n_win)
    other_win, other_lose = policy_win, policy_lose
    if Q > 2:
        policy_win = _mean(sums, POLICY, n_win, m, MODALITIES, Q)
        policy_lose = _mean(sums, POLICY + 1, n_lose, m, MODALITIES, Q)
    if HAS_REFERENCE:
        gain_win = _mean(sums, GAIN, n_win, m, MODALITIES, Q)
        gain_lose = _mean(sums, GAIN + 1, n_lose, m, MODALITIES, Q)
        if Q > 4:
            other_win = _mean(sums, REFERENCE, n_win, m, MODALITIES, Q)
            other_lose = _mean(sums, REFERENCE + 1, n_lose, m, MODALITIES, Q)
    else:
        other_win = tl.load(reference_error + row_win, real, 0.0)
        other_lose = tl.load(reference_error + row_lose, real, 0.0)
        gain_win = policy_win - other_win
        gain_lose = policy_lose - other_lose

    b_beta = tl.zeros_like(n_win)
    for i in tl.static_range(MODALITIES):
        b_beta = tl.where(m == i, beta[i], b_beta)
    scale = -0.5 * b_beta
    if NORMALIZE:
        scale = tl.div_rn(scale, 0.5 * (other_win + other_lose))
    scale = tl.where(present, scale, 0.0)
    b_margin = tl.where(present, scale * (gain_win - gain_lose), 0.0)
    any_present = tl.max(present.to(tl.float32), 0)
    logit = b_margin
    counted = present.to(tl.float32)
    if not SEPARATE:
        logit = tl.zeros_like(n_win) + tl.sum(b_margin, 0)
        counted = tl.where(m == 0, any_present, 0.0)
    value, derivative = _objective(logit, smoothing, OBJECTIVE)
    b_weight = tl.load(pair_weight + i_pair) if HAS_WEIGHT else 1.0
    b_loss = tl.sum(b_weight * tl.where(counted > 0.0, value, 0.0), 0)
    b_loss += sft_weight * tl.sum(policy_win, 0)

    preference = tl.where(present, b_weight * derivative * scale, 0.0)
    share = 2.0 / batch if MEAN else 2.0
    slope_win = tl.where(n_win > 0.0, share * (preference + sft_weight) / n_win, 0.0)
    slope_lose = tl.where(n_lose > 0.0, -share * preference / n_lose, 0.0)
    tl.store(slope + row_win, slope_win, real)
    tl.store(slope + row_lose, slope_lose, real)
    tl.store(margin + m * batch + i_pair, b_margin, real)
    tl.store(weight + i_pair, any_present * b_weight)
    if STATS:
        tl.store(errors + row_win, policy_win, real)
        tl.store(errors + row_lose, policy_lose, real)
        tl.store(errors + MODALITIES * 2 * batch + row_win, other_win, real)
        tl.store(errors + MODALITIES * 2 * batch + row_lose, other_lose, real)
    tl.store(loss + i_pair, b_loss)
