"""Warp, scale and shift against a plain float64 loop; the door; the registration."""

import os

import numpy as np
import pytest
import torch
from oracles import frame_outside

from syncdpo.ops import temporal_warp
from syncdpo.ops.temporal_warp import BOUNDARIES, scale, shift, warp

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [2, 13, 126])
def test_identity_returns_the_bits(impl, device, frames, dtype, boundary):
    x = torch.randn(3, frames, 2).to(device, dtype)
    x[0, 0, 0], x[1, 1, 1] = -0.0, float("inf")
    bits = x.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    options = {"boundary": boundary, "impl": impl}
    grids = [torch.linspace(0, frames - 1, k).expand(3, -1) for k in (2, 5, 7, frames)]
    outputs = [warp(x, grid.to(device), **options) for grid in grids]
    for anchor in (0.0, 0.3, 0.5, 1.0):
        outputs.append(scale(x, torch.ones(3, device=device), anchor=anchor, **options))
    outputs.append(shift(x, torch.zeros(3, device=device), **options))
    for y in outputs:
        assert torch.equal(y.view(bits.dtype), bits)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_whole_shifts_move_bits(impl, device, boundary):
    frames = 11
    x = torch.randn(5, 3, frames, dtype=torch.float16, device=device)
    offsets = [-14, -3, 0, 2, 25]
    places = torch.tensor(offsets, dtype=torch.float32, device=device)
    y = shift(x, places, dim=-1, boundary=boundary, impl=impl)
    for b, offset in enumerate(offsets):
        source = [frame_outside(t - offset, frames, boundary) for t in range(frames)]
        assert torch.equal(y[b], x[b, :, source])


def test_shift_is_later_and_scale_two_is_twice_as_fast():
    x = torch.arange(9.0).repeat(2, 1)
    assert shift(x, torch.tensor([2.0, -2.0]), boundary="edge")[:, 4].tolist() == [2.0, 6.0]
    assert scale(x, torch.tensor([2.0, 0.5]))[0].tolist() == [0, 0, 0, 2, 4, 6, 8, 8, 8]
    assert scale(x, torch.tensor([2.0, 0.5]), anchor=0.0)[1, :3].tolist() == [0, 0.5, 1]


def test_packed_tokens_move_as_whole_frames(impl, device):
    x = torch.randn(2, 6 * 4, 3, device=device)
    knots = torch.tensor([[0.0, 2.25, 5.0], [1.5, 2.0, 2.5]], device=device)
    packed = warp(x, knots, frames=6, boundary="wrap", impl=impl)
    unpacked = warp(x.reshape(2, 6, 12), knots, boundary="wrap", impl=impl)
    assert torch.equal(packed, unpacked.reshape(2, 24, 3))


def test_long_streams_keep_their_fractions(impl, device):
    """Of a position near 50 000 float32 keeps 1/256; of the displacement it keeps all."""
    frames = 50_000
    x = torch.arange(frames, dtype=torch.float32, device=device)[None]
    y = shift(x, torch.full((1,), 0.25, device=device), impl=impl)
    assert ((x - y)[:, 1:] - 0.25).abs().max() <= 2.0**-7
    # 50 000 frames by as many knots would overflow 32 bits.
    halved = warp(x, x[:, :-1] * 0.5, impl=impl)
    assert (halved * 2 - x).abs().max() <= 1.1


def test_a_warp_and_its_inverse_return_a_smooth_signal():
    frames = 400
    t = torch.linspace(0, 1, frames, dtype=torch.float64)
    x = torch.sin(6 * t).expand(2, -1)
    there = torch.tensor([[0.0, 90, 260, 399], [0.0, 180, 230, 399]])
    grid = torch.arange(frames, dtype=torch.float64)
    knot_outputs = np.linspace(0, frames - 1, 4)
    back = torch.stack(
        [torch.from_numpy(np.interp(grid, row.numpy(), knot_outputs)) for row in there]
    ).float()
    returned = warp(warp(x, there), back)
    # Linear interpolation is off by at most h^2 / 8 max|x''|; the first warp also bends x at its
    # knots, where slopes change by at most max|x'| h times the change of tempo.
    h, tempo = 1 / (frames - 1), 400 / 3 / 50
    bound = tempo**2 * h**2 / 8 * 36 + h * 6 * tempo / 4
    assert (returned - x).abs().max() <= bound
    assert (returned - x).abs().max() > 0


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradient(boundary):
    x = torch.randn(2, 3, 7, 2, dtype=torch.float64, requires_grad=True)
    knots = torch.tensor([[0.0, 2, 2, 6], [-3.3, 0.4, 8.1, 11.5]])
    assert torch.autograd.gradcheck(lambda x: warp(x, knots, dim=2, boundary=boundary), x)


