"""warp against eager resampling and torch.compile; scale and shift run the same kernel.

Cases: LTX-2's audio latents in a large batch, its video latents unpacked and packed, and latents
with time last. Each way is checked against the reference before it is timed; what must move is
each element once in and once out. See conftest.py for the figures.
"""

import pytest
import torch

from syncdpo.ops import warp
from syncdpo.ops.temporal_warp import _reference

LARGE = torch.cuda.is_available()
# name: shape, axis of time, packed frames
CASES = {
    "audio": ((512 if LARGE else 32, 126, 128), 1, None),
    "video": ((4, 128, 16, 16, 24), 2, None),
    "packed": ((8 if LARGE else 2, 16 * 384, 128), 1, 16),
    "time-last": ((64 if LARGE else 8, 128, 253), 2, None),
}


@pytest.mark.parametrize("way", ["auto", "eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_warp(measure, device, case, way):
    shape, dim, frames = CASES[case]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, device=device, generator=generator).bfloat16()
    steps = torch.rand(shape[0], 8, device=device, generator=generator).sort(1).values
    knots = steps * ((frames or shape[dim]) - 1)
    whole_frames = x if frames is None else x.unflatten(dim, (frames, -1))
    reference = torch.compile(_reference) if way == "compiled" else _reference

    def call():
        if way == "auto":
            return warp(x, knots, dim=dim, frames=frames)
        return reference(whole_frames, knots, dim, "edge")

    expected = _reference(whole_frames, knots, dim, "edge").reshape(x.shape)
    # One rounding to bfloat16, where a product and a sum are fused.
    error = (call().reshape(x.shape) - expected).abs().max()
    assert error <= torch.finfo(x.dtype).eps * x.abs().max()
    measure(call, 2 * x.nbytes, compiled=way == "compiled")
