"""dpo_loss, forward and backward, against eager PyTorch and torch.compile.

    pytest benchmarks/bench_dpo_loss.py

"eager" is the loss as Diffusion-DPO's trainer writes it, "stable" the same with
e(p) − e(r) = mean of (p − r)(p + r − 2y), "compile" is torch.compile of "stable". "loss" goes from
predictions to the policy's gradient; "clean" from clean latents: noise, x_t and target included,
with the predictions standing in for the model. "pass" is one pass of the op by itself, forward or
backward, with the target given or rebuilt from the clean latents (`Velocity`). Each way is checked
before it is timed. On CUDA: pictures of [8, 32768, 128] with sound ("long-B4"), and one pair of a
5 s clip of LTX-2 ("clip-B1"), which is over before Python has launched it.
"""

import pytest
import torch
import torch.nn.functional as F

from syncdpo.ops import Velocity, _dpo_autograd, dpo_loss, noise, paired_noise
from syncdpo.testing import predictions

AUDIO = (126, 128)
CASES = {"long-B4": (4, (32768, 128)), "clip-B1": (1, (6144, 128))}
if not torch.cuda.is_available():
    CASES = {"small-B1": (1, (384, 128))}
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

    def step(policy, reference, target, *others):
        value = loss(policy, reference, target)
        return value.detach(), torch.autograd.grad(value, policy, others[-1])

    return step


def clean_step(loss):
    """From clean latents to the gradient, with noise that is stored, as trainers do."""

    def step(policy, reference, _, clean, sigma, seed, win, lose, one):
        target, noisy = [], []
        for x in clean:
            noise = torch.randn_like(x[: len(x) // 2])
            noise = torch.cat([noise, noise])
            level = torch.cat([sigma, sigma])[:, None, None].to(x.dtype)
            noisy.append((1 - level) * x + level * noise)
            target.append(noise - x)
        value = loss(policy, reference, target)
        return value.detach(), torch.autograd.grad(value, policy, one), noisy

    return step


def fused_clean_step(policy, reference, _, clean, sigma, seed, win, lose, one):
    noisy = paired_noise(win, lose, sigma, seed)
    target = velocities(clean, seed)
    value = dpo_loss(policy, reference, target, beta=BETA)
    return value.detach(), torch.autograd.grad(value, policy, one), noisy


def velocities(clean, seed):
    return [Velocity(x, seed, stream) for stream, x in enumerate(clean)]


WAYS = {"eager": eager, "stable": stable, "compile": stable, "syncdpo": fused}


@pytest.fixture(scope="module", params=CASES)
def inputs(request, device):
    batch, video = CASES[request.param]
    shapes = [(2 * batch, *shape) for shape in (video, AUDIO)]
    tensors = predictions(*shapes, gap=GAP, dtype=torch.bfloat16, device=device)
    clean, _, _ = predictions(*shapes, dtype=torch.bfloat16, device=device, seed=1)
    policy = [p.requires_grad_() for p in tensors[0]]
    sigma = torch.rand(batch, device=device)
    # Winners and losers, and one for the loss's own gradient, are at hand in a trainer.
    win, lose = ([x.chunk(2)[half] for x in clean] for half in (0, 1))
    seed, one = torch.arange(batch, device=device), torch.ones((), device=device)
    return policy, *tensors[1:], clean, sigma, seed, win, lose, one


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
    ours = way == "syncdpo"
    measure(lambda: run(*inputs), 6 * bytes_of_one, compiled=way == "compile", graph=ours)


@pytest.mark.parametrize("target", ["given", "rebuilt"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pass(measure, inputs, direction, target):
    """Without autograd, whose backward would run on another stream than the one captured."""
    policy, reference, given, clean, _, seed, *_, one = inputs
    rebuilt = target == "rebuilt"
    options = _dpo_autograd.Options(
        beta=list(BETA), stream=[0, 1], sign=[int(rebuilt)] * 2, objective="sigmoid",
        separate=False, normalize=False, sft_weight=0.0, label_smoothing=0.0, interleaved=False,
        mean=True, stats=False, impl="kernel" if torch.cuda.is_available() else "reference",
    )  # fmt: skip
    wanted, seeds = (clean, [seed] * 2) if rebuilt else (given, [None] * 2)
    plain = [p.detach() for p in policy]

    def forward():
        return _dpo_autograd.run_forward(
            plain, reference, wanted, seeds, [None] * 2, None, None, options
        )

    loss, *_, slope = forward()

    def backward():
        return _dpo_autograd.run_backward(one, slope, plain, wanted, seeds, [None] * 2, options)

    truth = targets(clean, seed) if rebuilt else given
    exact, exact_grads = loss_step(stable)(policy, reference, truth, one)
    # A target that is stored has been rounded to bfloat16 once more than one that is rebuilt.
    torch.testing.assert_close(loss, exact, rtol=1e-2 if rebuilt else 1e-5, atol=0)
    for grad, expected in zip(backward(), exact_grads, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(grad, expected, rtol=2**-6, atol=2**-6 * scale)
    bytes_of_one = sum(p.numel() * p.element_size() for p in policy)
    # Forward reads three tensors; backward reads two and writes one.
    measure(forward if direction == "forward" else backward, 3 * bytes_of_one, graph=True)


def targets(clean, seed):
    """ε − x as the other ways store it, of the noise that the op rebuilds."""
    stored = []
    for stream, x in enumerate(clean):
        e = noise(x.chunk(2)[0].shape, seed, stream=stream)
        stored.append((torch.cat([e, e]) - x.float()).to(x.dtype))
    return stored


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
    ours = way == "syncdpo"
    measure(lambda: run(*inputs), 8 * bytes_of_one, compiled=way == "compile", graph=ours)
