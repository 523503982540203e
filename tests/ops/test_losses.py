"""docs/losses.md, line by line: the calls of its table and its recipes, as they stand there,
against each trainer's formula in plain PyTorch and float64."""

import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from syncdpo.ops import dpo_loss
from syncdpo.testing import predictions

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
BETA = 40.0

# ---------------------------------------------------------------- what trainers compute


def squared_errors(prediction, target):
    return (prediction - target).square().flatten(1).mean(1)


def halves(values):
    return values.chunk(2)


def gap_of(errors_of, policy, reference, target):
    """Δ, [B], from a function that gives the error of each sample, [2B]."""
    (own_win, own_lose), (other_win, other_lose) = (
        halves(errors_of(x, target)) for x in (policy, reference)
    )
    return (own_win - own_lose) - (other_win - other_lose)


def logistic(margin):
    return -F.logsigmoid(margin)


def diffusion_dpo(p, r, y, beta):
    return logistic(-0.5 * beta * gap_of(squared_errors, p, r, y)).mean()


def without_the_half(p, r, y, beta, objective):
    ratio = -gap_of(squared_errors, p, r, y)
    return {
        "sigmoid": lambda: logistic(beta * ratio),
        "hinge": lambda: torch.relu(1 - beta * ratio),
        "ipo": lambda: (ratio - 1 / (2 * beta)) ** 2,
    }[objective]().mean()


def one_mean_over_both(p, r, y, beta):
    joined = [torch.cat([x.flatten(1) for x in pair], 1) for pair in (p, r, y)]
    return diffusion_dpo(*joined, beta)


def simple_tuner(p, r, y, beta, norm, mask=None):
    def errors_of(prediction, target):
        squares = (prediction - target) ** 2
        weight = torch.ones_like(squares) if mask is None else mask.double().expand_as(squares)
        total = (squares * weight).flatten(1).sum(1)
        divisor = {
            "sum": 1.0,
            "mean": squares[0].numel(),
            "masked_mean": weight.flatten(1).sum(1).clamp_min(1.0),
        }[norm]
        return total / divisor

    return logistic(-0.5 * beta * gap_of(errors_of, p, r, y)).mean()


def in_turn(p, r, y, beta):
    """Winner, loser, winner, loser."""
    own, other = (squared_errors(x, y) for x in (p, r))
    gap = (own[0::2] - own[1::2]) - (other[0::2] - other[1::2])
    return logistic(-0.5 * beta * gap).mean()


def av_dpo(p, r, y, beta):
    total = 0.0
    for own, other, truth in zip(p, r, y, strict=True):
        winner = halves(squared_errors(own, truth))[0]
        total = total + diffusion_dpo(own, other, truth, beta) + 0.1 * winner.mean()
    return total


def video_dpo(p, r, y, beta, weight):
    def errors_of(prediction, target):
        return (prediction - target).square().mean(dim=(1, 2, 3))  # [2B, W]

    terms = logistic(-0.5 * beta * gap_of(errors_of, p, r, y))
    return (weight.double()[:, None] * terms).mean()


def dense_dpo(p, r, y, beta, label, bounds):
    """Segment by segment and pair by pair, the sign where the formula has it."""
    total = 0.0
    for f, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = [x[:, start:stop] for x in (p, r, y)]
        margin = -0.5 * beta * label[:, f] * gap_of(squared_errors, *part)
        total = total + ((label[:, f] != 0) * logistic(margin)).mean()
    return total


def relative_to_the_reference(p, r, y, beta):
    margin = 0.0
    for own, other, truth in zip(p, r, y, strict=True):
        scale = torch.stack(halves(squared_errors(other, truth))).mean(0)
        margin = margin - 0.5 * beta * gap_of(squared_errors, own, other, truth) / scale
    return logistic(margin).mean()


# ---------------------------------------------------------------- the table