def test_low_precision_gradient_is_summed_in_float32():
    x = torch.zeros(1, 4096, 1, dtype=torch.bfloat16, requires_grad=True)
    warp(x, torch.zeros(1, 2)).sum().backward()
    assert x.grad[0, 0, 0] == 4096


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_opcheck(boundary):
    x = torch.randn(2, 3, 8, requires_grad=True)
    knots = torch.tensor([[0.0, 3, 7], [-2.0, 5, 9.5]])
    torch.library.opcheck(temporal_warp._warp, (x, knots, 2, boundary, "reference"))
    torch.library.opcheck(temporal_warp._warp_grad, (x.detach(), knots, 2, boundary))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def played(x, knots, rate):
        return shift(scale(warp(x, knots, frames=6), rate, frames=6), rate, frames=6)

    compiled = torch.compile(played, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, tokens in ((2, 3), (4, 5)):
        x = torch.randn(batch, 6 * tokens, 2, requires_grad=True)
        knots, rate = torch.rand(batch, 4).sort(1).values * 5, torch.rand(batch) + 0.5
        got, expected = compiled(x, knots, rate), played(x, knots, rate)
        assert torch.equal(got, expected)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
        assert torch.equal(*grads)


def test_empty_batch_and_empty_frames(impl, device):
    for shape in ((0, 4, 2), (2, 4, 0)):
        x, knots = torch.empty(shape, device=device), torch.zeros(shape[0], 2, device=device)
        assert warp(x, knots, impl=impl).shape == shape


X = torch.zeros(2, 6, 3)
KNOTS = torch.tensor([[0.0, 5.0], [0.0, 5.0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: warp(X.int(), KNOTS), TypeError, "x: expected dtype"),
        (lambda: warp(X, KNOTS.double()), TypeError, "knots: expected dtype"),
        (lambda: warp(X, KNOTS[:1]), ValueError, r"knots: expected shape .* got \[1, 2\]"),
        (lambda: warp(X, KNOTS[:, :1]), ValueError, "K >= 2"),
        (lambda: warp(X, KNOTS, dim=0), ValueError, "dim: expected .* got 0"),
        (lambda: warp(X, KNOTS, dim=3), ValueError, "dim: expected .* got 3"),
        (lambda: warp(X, KNOTS, frames=4), ValueError, "frames: expected a divisor .* 6, got 4"),
        (lambda: warp(X, KNOTS, frames=1), ValueError, "at least two frames"),
        (lambda: warp(X[:, :1], KNOTS), ValueError, "at least two frames .* got 1"),
        (lambda: warp(X, KNOTS, boundary="mirror"), ValueError, "boundary: expected .*'mirror'"),
        (lambda: warp(X, KNOTS, impl="triton"), ValueError, "impl: expected"),
        (lambda: warp(X, torch.tensor([[0.0, 5], [3, 2]])), ValueError, r"knots\[1\]: .*never"),
        (lambda: warp(X, torch.tensor([[0.0, 5], [0, torch.nan]])), ValueError, r"knots\[1\]"),
        (lambda: warp(X, torch.tensor([[-6.5, 5], [0, 5]])), ValueError, r"knots\[0\]"),
        (lambda: warp(X, torch.tensor([[0.0, 5], [0, 11.5]])), ValueError, r"knots\[1\]"),
        (lambda: scale(X, torch.tensor([1.0, 0.0])), ValueError, r"rate\[1\]: .* got 0.0"),
        (lambda: scale(X, torch.tensor([torch.inf, 1.0])), ValueError, r"rate\[0\]"),
        (lambda: scale(X, torch.ones(3)), ValueError, r"rate: expected shape \[B\]"),
        (lambda: shift(X, torch.tensor([0.0, torch.nan])), ValueError, r"offset\[1\]"),
        (lambda: shift(X, torch.ones(2, 1)), ValueError, r"offset: expected shape \[B\]"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(INTERPRETED, reason="there a kernel runs on CPU")
def test_a_kernel_asked_for_by_name_never_falls_back():
    with pytest.raises(ValueError, match="impl: 'kernel' expects CUDA"):
        warp(X, KNOTS, impl="kernel")


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_values_that_nobody_may_read_follow_the_boundary_or_give_nan(impl, device, boundary):
    """What a device does, where no check can wait for the values: the op behind its door."""
    x = torch.randn(3, 6, 2, device=device)
    knots = torch.tensor([[0.0, 5.0], [torch.nan, 5.0], [-torch.inf, torch.inf]], device=device)
    y = temporal_warp.resample(x, knots, boundary=boundary, impl=impl)
    assert torch.equal(y[0], x[0])
    assert y[1].isnan().all()
    far = torch.tensor([[-(2.0**26), 2.0**26]], device=device).expand(3, -1)
    assert temporal_warp.resample(x, far, boundary=boundary, impl=impl).isfinite().all()
