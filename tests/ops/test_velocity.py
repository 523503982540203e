"""`Velocity`: rebuilt targets equal stored ones, and no memory goes into them."""

import weakref

import pytest
import torch
from oracles import loss_and_gradient
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from syncdpo.ops import Velocity, dpo_loss, noise, paired_noise
from syncdpo.testing import LAYOUTS, predictions, restride

SHAPES = ((4, 3, 5), (4, 7))


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("strides", LAYOUTS)
def test_rebuilt_targets_equal_materialised_ones(impl, device, layout, sign, shared, strides):
    policy, reference, target = predictions(*SHAPES, device=device)
    seed = torch.tensor([-3, 2**40 + 1], device=device)
    clean = torch.randn(2 if shared else 4, 3, 5, device=device)

    def pairs(x):
        return x.repeat_interleave(2, 0) if layout == "interleaved" else torch.cat([x, x])

    e = noise((2, 3, 5), seed, stream=7, impl=impl)
    target[0] = sign * (pairs(e) - (pairs(clean) if shared else clean))
    rebuilt = [Velocity(restride(clean, strides), seed, stream=7, sign=sign), target[1]]
    options = {"beta": [1.0, 2.0], "layout": layout, "sft_weight": 0.3, "impl": impl}
    expected = loss_and_gradient(dpo_loss, policy, reference, target, **options)
    actual = loss_and_gradient(dpo_loss, policy, reference, rebuilt, **options)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
    for a, b in zip(actual[1], expected[1], strict=True):
        assert ((a - b).abs() <= 1e-5 * b.abs().max()).all()


def test_velocity_undoes_paired_noise(impl, device):
    """x_t − σ·v is the clean sample: the loss of that perfect velocity is only rounding."""
    seed = torch.tensor([1, 2], device=device)
    win, lose = torch.randn(2, 2, 33, device=device)
    sigma = torch.tensor([0.25, 0.75], device=device)
    noisy = paired_noise(win, lose, sigma, seed, stream=1, impl=impl)
    clean = torch.cat([win, lose])
    velocity = (noisy - clean) / sigma.repeat(2)[:, None]
    _, stats = dpo_loss(velocity, clean, Velocity(clean, seed, stream=1), beta=1.0,
                        return_stats=True, impl=impl)  # fmt: skip
    assert stats.policy_win.max() < 1e-11
    assert stats.policy_lose.max() < 1e-11


# ---------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at once, in memory other than the inputs'."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.made, self.peak = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.made = [x for x in self.made if x() is not None]
        storages = [x().untyped_storage() for x in self.made]
        sizes = {x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in self.inputs}
        self.peak = max(self.peak, sum(sizes.values()))
        return result


def peak_of(step, inputs):
    """What the step returns, and the most bytes that it held beyond its inputs."""
    if not inputs[0].is_cuda:
        with LiveBytes(inputs) as live:
            results = step()
        return results, live.peak
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    return results, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("impl", [pytest.param("kernel", marks=pytest.mark.kernel)], indirect=True)
@pytest.mark.parametrize("options", [{}, {"sft_weight": 0.1, "return_stats": True}])
def test_from_clean_latents_to_gradient_only_x_t_and_the_gradient_take_memory(
    impl, device, options
):
    shapes = ((4, 512, 8), (4, 126, 8)) if device == "cpu" else ((8, 8192, 128), (8, 126, 128))
    policy, reference, clean = predictions(*shapes, dtype=torch.bfloat16, device=device)
    policy = [p.requires_grad_() for p in policy]
    batch = len(clean[0]) // 2
    seed, sigma = torch.arange(batch, device=device), torch.rand(batch, device=device)

    def step():
        halves = [[x.chunk(2)[half] for x in clean] for half in (0, 1)]
        noisy = paired_noise(*halves, sigma, seed, impl=impl)
        target = [Velocity(x, seed, stream) for stream, x in enumerate(clean)]
        loss = dpo_loss(policy, reference, target, beta=[9.0, 9.0], impl=impl, **options)
        loss = loss[0] if "return_stats" in options else loss
        return [*noisy, *torch.autograd.grad(loss, policy)]

    results, peak = peak_of(step, [*policy, *reference, *clean, seed, sigma])
    least = sum(x.nbytes for x in results)
    assert least <= peak <= 1.05 * least, f"{peak} bytes at the peak, {least} in the results"
