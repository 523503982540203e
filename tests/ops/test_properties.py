"""Any shape, stride and option of the ops against their oracles."""

import math

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_matches_oracle, warp_error, warp_oracle

from syncdpo.ops import noise, paired_noise, warp
from syncdpo.ops.temporal_warp import BOUNDARIES
from syncdpo.testing import LAYOUTS, assert_within_budget, predictions, restride

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.integers(1, 3),
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=3),
    strides=st.lists(st.sampled_from(LAYOUTS), min_size=9, max_size=9),
    dtype=st.sampled_from(FLOATS),
    options=st.fixed_dictionaries(
        {
            "layout": st.sampled_from(["halves", "interleaved"]),
            "logistic": st.sampled_from(["joint", "separate"]),
            "normalize": st.sampled_from([None, "reference"]),
            "reduction": st.sampled_from(["mean", "none"]),
            "sft_weight": st.sampled_from([0.0, 0.3]),
            "label_smoothing": st.sampled_from([0.0, 0.1]),
        }
    ),
)
def test_dpo_loss_matches_the_oracle(impl, device, pairs, shapes, strides, dtype, options):
    shapes = [(2 * pairs, *shape) for shape in shapes]
    inputs = predictions(*shapes, dtype=dtype, device=device)
    layouts = iter(strides)
    inputs = [[restride(x, next(layouts)) for x in tensors] for tensors in inputs]
    # An error of a single element may be near 0; dividing by it makes any margin.
    options["normalize"] = options["normalize"] if math.prod(shapes[0][1:]) > 8 else None
    assert_matches_oracle(impl, *inputs, beta=[1.0] * len(shapes), **options)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple),
    batch=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(FLOATS),
    shared=st.booleans(),
)
@pytest.mark.usefixtures("poisoned_memory")
def test_paired_noise_is_noise_and_interpolation(impl, device, shape, batch, layout, dtype, shared):
    generator = torch.Generator().manual_seed(batch)
    win, lose = torch.randn(2, batch, *shape, generator=generator).to(device, dtype)
    sigma = torch.rand(batch, generator=generator).to(device)
    seed = torch.arange(batch, device=device) - 1
    lose = None if shared else restride(lose, layout)
    actual = paired_noise(restride(win, layout), lose, sigma, seed, stream=3, impl=impl)
    assert actual.dtype == dtype
    e = noise(win.shape, seed, stream=3, impl=impl).double()
    level = sigma.double().reshape(-1, *[1] * len(shape))
    halves = [(1 - level) * x.double() + level * e for x in (win, win if shared else lose)]
    exact = torch.cat(halves)
    rounding = 3 * torch.finfo(torch.float32).eps * (e.abs().max() + win.double().abs().max())
    assert_within_budget(actual, exact, baseline=exact + rounding)


def monotone_knots(generator, batch, knots, frames, spread=0.9):
    steps = torch.rand(batch, knots, generator=generator).sort(1).values
    return (steps * 3 - 1) * (frames - 1) * spread


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    frames=st.integers(2, 33),
    inner=st.lists(st.integers(1, 4), min_size=0, max_size=2),
    knots=st.integers(2, 40),
    boundary=st.sampled_from(BOUNDARIES),
    dtype=st.sampled_from(FLOATS),
    data=st.data(),
)
def test_warp_agrees_with_a_float64_loop(
    impl, device, seed, batch, frames, inner, knots, boundary, dtype, data
):
    generator = torch.Generator().manual_seed(seed)
    dim = data.draw(st.integers(1, len(inner) + 1))
    shape = [batch, *inner[: dim - 1], frames, *inner[dim - 1 :]]
    x = torch.randn(shape, generator=generator).to(dtype)
    places = monotone_knots(generator, batch, knots, frames)
    y = warp(
        restride(x, data.draw(st.sampled_from(LAYOUTS))).to(device),
        places.to(device),
        dim=data.draw(st.sampled_from([dim, dim - x.ndim])),
        boundary=boundary,
        impl=impl,
    ).cpu()
    assert y.dtype == dtype
    assert y.is_contiguous()
    error = (y.double() - warp_oracle(x, places, dim, boundary)).abs().max().item()
    assert error <= warp_error(x, frames)
