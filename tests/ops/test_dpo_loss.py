import math

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_matches_oracle, dpo_oracle, loss_and_gradient, to_double

from syncdpo.ops import Velocity, dpo_loss
from syncdpo.testing import predictions

SHAPES = ((4, 3, 5), (4, 7))

# ---------------------------------------------------------------- every option against the truth

MASK = (torch.arange(20).reshape(4, 5) % 3 > 0).float()[:, None] * 0.7
OPTIONS = {
    "plain": {},
    "separate": {"logistic": "separate", "sft_weight": 0.1},
    "normalize": {"normalize": "reference", "logistic": "separate"},
    "hinge": {"objective": "hinge"},
    "ipo": {"objective": "ipo", "normalize": "reference"},
    "smoothing": {"label_smoothing": 0.2, "reduction": "none"},
    "interleaved": {"layout": "interleaved", "reduction": "none", "sft_weight": 0.5},
    "weight": {"pair_weight": torch.tensor([0.0, 2.5]), "reduction": "none", "sft_weight": 1.0},
    "mask": {"mask": [MASK, None], "sft_weight": 1.0, "normalize": "reference"},
    "mask_bool": {"mask": [MASK > 0, torch.arange(7) > 3], "layout": "interleaved"},
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_option_matches_the_oracle(impl, device, option, dtype):
    options = {
        name: [x if x is None else x.to(device) for x in value]
        if name == "mask"
        else value.to(device)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in OPTIONS[option].items()
    }
    inputs = predictions(*SHAPES, dtype=dtype, device=device)
    assert_matches_oracle(impl, *inputs, beta=[2.0, 0.5], **options)


@pytest.mark.parametrize("gap", [1e-4, 1e-2])
@pytest.mark.parametrize("beta", [5.0, 5000.0])
def test_keeps_its_digits_where_policy_and_reference_agree(impl, device, gap, beta):
    inputs = predictions((6, 16, 32), gap=gap, device=device)
    loss, _ = loss_and_gradient(dpo_loss, *inputs, beta=beta, impl=impl)
    exact, _ = loss_and_gradient(dpo_oracle, *map(to_double, inputs), beta=beta)
    assert abs(loss - exact) <= 1e-6 * exact


def test_a_policy_that_equals_its_reference_gives_log_two(impl, device):
    policy, _, target = predictions((4, 9), device=device)
    loss, (grad,) = loss_and_gradient(dpo_loss, policy, policy, target, beta=3000.0, impl=impl)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-7)
    assert grad.abs().max() > 0


def test_many_chunks_and_mixed_dtypes(impl, device):
    """Several chunks per sample, full and not; each modality and each tensor of its own dtype."""
    policy, reference, target = predictions((2, 9001), (2, 8192), (2, 2, 2100), device=device)
    policy[0], target[1] = policy[0].bfloat16(), target[1].half()
    reference[2] = reference[2].bfloat16()
    assert_matches_oracle(impl, policy, reference, target, beta=[1.0, 2.0, 3.0], sft_weight=0.1)


def test_gradcheck():
    inputs = predictions(*SHAPES)
    policy, reference, target = (to_double(tensors) for tensors in inputs)
    for p in policy:
        p.requires_grad_()
    for options in OPTIONS.values():
        assert torch.autograd.gradcheck(
            lambda *p, o=options: dpo_loss(p, reference, target, beta=[2.0, 0.5], **o), policy
        )


def test_one_beta_serves_every_modality(impl, device):
    inputs = predictions(*SHAPES, device=device)
    one = dpo_loss(*inputs, beta=3.0, impl=impl)
    assert torch.equal(one, dpo_loss(*inputs, beta=[3.0, 3.0], impl=impl))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_asks_gets_a_gradient(impl, device, wanted):
    policy, reference, target = predictions(*SHAPES, device=device)
    _, everything = loss_and_gradient(dpo_loss, policy, reference, target, beta=[1, 2], impl=impl)
    policy = [p.requires_grad_(w) for p, w in zip(policy, wanted, strict=True)]
    loss = dpo_loss(policy, reference, target, beta=[1, 2], impl=impl)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for p, grad, w in zip(policy, everything, wanted, strict=True):
        assert torch.equal(p.grad, grad) if w else p.grad is None


def test_the_same_bits_on_every_run(impl, device):
    inputs = predictions((4, 3000), (4, 700), dtype=torch.bfloat16, device=device)
    runs = [loss_and_gradient(dpo_loss, *inputs, beta=[9, 9], impl=impl) for _ in range(3)]
    for loss, grads in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1], strict=True))


# ---------------------------------------------------------------- the formulas of the trainers