IMAGE, VIDEO, JOINT = [(6, 4, 8, 3)], [(4, 3, 5, 4, 6)], [(6, 5, 8), (6, 7, 3)]
MASK = torch.rand(6, 1, 8, 3, generator=torch.Generator().manual_seed(1)).round(decimals=1) + 0.1
LABEL = torch.tensor([[1, -1, 0], [-1, 0, 1]])
WEIGHT = torch.tensor([0.5, 1.75])
ROWS = {
    "Diffusion-DPO, Salesforce": (IMAGE, diffusion_dpo, {}),
    "diffusers, SDXL script": (IMAGE, diffusion_dpo, {}),
    "diffusers, SD1.5 script": (
        IMAGE, functools.partial(without_the_half, objective="sigmoid"), {}
    ),
    "diffusers, SD1.5 script, hinge": (
        IMAGE, functools.partial(without_the_half, objective="hinge"), {}
    ),
    "diffusers, SD1.5 script, ipo": (
        IMAGE, functools.partial(without_the_half, objective="ipo"), {}
    ),
    "flow_grpo, Flow-DPO": (IMAGE, diffusion_dpo, {}),
    "Flow-Factory": (VIDEO, diffusion_dpo, {}),
    "Flow-Factory, joint models": (JOINT, one_mean_over_both, {}),
    "SimpleTuner, sum": (IMAGE, functools.partial(simple_tuner, norm="sum"), {}),
    "SimpleTuner, mean": (IMAGE, functools.partial(simple_tuner, norm="mean"), {}),
    "SimpleTuner, masked_mean": (
        IMAGE, functools.partial(simple_tuner, norm="masked_mean"), {"mask": MASK}
    ),
    "SimpleTuner, sum with a mask": (
        IMAGE, functools.partial(simple_tuner, norm="sum"), {"mask": MASK}
    ),
    "SimpleTuner, mean with a mask": (
        IMAGE, functools.partial(simple_tuner, norm="mean"), {"mask": MASK}
    ),
    "verl-omni": (IMAGE, in_turn, {}),
    "JavisDiT++, AV-DPO": (JOINT, av_dpo, {}),
    "VideoDPO": (VIDEO, video_dpo, {"weight": WEIGHT}),
    "DenseDPO": (VIDEO, dense_dpo, {"label": LABEL, "bounds": [0, 1, 2, 3]}),
    "an LTX-2 fork": (JOINT, relative_to_the_reference, {}),
}  # fmt: skip
FACTORS = {
    "1": lambda sizes: 1.0,
    "2": lambda sizes: 2.0,
    "n": lambda sizes: float(sizes[0]),
    "n_m ∕ Σ n": lambda sizes: [n / sum(sizes) for n in sizes],
}


