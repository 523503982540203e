"""dpo_loss, forward and backward, against eager PyTorch and torch.compile.

    pytest benchmarks/bench_dpo_loss.py

"eager" is the loss as Diffusion-DPO's trainer writes it, "stable" the same with
e(p) − e(r) = mean of (p − r)(p + r − 2y), "compile" is torch.compile of "stable". "loss" goes from
predictions to the policy's gradient; "clean" from clean latents: noise, x_t and target included,
with the predictions standing in for the model. Each way is checked before it is timed.
"""

import pytest
import torch
import torch.nn.functional as F

from syncdpo.ops import Velocity, dpo_loss, paired_noise
from syncdpo.testing import predictions

AUDIO = (126, 128)
VIDEOS = {"short": (6144, 128), "long": (32768, 128)}
if not torch.cuda.is_available():
    VIDEOS = {"small": (384, 128)}
BATCHES = (1, 4) if torch.cuda.is_available() else (1,)
BETA = (500.0, 500.0)
GAP = 0.01


def eager(policy, reference, target):
    inside = 0.0
    for p, r, y, beta in zip(policy, reference, target, BETA, strict=True):
        own = F.mse_loss(p.float(), y.float(), reduction="none").mean(dim=(1, 2))
        with torch.no_grad():
            other = F.mse_loss(r.float(), y.float(), reduction="none").mean(dim=(1, 2))
        (win, lose), (other_win, other_lose) = own.chunk(2), other.chunk(2)
        inside = inside - 0.5 * beta * ((win - lose) - (other_win - other_lose))
    return -F.logsigmoid(inside).mean()


def stable(policy, reference, target):
    inside = 0.0
    for p, r, y, beta in zip(policy, reference, target, BETA, strict=True):
        p, r, y = p.float(), r.float(), y.float()
        win, lose = ((p - r) * (p + r - 2.0 * y)).mean(dim=(1, 2)).chunk(2)
        inside = inside - 0.5 * beta * (win - lose)
    return -F.logsigmoid(inside).mean()


def fused(policy, reference, target):
    return dpo_loss(policy, reference, target, beta=BETA)


def loss_step(loss):
    """From predictions to the gradient."""

    def step(policy, reference, target, *_):
        value = loss(policy, reference, target)
        return value.detach(), torch.autograd.grad(value, policy)

    return step


def clean_step(loss):
    """From clean latents to the gradient, with noise that is stored, as trainers do."""

    def step(policy, reference, _, clean, sigma, seed):
        target, noisy = [], []
        for x in clean:
            noise = torch.randn_like(x[: len(x) // 2])
            noise = torch.cat([noise, noise])
            level = torch.cat([sigma, sigma])[:, None, None].to(x.dtype)
            noisy.append((1 - level) * x + level * noise)
            target.append(noise - x)
        value = loss(policy, reference, target)
        return value.detach(), torch.autograd.grad(value, policy), noisy

    return step


def fused_clean_step(policy, reference, _, clean, sigma, seed):
    win, lose = ([x.chunk(2)[half] for x in clean] for half in (0, 1))
    noisy = paired_noise(win, lose, sigma, seed)
    target = [Velocity(x, seed, stream) for stream, x in enumerate(clean)]
    value = dpo_loss(policy, reference, target, beta=BETA)
    return value.detach(), torch.autograd.grad(value, policy), noisy


WAYS = {"eager": eager, "stable": stable, "compile": stable, "syncdpo": fused}


@pytest.fixture(params=[(b, v) for v in VIDEOS for b in BATCHES], ids=lambda p: f"{p[1]}-B{p[0]}")
def inputs(request, device):
    batch, video = request.param
    shapes = [(2 * batch, *shape) for shape in (VIDEOS[video], AUDIO)]
    tensors = predictions(*shapes, gap=GAP, dtype=torch.bfloat16, device=device)
    clean, _, _ = predictions(*shapes, dtype=torch.bfloat16, device=device, seed=1)
    policy = [p.requires_grad_() for p in tensors[0]]
    sigma = torch.rand(batch, device=device)
    return policy, *tensors[1:], clean, sigma, torch.arange(batch, device=device)


@pytest.mark.parametrize("way", WAYS)
def test_loss(measure, inputs, way):
    torch._dynamo.reset()
    step = loss_step(WAYS[way])
    run = torch.compile(step) if way == "compile" else step
    value, grads = run(*inputs)
    exact, exact_grads = loss_step(stable)(*inputs)
    # The usual difference of two float32 means keeps this many digits at β = 500.
    torch.testing.assert_close(value, exact, rtol=1e-3 if way == "eager" else 1e-5, atol=0)
    for grad, expected in zip(grads, exact_grads, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(grad, expected, rtol=2**-7, atol=2**-8 * scale)
    bytes_of_one = sum(p.numel() * p.element_size() for p in inputs[0])
    # Forward reads three tensors; backward reads two and writes one.
    measure(lambda: run(*inputs), 6 * bytes_of_one, compiled=way == "compile")


@pytest.mark.parametrize("way", WAYS)
def test_clean(measure, inputs, way):
    torch._dynamo.reset()
    step = fused_clean_step if way == "syncdpo" else clean_step(WAYS[way])
    run = torch.compile(step) if way == "compile" else step
    value, grads, noisy = run(*inputs)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in grads)
    assert all(x.shape == p.shape for x, p in zip(noisy, inputs[0], strict=True))
    bytes_of_one = sum(p.numel() * p.element_size() for p in inputs[0])
    # Noising reads clean and writes x_t; then as above, with clean in the place of the target.
    measure(lambda: run(*inputs), 8 * bytes_of_one, compiled=way == "compile")