def diffusion_dpo(policy, reference, target, beta):
    own = (policy - target).pow(2).mean(dim=[1, 2])
    other = (reference - target).pow(2).mean(dim=[1, 2])
    (own_win, own_lose), (other_win, other_lose) = own.chunk(2), other.chunk(2)
    return -0.5 * beta * ((own_win - own_lose) - (other_win - other_lose))


@pytest.fixture
def trained(device):
    """One modality, in which policy and reference are close enough for any β."""
    return [x[0] for x in predictions((6, 4, 8), gap=1e-3, device=device)]


def test_equals_diffusion_dpo(impl, trained):
    expected = -F.logsigmoid(diffusion_dpo(*[x.double() for x in trained], 5000)).mean()
    actual = dpo_loss(*trained, beta=5000, impl=impl)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", ["sigmoid", "hinge", "ipo"])
def test_equals_the_form_without_the_half_at_twice_the_beta(impl, trained, objective):
    beta = 5.0
    ratio = diffusion_dpo(*[x.double() for x in trained], 2.0)
    expected = {
        "sigmoid": -F.logsigmoid(beta * ratio),
        "hinge": torch.relu(1 - beta * ratio),
        "ipo": beta**2 * (ratio - 1 / (2 * beta)) ** 2,
    }[objective].mean()
    actual = dpo_loss(*trained, beta=2 * beta, objective=objective, impl=impl)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_equals_av_dpo(impl, device):
    policy, reference, target = predictions((4, 3, 5), (4, 7, 2), gap=1e-3, device=device)
    expected = 0.0
    for p, r, y, beta in zip(policy, reference, target, (3000, 1000), strict=True):
        p, r, y = p.double(), r.double(), y.double()
        winner = (p - y).square().mean((1, 2)).chunk(2)[0]
        expected += (-F.logsigmoid(diffusion_dpo(p, r, y, beta)) + 0.1 * winner).mean()
    actual = dpo_loss(policy, reference, target, beta=(3000, 1000), logistic="separate",
                      sft_weight=0.1, impl=impl)  # fmt: skip
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_interleaved_pairs_equal_halves(impl, device):
    policy, reference, target = predictions((6, 4, 8), device=device)
    order = torch.tensor([0, 3, 1, 4, 2, 5], device=device)
    mixed = [x[0][order] for x in (policy, reference, target)]
    halves = dpo_loss(policy, reference, target, beta=3.0, reduction="none", impl=impl)
    other = dpo_loss(*mixed, beta=3.0, layout="interleaved", reduction="none", impl=impl)
    torch.testing.assert_close(other, halves, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [None, "reference"])
def test_precomputed_reference_errors(impl, device, normalize):
    policy, reference, target = predictions(*SHAPES, device=device)
    errors = [(r - y).square().flatten(1).mean(1) for r, y in zip(reference, target, strict=True)]
    options = {"beta": [1.0, 2.0], "normalize": normalize, "sft_weight": 0.2}
    expected = loss_and_gradient(
        dpo_oracle, *map(to_double, (policy, reference, target)), **options
    )
    both = {"reference_error": torch.stack(errors), "impl": impl}
    loss, grads = loss_and_gradient(dpo_loss, policy, None, target, **both, **options)
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-6, atol=0)
    for grad, exact in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)
    one = dpo_loss(policy[0], None, target[0], beta=1.0, reference_error=errors[0], impl=impl)
    exact = dpo_oracle(*(to_double(x[:1]) for x in (policy, reference, target)), beta=1.0)
    torch.testing.assert_close(one.double(), exact, rtol=2e-6, atol=0)


# ---------------------------------------------------------------- statistics, masks, infinities


