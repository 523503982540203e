"""A launch is remembered by shapes, strides, dtypes and alignment, and must fit nothing else."""

from contextlib import nullcontext

import torch

from syncdpo.ops import dpo_loss, noise, paired_noise, warp
from syncdpo.testing import assert_within_budget, predictions, restride

# The second call runs what the first one left; the third, at other addresses, must not.
MEMORY = ("contiguous", "contiguous", "offset", "contiguous", "offset")
# What the approximate instructions may cost a normal whose radius is small; test_paired_noise.py
# says how much exactly. Another launch's noise is wrong by 1.
NOISE = 1e-3
SHAPES = ((4, 33, 16), (4, 9, 8))


def test_the_loss_wherever_its_tensors_lie(impl, device):
    policy, reference, target = predictions(*SHAPES, dtype=torch.bfloat16, device=device)
    exact, exact_grads = loss_and_gradients(policy, reference, target, impl="reference")
    for memory in MEMORY:
        own = [restride(p, memory) for p in policy]
        loss, grads = loss_and_gradients(own, reference, target, impl=impl)
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-6)
        for grad, expected in zip(grads, exact_grads, strict=True):
            assert_within_budget(grad, expected.float(), ulps=2)


def loss_and_gradients(policy, reference, target, **options):
    leaves = [p.detach().requires_grad_() for p in policy]
    loss = dpo_loss(leaves, reference, target, beta=9.0, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)


def test_noise_and_warp_wherever_their_tensors_lie(impl, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, 16, generator=generator).to(device)
    seed = torch.arange(3, device=device)
    sigma = torch.tensor([0.2, 0.5, 0.9], device=device)
    knots = torch.tensor([0.0, 9.5, 31.0], device=device).expand(3, -1)
    noised = paired_noise(x, None, sigma, seed, impl="reference")
    warped = warp(x, knots, impl="reference")
    for memory in MEMORY:
        own = restride(x, memory)
        torch.testing.assert_close(
            paired_noise(own, None, sigma, seed, impl=impl), noised, rtol=0, atol=NOISE
        )
        assert_within_budget(warp(own, knots, impl=impl), warped, ulps=4)


def test_a_stream_number_of_its_own_is_no_other_launch_s(impl, device):
    """Triton compiles 1 and multiples of 16 apart from other numbers."""
    seed = torch.arange(2, device=device)
    for stream in (0, 1, 2, 16, 1, 3):
        expected = noise((2, 100), seed, stream=stream, impl="reference")
        own = noise((2, 100), seed, stream=stream, impl=impl)
        torch.testing.assert_close(own, expected, rtol=0, atol=NOISE)


def test_the_counters_are_left_as_zeros(impl, device):
    """Launches of a stream share them: of any batch, with or without a mean, backward between."""
    for batch in (1, 3, 2, 5, 1):
        shapes = [(2 * batch, *shape[1:]) for shape in SHAPES]
        policy, reference, target = predictions(*shapes, device=device)
        for reduction in ("mean", "none", "mean"):
            loss, _ = loss_and_gradients(policy, reference, target, reduction=reduction, impl=impl)
            options = {"reduction": reduction, "impl": "reference"}
            exact, _ = loss_and_gradients(policy, reference, target, **options)
            torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-6)


def test_streams_beside_each_other_have_counters_of_their_own(impl, device):
    policy, reference, target = predictions((8, 512, 64), (8, 126, 128), device=device)
    exact = dpo_loss(policy, reference, target, beta=9.0, impl=impl)
    on_gpu = device == "cuda"
    streams = [
        torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext() for _ in range(4)
    ]
    if on_gpu:
        torch.cuda.synchronize()
    losses = []
    for _ in range(50 if on_gpu else 1):
        for stream in streams:
            with stream:
                losses.append(dpo_loss(policy, reference, target, beta=9.0, impl=impl))
    if on_gpu:
        torch.cuda.synchronize()
    assert all(torch.equal(loss, exact) for loss in losses)
