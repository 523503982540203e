import math
import os

import numpy as np
import pytest
import torch
from oracles import dpo_oracle, loss_and_gradient, to_double

from syncdpo.ops import Velocity, dpo_loss
from syncdpo.testing import predictions

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = ((4, 3, 5), (4, 7))


def call():
    policy, reference, target = predictions(*SHAPES)
    return {"policy": policy, "reference": reference, "target": target, "beta": [1.0, 2.0]}


ONE, SEED = torch.zeros(4, 3, 5), torch.arange(2)
AUDIO = torch.zeros(4, 7)
BAD_INPUTS = {
    "odd_batch": ({"policy": [torch.zeros(3, 2)] * 2}, ValueError, r"policy\[0\].*2B.*\[3, 2\]"),
    "no_pair": ({"policy": [torch.zeros(0, 2)] * 2}, ValueError, r"policy\[0\].*B > 0.*\[0, 2\]"),
    "empty_axis": ({"policy": [torch.zeros(4, 0)] * 2}, ValueError, r"policy\[0\].*\[4, 0\]"),
    "no_modality": (
        {"policy": [], "reference": [], "target": [], "beta": []}, ValueError, r"policy.*empty"
    ),
    "batches": ({"policy": [ONE, AUDIO[:2]]}, ValueError, r"policy\[1\].*\[4, …\].*\[2, 7\]"),
    "dtype": ({"policy": [ONE.long(), AUDIO]}, TypeError, r"policy\[0\].*float32.*int64"),
    "mixed_float64": (
        {"policy": [ONE.double(), AUDIO]}, TypeError, r"reference\[0\].*float64.*float32"
    ),
    "float64_second": (
        {"policy": [ONE, AUDIO.double()]}, TypeError, r"policy\[0\].*float64.*float32"
    ),
    "float64_target": ({"target": [ONE.double(), AUDIO]}, TypeError, r"target\[0\].*got float64"),
    "kind": ({"policy": [ONE, 3]}, TypeError, r"policy\[1\].*tensor.*int"),
    "reference_shape": ({"reference": [ONE, ONE]}, ValueError, r"reference\[1\].*\[4, 7\].*3, 5\]"),
    "reference_count": ({"reference": ONE}, ValueError, r"reference.*\(2\).*1"),
    "reference_missing": ({"reference": None}, ValueError, r"reference.*reference_error.*neither"),
    "reference_twice": ({"reference_error": torch.zeros(2, 4)}, ValueError, r"reference.*both"),
    "reference_error": (
        {"reference": None, "reference_error": torch.zeros(4)}, ValueError,
        r"reference_error.*\[2, 4\].*\[4\]",
    ),
    "reference_error_kind": (
        {"reference": None, "reference_error": [[0.0] * 4] * 2}, TypeError,
        r"reference_error.*tensor.*list",
    ),
    "reference_error_dtype": (
        {"reference": None, "reference_error": torch.zeros(2, 4).long()}, TypeError,
        r"reference_error.*float64.*int64",
    ),
    "target_device": ({"target": [ONE.to("meta"), AUDIO]}, ValueError, r"target\[0\].*cpu.*meta"),
    "beta_kind": ({"beta": {"video": 1.0}}, TypeError, r"beta.*number.*dict"),
    "beta_array": ({"beta": np.ones(2)}, TypeError, r"beta.*number.*ndarray"),
    "beta_word": ({"beta": ["500", 50.0]}, TypeError, r"beta.*number.*str"),
    "beta_device": ({"beta": torch.ones((), device="meta")}, TypeError, r"beta.*CPU.*meta"),
    "beta_shape": ({"beta": [torch.ones(2), 1.0]}, TypeError, r"beta.*one.*\[2\]"),
    "beta_negative": ({"beta": [1.0, -2.0]}, ValueError, r"beta.*0 or more.*-2"),
    "beta_nan": ({"beta": math.nan}, ValueError, r"beta.*finite.*nan"),
    "beta_infinite": ({"beta": torch.tensor(math.inf)}, ValueError, r"beta.*finite.*inf"),
    "sft_weight": ({"sft_weight": -0.1}, ValueError, r"sft_weight.*0 or more.*-0\.1"),
    "sft_weight_kind": ({"sft_weight": [0.1]}, TypeError, r"sft_weight.*number.*list"),
    "smoothing_kind": ({"label_smoothing": None}, TypeError, r"label_smoothing.*number.*NoneType"),
    "beta_count": ({"beta": [1.0, 2.0, 3.0]}, ValueError, r"beta.*\(2\).*3"),
    "mask_shape": ({"mask": [torch.ones(4, 2, 5), None]}, ValueError, r"mask\[0\].*\[4, 3, 5\]"),
    "mask_dtype": ({"mask": [ONE.long(), None]}, TypeError, r"mask\[0\].*bool.*int64"),
    "mask_count": ({"mask": [None]}, ValueError, r"mask.*\(2\).*1"),
    "pair_weight_kind": ({"pair_weight": [1.0, 1.0]}, TypeError, r"pair_weight.*tensor.*list"),
    "pair_weight": ({"pair_weight": torch.ones(4)}, ValueError, r"pair_weight.*\[2\].*\[4\]"),
    "objective": ({"objective": "dpo"}, ValueError, r"objective.*'sigmoid'.*'dpo'"),
    "logistic": ({"logistic": "both"}, ValueError, r"logistic.*'joint'.*'both'"),
    "normalize": ({"normalize": "policy"}, ValueError, r"normalize.*'reference'.*'policy'"),
    "layout": ({"layout": "chunk"}, ValueError, r"layout.*'halves'.*'chunk'"),
    "reduction": ({"reduction": "sum"}, ValueError, r"reduction.*'mean'.*'sum'"),
    "impl": ({"impl": "cuda"}, ValueError, r"impl.*'auto'.*'cuda'"),
    "smoothing": ({"label_smoothing": 0.6}, ValueError, r"label_smoothing.*0\.5.*0\.6"),
    "smoothing_hinge": (
        {"label_smoothing": 0.1, "objective": "hinge"}, ValueError, r"label_smo.*'hinge', got 0\.1"
    ),
    "clean_shape": (
        {"target": [Velocity(ONE[:3], SEED), AUDIO]}, ValueError,
        r"target\[0\]\.clean.*\[4, 3, 5\] or \[2, 3, 5\].*\[3, 3, 5\]",
    ),
    "seed_dtype": (
        {"target": [Velocity(ONE, SEED.float()), AUDIO]}, TypeError, r"target\[0\]\.seed.*int64"
    ),
    "seed_length": (
        {"target": [Velocity(ONE, torch.arange(4)), AUDIO]}, ValueError,
        r"target\[0\]\.seed.*\[2\].*\[4\]",
    ),
    "stream": ({"target": [Velocity(ONE, SEED, -1), AUDIO]}, ValueError, r"target\[0\]\.stream"),
    "sign": (
        {"target": [Velocity(ONE, SEED, 0, 2), AUDIO]}, ValueError,
        r"target\[0\]\.sign: expected 1 or -1, got 2",
    ),
    "sign_zero": (
        {"target": [AUDIO, Velocity(AUDIO, SEED, 0, 0)], "policy": [AUDIO, AUDIO],
         "reference": [AUDIO, AUDIO]}, ValueError, r"target\[1\]\.sign: expected 1 or -1, got 0",
    ),
    "smoothing_nan": ({"label_smoothing": math.nan}, ValueError, r"label_smoothing.*nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_say_what_was_expected(case):
    change, error, message = BAD_INPUTS[case]
    arguments = call() | change
    positional = [arguments.pop(name) for name in ("policy", "reference", "target")]
    with pytest.raises(error, match=message):
        dpo_loss(*positional, **arguments)


@pytest.mark.parametrize(
    "beta",
    [
        (2, 3),
        [np.float32(2), np.float64(3)],
        (torch.tensor(2), torch.tensor([3.0])),
        torch.tensor([2.0, 3.0], requires_grad=True),
    ],
)
def test_a_number_is_a_number(impl, device, beta):
    inputs = predictions(*SHAPES, device=device)
    expected = dpo_loss(*inputs, beta=[2.0, 3.0], sft_weight=0.5, impl=impl)
    actual = dpo_loss(*inputs, beta=beta, sft_weight=torch.tensor(0.5), impl=impl)
    assert torch.equal(actual, expected)


def test_a_beta_of_zero_leaves_a_modality_out(impl, device):
    inputs = predictions(*SHAPES, device=device)
    both = dpo_loss(*inputs, beta=[2.0, 0.0], impl=impl)
    alone = dpo_loss(*[x[0] for x in inputs], beta=2.0, impl=impl)
    torch.testing.assert_close(both, alone, rtol=1e-6, atol=0)


def test_weights_of_any_float_dtype_are_rounded_once(impl, device):
    """What a DataLoader makes of Python floats is float64."""
    inputs = predictions(*SHAPES, device=device)
    weight, mask = torch.tensor([0.1, 0.7]).double(), torch.rand(4, 1, 5).double()
    kinds = {}
    for dtype in (torch.float64, torch.float32):
        options = {"pair_weight": weight.to(device, dtype), "mask": [mask.to(device, dtype), None]}
        kinds[dtype] = loss_and_gradient(dpo_loss, *inputs, beta=[1.0, 2.0], impl=impl, **options)
    (loss, grads), (expected, expected_grads) = kinds.values()
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_float64_throughout_keeps_its_digits():
    inputs = [to_double(x) for x in predictions(*SHAPES)]
    weight, mask = torch.tensor([1 / 3, 0.1], dtype=torch.float64), torch.rand(4, 1, 5).double()
    options = {"beta": [1.0, 2.0], "pair_weight": weight, "mask": [mask, None]}
    loss = dpo_loss(*inputs, **options)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, dpo_oracle(*inputs, **options), rtol=1e-14, atol=0)


# ---------------------------------------------------------------- values that are not looked at


def test_what_unchecked_values_give(impl, device):
    """The docstring's list, entry by entry."""
    policy, reference, target = (x[0] for x in predictions((6, 3, 5), device=device))

    def losses(policy, reference=reference, **options):
        return dpo_loss(
            policy, reference, target, beta=2.0, reduction="none", impl=impl, **options
        ).tolist()

    plain = losses(policy)
    mask = torch.ones(6, 1, 1, device=device)
    mask[0], mask[1] = torch.nan, -1.0
    assert losses(policy, mask=mask) == [0.0, 0.0, pytest.approx(plain[2], rel=1e-6)]
    weight = torch.tensor([torch.nan, -1.0, 1.0], device=device)
    weighted = losses(policy, pair_weight=weight)
    assert math.isnan(weighted[0])
    assert weighted[1:] == pytest.approx([-plain[1], plain[2]])
    exact = reference.clone()
    exact[[1, 4]] = target[[1, 4]]
    normalized = losses(policy, exact, normalize="reference")
    assert [math.isnan(x) for x in normalized] == [False, True, False]
    policy[2] = torch.inf
    unweighted = losses(policy, pair_weight=torch.zeros(3, device=device))
    assert not math.isfinite(unweighted[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_accuracy_leaves_out_pairs_that_are_not_finite(impl, device, value):
    """Three pairs: right in both modalities, wrong in both, and one whose sound is not finite."""
    target = [torch.zeros(6, 4, device=device), torch.zeros(6, 2, 3, device=device)]
    reference = [torch.ones_like(y) for y in target]
    policy = [r.clone() for r in reference]
    for p in policy:
        p[0] = 0.5  # the first winner is nearer than the reference's,
        p[4] = 0.5  # the second loser, too,
        p[2] = 0.5  # and the third winner
    policy[1][5] = value
    _, stats = dpo_loss(policy, reference, target, beta=1.0, return_stats=True, impl=impl)
    assert stats.implicit_accuracy == 0.5
    assert stats.modality_accuracy.tolist() == pytest.approx([2 / 3, 1 / 2])


def test_accuracy_of_nothing_finite_is_zero(impl, device):
    policy, reference, target = predictions(*SHAPES, device=device)
    policy[0][:] = torch.nan
    _, stats = dpo_loss(policy, reference, target, beta=1.0, return_stats=True, impl=impl)
    assert stats.implicit_accuracy == 0
    assert stats.modality_accuracy[0] == 0


def test_a_kernel_cannot_be_asked_for_where_it_cannot_run(device):
    if device == "cuda" or INTERPRETED:
        pytest.skip("it can run here")
    with pytest.raises(ValueError, match=r"impl.*CUDA.*cpu.*TRITON_INTERPRET"):
        dpo_loss(ONE, ONE, ONE, beta=1.0, impl="kernel")
