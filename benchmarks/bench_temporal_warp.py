"""warp, scale and shift against eager resampling and torch.compile.

Cases: LTX-2's audio latents in a large batch, its video latents unpacked and packed, latents with
time last, and one LTX-2 clip. On CUDA all but the last are larger than any cache. Each way is
checked against the reference before it is timed; what must move is each element once in and once
out. Scale and shift run the same kernel; they are timed on the packed layout.
"""

import pytest
import torch

from syncdpo.ops import scale, shift, warp
from syncdpo.ops.temporal_warp import _reference

LARGE = torch.cuda.is_available()
# name: shape, axis of time, packed frames
CASES = {
    "audio": ((8192 if LARGE else 32, 126, 128), 1, None),
    "video": ((64 if LARGE else 4, 128, 16, 16, 24), 2, None),
    "packed": ((128 if LARGE else 2, 16 * 384, 128), 1, 16),
    "time-last": ((4096 if LARGE else 8, 128, 253), 2, None),
    "clip-B1": ((1, 16 * 384, 128), 1, 16),
}


def inputs(case, device):
    shape, dim, frames = CASES[case]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, device=device, generator=generator).bfloat16()
    return x, torch.rand(shape[0], 8, device=device, generator=generator), dim, frames


@pytest.mark.parametrize("way", ["auto", "eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_warp(measure, device, case, way):
    x, chance, dim, frames = inputs(case, device)
    knots = chance.sort(1).values * ((frames or x.shape[dim]) - 1)
    whole_frames = x if frames is None else x.unflatten(dim, (frames, -1))
    reference = torch.compile(_reference) if way == "compiled" else _reference

    def call():
        if way == "auto":
            return warp(x, knots, dim=dim, frames=frames)
        return reference(whole_frames, knots, dim, "edge")

    check(call(), _reference(whole_frames, knots, dim, "edge"))
    measure(call, 2 * x.nbytes, compiled=way == "compiled", graph=way == "auto")


@pytest.mark.parametrize("op", [scale, shift])
def test_scale_and_shift(measure, device, op):
    x, chance, dim, frames = inputs("packed", device)
    amount = {scale: 0.5 + chance[:, 0], shift: 4.0 * chance[:, 0] - 2.0}[op]

    def call():
        return op(x, amount, dim=dim, frames=frames)

    check(call(), op(x, amount, dim=dim, frames=frames, impl="reference"))
    measure(call, 2 * x.nbytes, graph=True)


def check(actual, expected):
    """One rounding to bfloat16, where a product and a sum are fused."""
    error = (actual.reshape(expected.shape) - expected).abs().max()
    assert error <= torch.finfo(expected.dtype).eps * expected.abs().max()
