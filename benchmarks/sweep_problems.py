"""The problems of the sweep: each kernel on one shape, and what it must give there.

Inputs are made on any device, "meta" among them, on which kernels compile without memory. What is
expected comes from the op's plain reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from sweep_variants import Variant
from torch import Tensor
from torch.utils._pytree import tree_map_only

from syncdpo.ops import _dpo_reference, segment_replace, temporal_warp
from syncdpo.ops.paired_noise import _paired_noise_reference, noise_reference


class Problem(NamedTuple):
    """A kernel on one shape. `call` takes the variant and `inputs`; a graph's calls get copies."""

    inputs: dict
    call: Callable[[Variant, dict], list[Tensor]]
    expected: Callable[[], list[Tensor]]
    relative: float
    absolute: tuple[float, ...]  # one per result
    moved: int  # bytes: each input once, each output once


LATENTS = {
    "large": ((8, 32768, 128), (8, 126, 128)),
    "small": ((2, 6144, 128), (2, 126, 128)),
    "tiny": ((2, 40, 128), (2, 3, 128)),  # for Triton's interpreter
}
WARPED = {
    "large video": (64, 16, 384, 128),
    "large audio": (3200, 126, 128),
    "small video": (1, 16, 384, 128),
    "small audio": (1, 126, 128),
    "tiny": (2, 5, 24),
}
BETA = 500.0
# What the approximate logarithm's error of 2^-22 becomes under the root, near u = 1.
NOISE_ERROR = 2.0**-10