def table():
    """trainer → (factor, call), as the page has them."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("|")]
    header, _, *rows = rows
    assert header == ["trainer", "its loss for one pair", "factor", "call"]
    return {trainer: (factor, call.strip("`")) for trainer, _, factor, call in rows}


def recipes():
    """title → code"""
    sections = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    code = {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in sections}
    assert all(len(blocks) == 1 for blocks in code.values())
    return {title: blocks[0] for title, blocks in code.items()}


def functions():
    """The functions that the recipes define."""
    names = {"torch": torch, "itertools": itertools}
    for code in recipes().values():
        for definition in re.findall(r"^def .+?(?=^\S|\Z)", code, re.MULTILINE | re.DOTALL):
            exec(definition, names)
    return names


def loss_and_gradients(function, p, r, y):
    policy = [x.detach().requires_grad_() for x in p]
    loss = function(*(x if len(x) > 1 else x[0] for x in (policy, r, y)))
    return loss.detach().double(), torch.autograd.grad(loss, policy)


def assert_equal(call, formula, p, r, y):
    loss, grads = loss_and_gradients(call, p, r, y)
    doubles = ([x.double() for x in tensors] for tensors in (p, r, y))
    exact, exact_grads = loss_and_gradients(formula, *doubles)
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert exact_grad.abs().max() > 0
        assert (grad - exact_grad).abs().max() <= 1e-5 * exact_grad.abs().max()


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def test_the_table_has_these_rows():
    assert list(table()) == list(ROWS)
    assert {factor for factor, _ in table().values()} == set(FACTORS)


@pytest.mark.parametrize("trainer", ROWS)
def test_the_call_is_the_trainers_loss(impl, device, trainer):
    factor, call = table()[trainer]
    shapes, formula, given = ROWS[trainer]
    given = {name: moved(value, device) for name, value in given.items()}
    p, r, y = predictions(*shapes, gap=0.05, device=device)
    factor = FACTORS[factor]([x[0].numel() for x in p])
    b = [f * BETA for f in factor] if isinstance(factor, list) else factor * BETA
    names = functions() | given | {"dpo_loss": functools.partial(dpo_loss, impl=impl)}

    def ours(p, r, y):
        return eval(call, names | {"p": p, "r": r, "y": y, "b": b, "beta": BETA})

    assert_equal(ours, lambda p, r, y: formula(p, r, y, beta=BETA, **given), p, r, y)


# ---------------------------------------------------------------- the recipes


def weighted_gaps(p, r, y, beta, weight):
    """The gap of each half, weighted, before they are compared."""
    gaps = weight.double() * (squared_errors(p, y) - squared_errors(r, y))
    win, lose = halves(gaps)
    return logistic(-0.5 * beta * (win - lose)).mean()


def min_snr(p, r, y, beta, sigma):
    ratio = ((1 - sigma.double()) / sigma.double()) ** 2
    weight = torch.minimum(ratio, torch.tensor(5.0)) / ratio
    return weighted_gaps(p, r, y, beta, torch.cat([weight, weight]))


def weak_loser(p, r, y, beta, share):
    return weighted_gaps(p, r, y, beta, torch.cat([torch.ones_like(share), share]))


def soft_labels(p, r, y, beta, q):
    margin = -0.5 * beta * gap_of(squared_errors, p, r, y)
    return (q.double() * logistic(margin) + (1 - q.double()) * logistic(-margin)).mean()


def anchored(p, r, y, beta, alpha):
    (own_win, own_lose), (other_win, other_lose) = halves(p), halves(r)
    distance = F.mse_loss(own_win, other_win) + F.mse_loss(own_lose, other_lose)
    return diffusion_dpo(p, r, y, beta) + 0.5 * alpha * distance


def columns_of_equal_weight(p, r, y, beta):
    return video_dpo(p, r, y, beta, torch.ones(len(p) // 2))


THREE = torch.tensor([0.3, 0.5, 0.9])
RECIPES = {
    "An axis with a preference of its own": (VIDEO, columns_of_equal_weight, {}),
    "A weight per sample and half: timesteps, min-SNR, a β per pair": (
        IMAGE, min_snr, {"sigma": torch.tensor([0.1, 0.25, 0.8])}
    ),
    "A weight on the loser's gap": (IMAGE, weak_loser, {"share": THREE}),
    "A mask whose sum is not divided out": (
        IMAGE, functools.partial(simple_tuner, norm="mean"), {"mask": MASK}
    ),
    "Segments of time, each with a label": (
        [(4, 5, 3, 4)], functools.partial(dense_dpo, bounds=[0, 2, 4, 5]), {"label": LABEL}
    ),
    "Soft labels": (IMAGE, soft_labels, {"q": THREE}),
    "An anchor on the policy's distance from the reference": (IMAGE, anchored, {"alpha": 3.0}),
}  # fmt: skip


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_is_its_formula(impl, device, title):
    assert list(recipes()) == list(RECIPES)
    shapes, formula, given = RECIPES[title]
    given = {name: moved(value, device) for name, value in given.items()}
    names = functions() | given | {"dpo_loss": functools.partial(dpo_loss, impl=impl)}

    def ours(p, r, y):
        mine = names | {"p": p, "r": r, "y": y, "beta": BETA}
        exec(recipes()[title], mine)
        return mine["loss"]

    p, r, y = predictions(*shapes, gap=0.05, device=device)
    assert_equal(ours, lambda p, r, y: formula(p, r, y, beta=BETA, **given), p, r, y)


def test_the_columns_of_videodpo_taken_plainly_have_another_gradient():
    """Why the page moves the axis: the mean over all axes is another loss."""
    p, r, y = (x[0].double() for x in predictions(*VIDEO, gap=0.05))
    gradients = []
    for formula in (columns_of_equal_weight, diffusion_dpo):
        policy = p.detach().requires_grad_()
        gradients += torch.autograd.grad(formula(policy, r, y, BETA), policy)
    columns, plain = gradients
    assert (columns - plain).norm() > 0.05 * columns.norm()


def test_a_beta_for_each_pair_is_a_weight_on_both_halves(impl, device):
    p, r, y = (x[0] for x in predictions(*IMAGE, gap=0.05, device=device))
    betas = torch.tensor([10.0, 40.0, 90.0], device=device)
    rows = functions()["weighted"]((betas / BETA).repeat(2), p, r, y)
    loss = dpo_loss(*rows, beta=BETA, impl=impl)
    margin = -0.5 * betas * gap_of(squared_errors, p.double(), r.double(), y.double())
    torch.testing.assert_close(loss.double(), logistic(margin).mean(), rtol=1e-5, atol=0)
