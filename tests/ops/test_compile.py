"""`dpo_loss` under torch.compile: every subset of what may be left out, and β that changes."""

from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

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


# ---------------------------------------------------------------- numbers that change


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_schedule_of_beta_and_sft_weight_compiles_once_more_and_never_again(device, backend):
    """The compiler takes a float for a constant until it changes; from then on it is an input."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    policy, reference, target, options = arguments(SUBSETS[-1], device)
    for i in range(12):
        rest = (reference, target, (1.0 + i, 10 * i + 1), i / 8, options)
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            actual = outcome(compiled, policy, *rest)
        torch.testing.assert_close(actual, outcome(step, policy, *rest))
    assert counter.frame_count == 2


class Schedule:
    """β as trainers hold it: an attribute that each step sets."""

    beta = 1.0


def test_a_beta_that_is_an_attribute_compiles_once_more_and_never_again(device):
    torch._dynamo.reset()
    schedule = Schedule()
    policy, reference, target = predictions(*SHAPES, device=device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(policy):
        return dpo_loss(policy, reference, target, beta=schedule.beta)

    for i in range(12):
        schedule.beta = 1.0 + i / 3
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            actual = loss_of(policy)
        expected = dpo_loss(policy, reference, target, beta=schedule.beta)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dynamic", [None, False])
def test_numbers_in_tensors_on_the_cpu_never_compile_again(device, dynamic):
    """With dynamic=False every float is a constant; a tensor is an input from the start."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    policy, reference, target, options = arguments(SUBSETS[0], device)
    for i in range(4):
        beta, sft_weight = (1.0 + i, 10.0 * i), i / 8
        in_tensors = (torch.tensor(beta), torch.tensor(sft_weight))
        actual = outcome(compiled, policy, reference, target, *in_tensors, options)
        expected = outcome(step, policy, reference, target, beta, sft_weight, options)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_cuda_graphs_are_told_to_leave_the_op_out():
    """It reads β on the host: recorded, it would replay the first one for ever."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.syncdpo.dpo_loss.default.tags


def test_cuda_graphs_do_not_replay_an_old_beta(device):
    if device != "cuda":
        pytest.skip("needs a GPU: CUDA graphs")
    torch._dynamo.reset()
    policy, reference, target, options = arguments(SUBSETS[0], device)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for i in range(8):
        rest = (reference, target, 1.0 + i, 0.1, options)
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(policy, *rest)[0].clone()
        torch.testing.assert_close(loss, step(policy, *rest)[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss_refuses_the_same_numbers(device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    policy, reference, target, options = arguments(SUBSETS[0], device)
    for beta, sft_weight, name in ((-1.0, 0.0, "beta"), (2.0, -0.5, "sft_weight")):
        with pytest.raises(ValueError, match=rf"{name}: expected a finite number, 0 or more"):
            compiled(policy, reference, target, beta, sft_weight, options)


# ---------------------------------------------------------------- second derivatives


def registered(policy, reference, target, beta):
    """The registered op without a compiler."""
    seed, scales = [None], (torch.tensor([beta]), torch.tensor([0.0]))
    options = ([0], [0], "sigmoid", False, False, 0.0, False, True, False, "reference")
    return torch.ops.syncdpo.dpo_loss(
        [policy], [reference], [target], seed, [None], None, None, *scales, *options
    )[0]


def eager(policy, reference, target, beta):
    return dpo_loss(policy, reference, target, beta=beta)


def compiled_eager(*args):
    torch._dynamo.reset()
    return torch.compile(eager, backend="eager", fullgraph=True)(*args)


@pytest.mark.parametrize("loss_of", [eager, registered, compiled_eager])
def test_a_second_derivative_raises(loss_of):
    policy, reference, target = (x[0] for x in predictions(SHAPES[0]))
    policy.requires_grad_()
    (first,) = torch.autograd.grad(loss_of(policy, reference, target, 2.0), policy)
    loss = loss_of(policy, reference, target, 2.0)
    (grad,) = torch.autograd.grad(loss, policy, create_graph=True)
    assert torch.equal(grad, first)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_a_second_derivative_by_the_chain_rule_raises(impl, device):
    """The loss's own gradient is no constant here: that of a function of the loss."""
    policy, reference, target = (x[0] for x in predictions(SHAPES[0], device=device))
    policy.requires_grad_()
    loss = dpo_loss(policy, reference, target, beta=2.0, impl=impl)
    (grad,) = torch.autograd.grad(loss.square(), policy, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), policy)


def test_a_second_derivative_raises_under_aot(device):
    torch._dynamo.reset()
    policy, reference, target = (x[0] for x in predictions(SHAPES[0], device=device))
    policy.requires_grad_()
    loss = torch.compile(eager, backend="aot_eager")(policy, reference, target, 2.0)
    (grad,) = torch.autograd.grad(loss, policy, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
