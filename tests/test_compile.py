"""`dpo_loss` under torch.compile: every subset of what may be left out."""

from itertools import product

import pytest
import torch

from syncdpo.ops import Velocity, dpo_loss
from syncdpo.testing import predictions

SHAPES = ((4, 3, 5), (4, 7))
# rebuilt targets (video, audio), masks (video, audio), reference_error, pair_weight
SUBSETS = list(product((False, True), repeat=6))
# Inductor takes seconds for each: nothing, everything, and each modality the odd one out.
FEW = [SUBSETS[0], SUBSETS[-1], (1, 0, 0, 1, 0, 1), (0, 1, 1, 0, 1, 0)]


def name_of(subset):
    names = ("V0", "V1", "M0", "M1", "error", "weight")
    return "-".join(name for name, given in zip(names, subset, strict=True) if given) or "none"


def arguments(subset, device):
    *parts, precomputed, weighted = subset
    policy, reference, target = predictions(*SHAPES, device=device)
    masks = [torch.ones(4, 1, 5, device=device), torch.arange(7, device=device) > 2]
    masks = [mask if given else None for mask, given in zip(masks, parts[2:], strict=True)]
    options = {"mask": masks}
    if precomputed:
        pairs = zip(reference, target, strict=True)
        errors = [(r - y).square().flatten(1).mean(1) for r, y in pairs]
        reference, options["reference_error"] = None, torch.stack(errors)
    if weighted:
        options["pair_weight"] = torch.tensor([0.5, 2.0], device=device)
    seed = torch.arange(2, device=device)
    target = [
        Velocity(y, seed, stream=m) if given else y
        for m, (y, given) in enumerate(zip(target, parts[:2], strict=True))
    ]
    return policy, reference, target, options


def step(policy, reference, target, beta, sft_weight, options):
    """A step's loss from what a model gave: the policy is computed in the same graph."""
    loss, stats = dpo_loss(
        [p * 1.5 for p in policy], reference, target, beta=beta, sft_weight=sft_weight,
        return_stats=True, **options,
    )  # fmt: skip
    return loss, stats.implicit_accuracy


def outcome(function, policy, *args):
    policy = [p.detach().requires_grad_() for p in policy]
    loss, accuracy = function(policy, *args)
    loss.backward()
    return [loss.detach(), accuracy, *(p.grad for p in policy)]


def assert_compiles(subset, backend, device):
    torch._dynamo.reset()
    policy, reference, target, options = arguments(subset, device)
    rest = (reference, target, (2.0, 3.0), 0.1, options)
    expected = outcome(step, policy, *rest)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(outcome(compiled, policy, *rest), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("subset", SUBSETS, ids=name_of)
def test_every_subset_compiles_forward_and_backward(device, backend, subset):
    assert_compiles(subset, backend, device)


@pytest.mark.parametrize("subset", FEW, ids=name_of)
def test_some_subsets_compile_with_inductor(device, subset):
    assert_compiles(subset, "inductor", device)


def test_one_modality_that_is_no_list_compiles(device):
    torch._dynamo.reset()
    p, r, y = (x[0] for x in predictions(SHAPES[0], device=device))
    expected = dpo_loss(p, r, Velocity(y, torch.arange(2, device=device)), beta=2.0)
    compiled = torch.compile(dpo_loss, backend="aot_eager", fullgraph=True)
    actual = compiled(p, r, Velocity(y, torch.arange(2, device=device)), beta=2.0)
    torch.testing.assert_close(actual, expected)
