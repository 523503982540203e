"""Gaussian noise as a pure function of (seed, stream, element), and the noising of pairs with it.

    ε = BoxMuller(Philox4x32-10(key = seed[b], counter = (i ÷ 4, 0, 0, stream)))[i mod 4]
    x_t = (1 − σ)·x + σ·ε,  the same ε for winner and loser

Philox is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import FLOATS, check_impl, check_tensor, per_modality

LOW_WORD = 0xFFFFFFFF
ELEMENTS_PER_COUNTER = 4
MAX_ELEMENTS = ELEMENTS_PER_COUNTER << 32

# ---------------------------------------------------------------- checks


def check_seed(name: str, seed: object, batch: int, device: torch.device | None = None) -> None:
    check_tensor(name, seed, (torch.int64,), (batch,), device)


def check_stream(name: str, stream: object, count: int = 1) -> None:
    if not isinstance(stream, int) or isinstance(stream, bool):
        raise TypeError(f"{name}: expected an int, got {type(stream).__name__}")
    if not 0 <= stream <= LOW_WORD + 1 - count:
        raise ValueError(f"{name}: expected 0 to {LOW_WORD + 1 - count}, got {stream}")


def check_sample_size(name: str, shape: Sequence[int]) -> None:
    if math.prod(shape[1:]) > MAX_ELEMENTS:
        raise ValueError(f"{name}: expected at most 2**34 elements per sample, got {list(shape)}")


def _check_paired_noise(win, lose, sigma, seed, stream, impl) -> str:
    if not win:
        raise ValueError("win: expected at least one modality, got an empty sequence")
    check_tensor("win[0]", win[0], FLOATS)
    if win[0].ndim == 0:
        raise ValueError("win[0]: expected a batch axis, got a scalar")
    batch, device = win[0].shape[0], win[0].device
    for m, (first, second, level) in enumerate(zip(win, lose, sigma, strict=True)):
        check_tensor(f"win[{m}]", first, FLOATS, device=device)
        if first.ndim == 0 or first.shape[0] != batch:
            raise ValueError(f"win[{m}]: expected a batch of {batch}, got {list(first.shape)}")
        if second is not None:
            check_tensor(f"lose[{m}]", second, (first.dtype,), first.shape, device)
        check_tensor(f"sigma[{m}]", level, (torch.float32,), (batch,), device)
        check_sample_size(f"win[{m}]", first.shape)
    check_seed("seed", seed, batch, device)
    check_stream("stream", stream, len(win))
    return check_impl(impl, device)


# ---------------------------------------------------------------- reference


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 over broadcast int64 tensors that each hold one unsigned 32-bit word.

    A product of two words overflows int64 but keeps its low 64 bits, so both its words are exact.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (odd >> 32 & LOW_WORD) ^ c1 ^ k0
        c2 = (even >> 32 & LOW_WORD) ^ c3 ^ k1
        c1, c3 = odd & LOW_WORD, even & LOW_WORD
        k0, k1 = k0 + 0x9E3779B9 & LOW_WORD, k1 + 0xBB67AE85 & LOW_WORD
    return [c0, c1, c2, c3]


def box_muller(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two 32-bit words, the angle's word taken as signed.

    u = (word + ½)·2⁻³² lies in (0, 1], so the largest normal is √(−2 ln 2⁻³³) = 6.76.
    """
    uniform = radius_bits.float() * 2.0**-32 + 2.0**-33
    radius = (uniform.log() * -2.0).clamp_min(0.0).sqrt()
    signed = torch.where(angle_bits >= 1 << 31, angle_bits - (1 << 32), angle_bits)
    angle = signed.float() * (math.pi * 2.0**-31)
    return radius * angle.cos(), radius * angle.sin()