def test_stats_are_the_pass_seen_from_inside(impl, device):
    policy, reference, target = predictions(*SHAPES, device=device)
    weight = torch.tensor([1.0, 0.0], device=device)
    policy[0].requires_grad_()
    options = {"beta": [1.0, 2.0], "pair_weight": weight, "impl": impl}
    loss, stats = dpo_loss(policy, reference, target, return_stats=True, **options)
    assert torch.equal(loss, dpo_loss(policy, reference, target, **options))
    assert not any(x.requires_grad for x in stats)
    for m, (p, r, y) in enumerate(zip(policy, reference, target, strict=True)):
        own, other = (((x - y).double() ** 2).flatten(1).mean(1).detach() for x in (p, r))
        halves = (*own.chunk(2), *other.chunk(2))
        for value, exact in zip(stats[2:], halves, strict=True):
            torch.testing.assert_close(value[m].double(), exact, rtol=1e-6, atol=0)
        gap = (halves[0] - halves[1]) - (halves[2] - halves[3])
        torch.testing.assert_close(stats.margin[m].double(), -0.5 * (m + 1) * gap,
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
    assert torch.equal(stats.weight, weight)
    assert stats.implicit_accuracy == (stats.margin.sum(0)[0] > 0).float()
    assert torch.equal(stats.modality_accuracy, (stats.margin[:, 0] > 0).float())


def test_a_margin_of_zero_counts_half(impl, device):
    policy, _, target = predictions((4, 6), device=device)
    _, stats = dpo_loss(policy, policy, target, beta=1.0, return_stats=True, impl=impl)
    assert stats.implicit_accuracy == 0.5


@pytest.mark.parametrize("logistic", ["joint", "separate"])
@pytest.mark.parametrize("normalize", [None, "reference"])
def test_masks_that_select_nothing_weigh_nothing(impl, device, logistic, normalize):
    policy, reference, target = predictions(*SHAPES, device=device)
    mask = [torch.ones(4, 1, 1, device=device), torch.ones(4, 1, device=device)]
    mask[0][0] = mask[0][3] = mask[1][1] = 0  # video gone from both pairs, audio from the second
    policy[0][0] = torch.nan
    options = {"beta": [1.0, 2.0], "mask": mask, "logistic": logistic, "normalize": normalize}
    policy = [p.requires_grad_() for p in policy]
    loss, stats = dpo_loss(
        policy, reference, target, return_stats=True, reduction="none", impl=impl, **options
    )
    loss.sum().backward()
    assert torch.equal(stats.weight.cpu(), torch.tensor([1.0, 0.0]))
    assert stats.policy_win[0, 0] == 0
    assert loss[1] == 0
    audio = [x[1][[0, 2]].detach() for x in (policy, reference, target)]
    alone = dpo_loss(*audio, beta=2.0, normalize=normalize, impl=impl)
    torch.testing.assert_close(loss[0], alone, rtol=1e-6, atol=0)
    assert (policy[0].grad == 0).all()
    assert (policy[1].grad[[1, 3]] == 0).all()
    assert (policy[1].grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("objective", ["sigmoid", "hinge", "ipo"])
def test_a_policy_that_is_not_finite_never_gives_a_number(impl, device, value, row, objective):
    policy, reference, target = predictions(*SHAPES, device=device)
    policy[0][row, 1, 2] = value
    loss = dpo_loss(policy, reference, target, beta=[1, 1], objective=objective, impl=impl)
    assert not loss.isfinite()


# ---------------------------------------------------------------- registration


def op_arguments(impl, device, **changes):
    """The registered op's arguments: a rebuilt and a materialised target, masks, statistics."""
    policy, reference, target = predictions(*SHAPES, device=device)
    policy = [p.requires_grad_() for p in policy]
    seed = [torch.arange(2, device=device), None]
    mask = [torch.ones(4, 1, 5, device=device), None]
    weight = torch.ones(2, device=device)
    beta, sft_weight = torch.tensor([1.0, 2.0]), torch.tensor([0.1])
    options = {"beta": beta, "sft_weight": sft_weight, "stream": [0, 0], "sign": [1, 0],
               "objective": "sigmoid", "separate": False, "normalize": True,
               "label_smoothing": 0.1, "interleaved": False, "mean": True, "stats": True,
               "impl": impl}  # fmt: skip
    options |= changes
    return (policy, reference, target, seed, mask, None, weight, *options.values())


@pytest.mark.parametrize("changes", [{}, {"mean": False, "stats": False, "interleaved": True}])
def test_opcheck(impl, device, changes):
    torch.library.opcheck(torch.ops.syncdpo.dpo_loss, op_arguments(impl, device, **changes))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(device, dynamic):
    torch._dynamo.reset()

    def step(policy, reference, clean, seed, target):
        loss, stats = dpo_loss(
            [p * 1.5 for p in policy], reference, [Velocity(clean, seed), target],
            beta=(2.0, 3.0), sft_weight=0.1, return_stats=True,
        )  # fmt: skip
        return loss, stats.implicit_accuracy

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for batch in (4, 6) if dynamic else (4,):
        shapes = [(batch, *shape[1:]) for shape in SHAPES]
        results = []
        for function in (step, compiled):
            policy, reference, target = predictions(*shapes, device=device)
            policy = [p.requires_grad_() for p in policy]
            seed = torch.arange(batch // 2, device=device)
            loss, accuracy = function(policy, reference, target[0], seed, target[1])
            loss.backward()
            results.append([loss.detach(), accuracy, *(p.grad for p in policy)])
        torch.testing.assert_close(*results)