def size(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def predictions(shape: str, device: str) -> tuple[list[Tensor], ...]:
    """Policy, near the reference; reference; target, or clean latents."""
    torch.manual_seed(0)
    made = []
    for own in LATENTS[shape]:
        reference, gap, truth = (torch.randn(own, device=device) for _ in range(3))
        made.append([reference * (1.0 + 0.1 * gap), reference, reference + truth])
    return tuple([x.bfloat16() for x in column] for column in zip(*made, strict=True))


def loss_inputs(shape: str, device: str, velocity: bool) -> tuple[dict, _dpo_reference.Options]:
    """With clean latents as target the statistics are asked for too, as the trainer does."""
    policy, reference, target = predictions(shape, device)
    count, pairs = len(policy), len(policy[0]) // 2
    seed = torch.arange(pairs, device=device) if velocity else None
    options = _dpo_reference.Options(
        beta=[BETA] * count, stream=list(range(count)), sign=[int(velocity)] * count,
        objective="sigmoid", separate=False, normalize=False, sft_weight=0.0, label_smoothing=0.0,
        interleaved=False, mean=True, stats=velocity, impl="kernel",
    )  # fmt: skip
    inputs = {"policy": policy, "target": target, "seed": [seed] * count, "mask": [None] * count}
    return inputs | {"reference": reference}, options


def loss_forward(shape: str, device: str, velocity: bool) -> Problem:
    inputs, options = loss_inputs(shape, device, velocity)

    def run(function, x):
        tensors = (x["policy"], x["reference"], x["target"], x["seed"], x["mask"])
        return list(function(*tensors, None, None, options))

    def exact():
        wide = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
        return run(_dpo_reference.forward_reference, wide)

    # A rounding of mean squared errors near 1 moves the margin by ½ β ε; they are up to 6 here, but
    # many roundings make up for each other.
    error = BETA * torch.finfo(torch.float32).eps
    return Problem(
        inputs,
        lambda v, x: run(v.kernel("dpo_loss")._fwd, x),
        exact,
        relative=error,
        absolute=(error, error, error, error, 0.0),  # slopes are small
        moved=3 * size(inputs["policy"]),
    )


def loss_backward(shape: str, device: str, velocity: bool) -> Problem:
    inputs, options = loss_inputs(shape, device, velocity)
    del inputs["reference"]
    inputs["slope"] = torch.randn(len(inputs["policy"]), len(inputs["policy"][0]), device=device)
    inputs["grad"] = torch.ones((), device=device)

    def run(function, x):
        tensors = (x["policy"], x["target"], x["seed"], x["mask"])
        return function(x["grad"], x["slope"], *tensors, options)

    return Problem(
        inputs,
        lambda v, x: run(v.kernel("dpo_loss")._bwd, x),
        lambda: run(_dpo_reference.backward_reference, inputs),
        relative=torch.finfo(torch.bfloat16).eps,
        absolute=(4 * NOISE_ERROR if velocity else 1e-6,) * 2,  # slopes reach about 4
        moved=3 * size(inputs["policy"]),
    )


def noised_pairs(shape: str, device: str) -> Problem:
    _, _, clean = predictions(shape, device)
    pairs = len(clean[0]) // 2
    sigma = torch.rand(pairs, device=device)
    inputs = {
        "win": [x[:pairs] for x in clean], "lose": [x[pairs:] for x in clean],
        "sigma": [sigma] * len(clean), "seed": torch.arange(pairs, device=device),
    }  # fmt: skip
    return Problem(
        inputs,
        lambda v, x: v.kernel("paired_noise")._paired_noise(**x, stream=0),
        lambda: _paired_noise_reference(**inputs, stream=0),
        relative=torch.finfo(torch.bfloat16).eps,
        absolute=(NOISE_ERROR,) * 2,
        moved=2 * size(clean),
    )


def noise(shape: str, device: str) -> Problem:
    rows, *rest = LATENTS[shape][0]
    pairs = rows // 2
    own, inputs = (pairs, *rest), {"seed": torch.arange(pairs, device=device)}
    return Problem(
        inputs,
        lambda v, x: [v.kernel("paired_noise")._noise(own, x["seed"], 0)],
        lambda: [noise_reference(own, inputs["seed"], 0)],
        relative=0.0,
        absolute=(NOISE_ERROR,),
        moved=4 * math.prod(own),
    )


def warp(shape: str, device: str) -> Problem:
    torch.manual_seed(0)
    x = torch.randn(WARPED[shape], device=device).bfloat16()
    knots = torch.rand(len(x), 8, device=device).sort(1).values * (x.shape[1] - 1)
    inputs = {"x": x, "knots": knots}
    return Problem(
        inputs,
        lambda v, x: [v.kernel("temporal_warp").warp_fwd(**x, dim=1, boundary="edge")],
        lambda: [temporal_warp._reference(**inputs, dim=1, boundary="edge")],
        relative=torch.finfo(torch.bfloat16).eps,
        absolute=(2.0**-20,),  # a fused product and sum, where they cancel
        moved=2 * size([x]),
    )


def replaced(shape: str, device: str, in_place: bool) -> Problem:
    """A quarter of each clip is overwritten by another of its moments; again and again in place,
    as the moment itself stays what it is."""
    torch.manual_seed(0)
    if shape == "large":  # raw: 121 frames of 512 × 768, 48 kHz stereo
        video = torch.randint(0, 256, (16, 121, 512, 768, 3), dtype=torch.uint8, device=device)
        audio = torch.randn(16, 2, 242_000, device=device)
        rates, dims = [24.0, 48_000.0], [1, 2]
    else:
        video = torch.randn(8 if shape == "small" else 2, 16, 384, 128, device=device).bfloat16()
        audio = torch.randn(len(video), 126, 128, device=device).bfloat16()
        rates, dims = [3.0, 25.0], [1, 1]
    batch, share, seconds = len(video), 0.25, 5.0
    sample = torch.arange(batch, device=device)
    start = 0.5 + sample / (2.0 * batch)
    length = torch.full_like(start, share * seconds)
    segments = segment_replace.Segments(*(x[:, None] for x in (start, length, sample, start + 2.5)))
    options = segment_replace._Options(rates, dims, 0.0, False, "kernel")
    streams = [video, audio]
    inputs = {"streams": streams, "segments": segments}
    if not in_place:
        inputs["outs"] = [torch.zeros_like(x) for x in streams]

    def call(variant: Variant, x: dict) -> list[Tensor]:
        outs = x.get("outs", x["streams"])
        with mock.patch.object(segment_replace, "_native", variant.native):
            segment_replace._kernel(x["streams"], outs, x["segments"], options)
        return outs

    def by_reference(x: Tensor, rate: float, dim: int) -> Tensor:
        """Sample by sample, as float32 of all of them takes too much memory."""
        y = torch.empty_like(x)
        for b in range(batch):
            own = segment_replace.Segments(*(value[b : b + 1] for value in segments))
            own = own._replace(donor=own.donor * 0)
            y[b : b + 1] = segment_replace._reference(x[b : b + 1], own, rate, dim, 0.0)
        return y

    return Problem(
        inputs,
        call,
        lambda: [by_reference(*each) for each in zip(streams, rates, dims, strict=True)],
        relative=0.0,
        absolute=(0.0, 0.0),
        moved=int(2 * size(streams) * (share if in_place else 1)),
    )
