"""Compile the loss and the noise for sm_90 with every option; run by test_sass.py.

Triton's interpreter accepts more than its compiler does, so passing there is not enough.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch

from syncdpo.kernels import dpo_loss, paired_noise

SOURCE = Path(__file__).parent.parent / "benchmarks" / "sass.py"
spec = importlib.util.spec_from_file_location("sass", SOURCE)
sass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sass)

VIDEO, AUDIO = (4, 31, 16, 24), (4, 7, 33)
PLAIN = {
    "beta": [1.0, 2.0], "stream": [0, 1], "sign": [0, 0], "objective": "sigmoid",
    "separate": False, "normalize": False, "sft_weight": 0.0, "label_smoothing": 0.0,
    "interleaved": False, "mean": True, "stats": False,
}  # fmt: skip


def permuted(shape):
    return sass.empty(*shape[::-1], dtype=torch.bfloat16).permute(*range(len(shape))[::-1])


def loss(video=VIDEO, policy=None, clean=None, reference=True, mask=(None, None), weight=None,
         **changes):  # fmt: skip
    """Forward and backward over bf16 video and fp32 audio without memory."""
    options = SimpleNamespace(**PLAIN | changes)
    other = [sass.empty(*video, dtype=torch.bfloat16), sass.empty(*AUDIO)]
    policy = [other[0] if policy is None else policy, other[1]]
    target = [other[0] if clean is None else clean, other[1]]
    seed = [sass.empty(2, dtype=torch.int64) if sign else None for sign in options.sign]
    given = None if reference else sass.empty(2, 4)
    *_, slope = dpo_loss._fwd(
        policy, other if reference else [], target, seed, mask, given, weight, options
    )
    grad = sass.empty() if options.mean else sass.empty(2)
    dpo_loss._bwd(grad, slope, policy, target, seed, mask, options)


def noise(win, lose):
    seed, sigma = sass.empty(4, dtype=torch.int64), [sass.empty(4)] * len(win)
    paired_noise._paired_noise(win, lose, sigma, seed, 1)


MASK = [sass.empty(4, 1, 16, 1, dtype=torch.bool), sass.empty(33)]
HALF = sass.empty(2, *VIDEO[1:], dtype=torch.bfloat16)
SMALL, ODD = sass.empty(4, 8, 16), sass.empty(4, 5, 7)
LAUNCHES = {
    "plain": loss,
    "separate": lambda: loss(separate=True, sft_weight=0.1),
    "normalize": lambda: loss(normalize=True, separate=True),
    "hinge": lambda: loss(objective="hinge"),
    "ipo": lambda: loss(objective="ipo", stats=True),
    "smoothing": lambda: loss(label_smoothing=0.2, mean=False),
    "interleaved": lambda: loss(interleaved=True, mean=False, sft_weight=0.5),
    "mask": lambda: loss(mask=MASK, normalize=True, stats=True),
    "reference_error": lambda: loss(reference=False),
    "pair_weight": lambda: loss(weight=sass.empty(2)),
    "rebuilt": lambda: loss(sign=[1, -1]),
    "rebuilt and shared": lambda: loss(sign=[-1, 0], clean=HALF, stats=True),
    "permuted": lambda: loss(policy=permuted(VIDEO)),
    "permuted, rebuilt": lambda: loss(policy=permuted(VIDEO), sign=[1, 0]),
    "beyond 2³¹ elements": lambda: loss(video=(4, 70_000, 40_000)),
    "noise": lambda: noise([SMALL, ODD], [SMALL, None]),
    "noise, permuted": lambda: noise([SMALL.mT.contiguous().mT], [SMALL]),
    "noise, 1-D": lambda: noise([sass.empty(4)], [None]),
}

if __name__ == "__main__":
    for option, launch in LAUNCHES.items():
        for kernel, cubin in sass.compiled(launch, 90):
            (function,) = sass.functions(cubin)
            print(f"{option}: {kernel}, {function.registers} registers")
            assert function.spill_bytes == 0, f"{option}: {kernel} spills"