def noise_reference(shape: Sequence[int], seed: Tensor, stream: int) -> Tensor:
    batch, elements = shape[0], math.prod(shape[1:])
    counters = -(-elements // ELEMENTS_PER_COUNTER)
    index = torch.arange(counters, device=seed.device)
    zero = index.new_zeros(())
    low, high = seed[:, None] & LOW_WORD, seed[:, None] >> 32 & LOW_WORD
    words = philox4x32((index, zero, zero, zero + stream), (low, high))
    normals = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    whole = torch.stack(normals, dim=-1).flatten(1)
    return whole[:, :elements].reshape(batch, *shape[1:]).contiguous()


def _paired_noise_reference(
    win: list[Tensor], lose: list[Tensor | None], sigma: list[Tensor], seed: Tensor, stream: int
) -> list[Tensor]:
    noised = []
    for modality, (first, second, level) in enumerate(zip(win, lose, sigma, strict=True)):
        level = level.reshape(-1, *[1] * (first.ndim - 1))
        scaled = noise_reference(first.shape, seed, stream + modality).mul_(level)
        half = (scaled + (1.0 - level) * first).to(first.dtype)
        other = half if second is None else (scaled + (1.0 - level) * second).to(first.dtype)
        noised.append(torch.cat([half, other]))
    return noised


# ---------------------------------------------------------------- registration


def _kernels():
    """Imported when first asked for: a CPU needs no Triton."""
    from syncdpo.kernels import paired_noise

    return paired_noise


def _noise(shape: Sequence[int], seed: Tensor, stream: int, impl: str) -> Tensor:
    if impl == "kernel":
        return _kernels()._noise(shape, seed.contiguous(), stream)
    return noise_reference(shape, seed, stream)


def _paired_noise(
    win: list[Tensor],
    lose: list[Tensor | None],
    sigma: list[Tensor],
    seed: Tensor,
    stream: int,
    impl: str,
) -> list[Tensor]:
    if impl == "kernel":
        return _kernels()._paired_noise(win, lose, sigma, seed, stream)
    return _paired_noise_reference(win, lose, sigma, seed, stream)


@torch.library.custom_op("syncdpo::noise", mutates_args=())
def _noise_op(shape: Sequence[int], seed: Tensor, stream: int, impl: str) -> Tensor:
    return _noise(shape, seed, stream, impl)


@_noise_op.register_fake
def _(shape, seed, stream, impl):
    return seed.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("syncdpo::paired_noise", mutates_args=())
def _paired_noise_op(
    win: Sequence[Tensor],
    lose: Sequence[Tensor | None],
    sigma: Sequence[Tensor],
    seed: Tensor,
    stream: int,
    impl: str,
) -> list[Tensor]:
    return _paired_noise(list(win), list(lose), list(sigma), seed, stream, impl)


@_paired_noise_op.register_fake
def _(win, lose, sigma, seed, stream, impl):
    return [x.new_empty((2 * x.shape[0], *x.shape[1:])) for x in win]


# ---------------------------------------------------------------- public


def noise(shape: Sequence[int], seed: Tensor, *, stream: int = 0, impl: str = "auto") -> Tensor:
    """ε[b, i] = BoxMuller(Philox4x32-10(key = seed[b], counter = (i ÷ 4, 0, 0, stream)))[i mod 4].

    Salmon et al., SC 2011. i is the element's index within its sample in row-major order; of the
    four words, 0 and 1 give normals 0 and 1, words 2 and 3 give normals 2 and 3. A pure function of
    (seed, stream, element): the same on any device, to the rounding of the transcendentals, and in
    any split of the batch.

    Args:
        shape: [B, …], at most 2³⁴ elements per sample.
        seed: int64 [B]; the low word, then the high word, are the key. Its device is the result's.
        stream: 0 to 2³² − 1; independent noise from the same seeds, one stream per modality.
        impl: "auto" (kernel on CUDA, reference on CPU), "kernel" or "reference".

    Returns:
        float32 [B, …], contiguous.

    Raises:
        TypeError: wrong kind or dtype. ValueError: wrong length, range or device.
    """
    shape = tuple(shape)
    if not shape:
        raise ValueError("shape: expected a batch axis and any others, got ()")
    check_seed("seed", seed, shape[0])
    check_stream("stream", stream)
    check_sample_size("shape", shape)
    impl = check_impl(impl, seed.device)
    if torch.compiler.is_compiling():
        return torch.ops.syncdpo.noise(shape, seed, stream, impl)
    return _noise(shape, seed, stream, impl)


def paired_noise(
    win: Tensor | Sequence[Tensor],
    lose: Tensor | Sequence[Tensor | None] | None,
    sigma: Tensor | Sequence[Tensor],
    seed: Tensor,
    *,
    stream: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """x_t = cat([(1 − σ)·win + σ·ε, (1 − σ)·lose + σ·ε]), with ε of `noise(win.shape, seed)`.

    Rectified-flow noising of preference pairs. Winner and loser share σ and ε, so that they differ
    in nothing but their content (Diffusion-DPO, arXiv 2311.12908; SyncDPO, arXiv 2605.12179). ε is
    generated in the kernel and never stored; `Velocity` rebuilds the target from the same seeds.
    Computed in float32, rounded once to the input's dtype. Not differentiable.

    Args:
        win: [B, …], or a sequence with one tensor per modality; float32, float16 or bfloat16.
        lose: like `win`. None, whole or for one modality: the loser equals the winner there.
        sigma: float32 [B], or a sequence with one per modality; 0 is clean, 1 is noise.
        seed: int64 [B].
        stream: modality m takes its noise from stream + m.
        impl: "auto" (kernel on CUDA, reference on CPU), "kernel" or "reference".

    Returns:
        [2B, …] in the dtype of `win`, winners first; a tuple where `win` is a sequence.

    Raises:
        TypeError: wrong kind or dtype. ValueError: wrong shape, length or device.
    """
    single = isinstance(win, Tensor)
    win = [win] if single else list(win)
    count = len(win)
    lose = [None] * count if lose is None else per_modality("lose", lose, count)
    sigma = [sigma] * count if isinstance(sigma, Tensor) else per_modality("sigma", sigma, count)
    impl = _check_paired_noise(win, lose, sigma, seed, stream, impl)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            noised = torch.ops.syncdpo.paired_noise(win, lose, sigma, seed, stream, impl)
        else:
            noised = _paired_noise(win, lose, sigma, seed, stream, impl)
    return noised[0] if single else tuple(noised)
