"""A training by the kernels against the same training by the references: one and the same run.

Twenty steps of `syncdpo.train.train`, once as a GPU runs them (or, without one, by the kernels in
Triton's interpreter), once on the CPU by the references. They may part only as far as rounding
carries them, and how far that is no number here says. The references run three times more, each
time with two errors put in that the kernels' run may have and theirs has not:

- ε is off by all that the noise's own test grants the approximate instructions of a GPU: outwards,
  inwards, or either way;
- what every layer gives, and the gradient that it is given, is off by √K units in the last place,
  the bound of the error of a sum of K terms whose rounding errors are independent (Higham and Mary,
  SIAM J. Sci. Comput. 41, 2019); the knots of the warps by one.

The largest distance that these three come to is the bound for the kernels.

Each training runs in a process of its own, since accelerate settles on a device once, and Triton on
its interpreter: `python tests/training/test_trained_by_kernels.py KIND FOLDER` is such a process.
"""

import math
import os
import subprocess
import sys
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

for package in ("av", "diffusers", "tensorboard"):
    pytest.importorskip(package, reason=f"{package}: trainings need it; see syncdpo's extra, train")

# ruff: noqa: E402
from micro import micro_model, outcome, random_latents
from oracles import approximation, radii
from processes import PYTHONPATH

from syncdpo import ops
from syncdpo.models.tiny import Tiny
from syncdpo.negatives import PairDraw, distortion
from syncdpo.negatives.distortion import REPLACE
from syncdpo.ops.temporal_warp import resample
from syncdpo.train import train
from syncdpo.training.config import TrainConfig
from syncdpo.training.dice import Dice

STEPS, CLIPS, PAIRS = 20, 10, 2
# Both streams count, and weights move: a margin of 0 would hide what is wrong with the loss.
SETTINGS = {"beta_video": 10.0, "beta_audio": 10.0, "learning_rate": 1e-4}
COMPARED = (
    "loss", "margin", "grad_norm", "video_error_win", "video_error_lose", "audio_error_win",
    "audio_error_lose",
)  # fmt: skip
EXACT = ("difficulty", "valid", "skipped")
RESULT = "runs.pt"
ULP = torch.finfo(torch.float32).eps
OFF = ("outwards", "inwards", "either way")  # where ε goes in the three runs with errors
# Attention to the one text token is 1, whatever queries and keys are: their gradient is rounding,
# if anything, and AdamW makes whole steps of it.
WITHOUT_GRADIENT = ("attn2.to_q", "attn2.to_k", "attn2.norm_q", "attn2.norm_k")
WORKED_OUT = ("knots", "start", "length", "donor_start")  # on the device, from what was drawn

ENVIRONMENTS = {
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    "interpreter": {"TRITON_INTERPRET": "1", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""},
    "references": {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""},
}


class Run(NamedTuple):
    """What a training leaves behind; every tensor on the CPU.

    `rolls` and `pairs` per step: what was drawn, and the winners and losers made of it. `calls`:
    how often each kernel's launcher was called.
    """

    log: list[dict[str, float]]
    weights: dict[str, Tensor]
    rolls: list[dict[str, Tensor]]
    pairs: list[list[Tensor]]
    calls: dict[str, int]
    device: str
    precision: str


# ---------------------------------------------------------------- the tests


def finished(kind: str, folder: Path) -> dict[str, Run]:
    """The trainings of that kind, run in a process of its own."""
    elsewhere = {name for environment in ENVIRONMENTS.values() for name in environment}
    own = {"CUDA_VISIBLE_DEVICES"} if kind == "cuda" else set()  # which GPU, if there are several
    environment = {k: v for k, v in os.environ.items() if k not in elsewhere - own}
    command = [sys.executable, Path(__file__).resolve(), kind, folder]
    done = subprocess.run(
        command, env=environment | ENVIRONMENTS[kind] | {"PYTHONPATH": PYTHONPATH},
        capture_output=True, text=True, timeout=600, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    runs = torch.load(folder / RESULT, weights_only=True)
    return {name: Run(**run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return finished("references", tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="module", params=["cuda", "interpreter"])
def by_kernels(request, tmp_path_factory):
    """The training by the kernels, where it can run here."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("cuda: needs a GPU; the interpreter runs the same kernels without one")
    if request.param == "interpreter" and (
        version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    ):
        pytest.skip(
            "interpreter: with this numpy, Triton 3.6 interprets no loop whose bound a kernel "
            "computes; numpy below 2.4 or Triton 3.7 do"
        )
    (run,) = finished(request.param, tmp_path_factory.mktemp(request.param)).values()
    assert run.device == ("cuda" if request.param == "cuda" else "cpu")
    return run


def test_kernels_trained_here_and_references_there(by_kernels, references):
    """Else the two would be one, and agree for nothing."""
    expected = dict.fromkeys(("paired_noise", "dpo_loss", "dpo_loss backward"), STEPS)
    calls = dict(by_kernels.calls)
    assert calls.pop("warp") >= STEPS
    assert calls.pop("replace_segments") >= STEPS
    assert calls == expected
    for run in references.values():
        assert run.device == "cpu"
        assert not run.calls
    assert {run.precision for run in (by_kernels, *references.values())} == {"highest"}


def test_the_same_is_drawn_everywhere(by_kernels, references):
    """Clips, noise levels, seeds and rules are functions of (seed, step), to the bit; a map of time
    is worked out from them with a logarithm and an exponential, which may differ in their last
    bits."""
    theirs = references["plain"]
    assert len(by_kernels.rolls) == len(theirs.rolls) == STEPS
    for ours, other in zip(by_kernels.rolls, theirs.rolls, strict=True):
        assert ours.keys() == other.keys()
        for name, tensor in ours.items():
            if name.endswith(WORKED_OUT):
                atol = 8 * ULP * other[name].abs().max().item()
                torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol)
            else:
                assert torch.equal(tensor, other[name]), name


def test_the_same_pairs_are_made(by_kernels, references):
    """What is replaced has the same bits. A warp reads at times that may be off by their last bits,
    and blends two frames by them."""
    kinds = Counter()
    theirs = references["plain"]
    for roll, *both in zip(theirs.rolls, by_kernels.pairs, theirs.pairs, strict=True):
        replaced = roll["φ₂ rule"] == REPLACE
        kinds.update(replaced.tolist())
        for ours, other in zip(*both, strict=True):
            assert torch.equal(ours[replaced], other[replaced])
            atol = 2 * other.abs().max().item() * other.shape[1] * 8 * ULP
            torch.testing.assert_close(ours, other, rtol=0, atol=atol)
    assert min(kinds[True], kinds[False]) >= STEPS / 2  # both rules had their share


@pytest.mark.parametrize("name", COMPARED)
def test_every_step_is_the_same_to_rounding(by_kernels, references, name):
    plain = column(references["plain"], name)
    moved = torch.stack([column(references[off], name) for off in OFF])
    # Of all steps together: that some of them stay close by chance means nothing.
    bound = (moved - plain).abs().max() + ULP * plain.abs().max()
    distance = (column(by_kernels, name) - plain).abs().max()
    print(f"{name}: {distance:.2g} from the references', {bound:.2g} allowed")
    assert 0 < bound < 1e-4 * plain.abs().max()  # or it would allow whatever a kernel does
    assert distance <= bound


@pytest.mark.parametrize("name", EXACT)
def test_what_no_rounding_may_change(by_kernels, references, name):
    assert torch.equal(column(by_kernels, name), column(references["plain"], name))


def test_the_weights_are_the_same_to_rounding(by_kernels, references):
    plain = references["plain"].weights
    bound = max(apart(references[off].weights, plain) for off in OFF)
    way, distance = apart(initial_weights(), plain), apart(by_kernels.weights, plain)
    print(f"weights: {distance:.2g} from the references', {bound:.2g} allowed, moved by {way:.2g}")
    assert 0 < bound < 1e-3 * way
    assert distance <= bound


def column(run: Run, name: str) -> Tensor:
    assert len(run.log) == STEPS
    return torch.tensor([entry[name] for entry in run.log], dtype=torch.float64)


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The distance between two models' weights, all that have a gradient as one vector."""
    assert first.keys() == second.keys()
    counted = [name for name in first if not any(part in name for part in WITHOUT_GRADIENT)]
    assert len(counted) < len(first)
    squares = [(first[name].double() - second[name]).square().sum().item() for name in counted]
    return math.sqrt(sum(squares))


def initial_weights() -> dict[str, Tensor]:
    return micro_model().transformer.state_dict()


# ---------------------------------------------------------------- one training, in its process


def train_once(folder: Path, model: Tiny, patch: pytest.MonkeyPatch) -> Run:
    """Twenty steps on latents of the embedded model's shapes, by one layer of it."""
    config = TrainConfig(output=str(folder), steps=STEPS, batch_size=PAIRS, warmup=2, **SETTINGS)
    rolls, pairs, calls = recorded_draws(patch), recorded_pairs(patch), counted_launches(patch)
    # By matrix products and a softmax: the other ways add up in no fixed order on a GPU.
    with sdpa_kernel(SDPBackend.MATH):
        train(config, model, random_latents(CLIPS), progress=False)
    device = next(model.transformer.parameters()).device.type
    precision = torch.get_float32_matmul_precision()
    return Run(*outcome(folder), rolls, pairs, dict(calls), device, precision)


def recorded_draws(patch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    rolls, roll = [], Dice.roll

    def recorded(self, step: int, micro: int):
        drawn = roll(self, step, micro)
        own = {"clips": drawn.clips, "seed": drawn.seed, "matched": drawn.pairs.matched}
        own |= {f"sigma {stream}": sigma for stream, sigma in enumerate(drawn.sigma)}
        for name, own_map in (("φ₁", drawn.pairs.first), ("φ₂", drawn.pairs.second)):
            own |= {f"{name} {part}": getattr(own_map, part) for part in (*WORKED_OUT, "rule")}
        rolls.append({name: tensor.cpu() for name, tensor in own.items()})
        return drawn

    patch.setattr(Dice, "roll", recorded)
    return rolls


def recorded_pairs(patch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    pairs, make = [], PairDraw.make

    def recorded(self, video: Tensor, audio: Tensor):
        made = make(self, video, audio)
        pairs.append([x.cpu() for x in (*made.win, *made.lose)])
        return made

    patch.setattr(PairDraw, "make", recorded)
    return pairs


def counted_launches(patch: pytest.MonkeyPatch) -> Counter:
    from syncdpo.kernels import dpo_loss, paired_noise, temporal_warp

    calls = Counter()
    launchers = {
        "paired_noise": (paired_noise, "_paired_noise"),
        "dpo_loss": (dpo_loss, "_fwd"),
        "dpo_loss backward": (dpo_loss, "_bwd"),
        "warp": (temporal_warp, "warp_fwd"),
        "replace_segments": (import_module("syncdpo.ops.segment_replace"), "_kernel"),
    }

    def counted(name: str, launch):
        def call(*arguments, **options):
            calls[name] += 1
            return launch(*arguments, **options)

        return call

    for name, (module, launcher) in launchers.items():
        patch.setattr(module, launcher, counted(name, getattr(module, launcher)))
    return calls


def use(implementation: str) -> None:
    """From here on every op runs as if it had been asked for `implementation`."""
    for op in (ops.dpo_loss, ops.paired_noise, ops.noise, ops.replace_segments, resample):
        op.__kwdefaults__["impl"] = implementation


# ---------------------------------------------------------------- errors put in


def hashed(x: Tensor, salt: int) -> Tensor:
    """Numbers between −1 and 1 that look random, but are a function of each element's bits.

    So where policy and reference agree to the bit their errors do too, as on any device; where
    they do not, their errors have nothing in common.
    """
    word = x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    for factor in (0x9E3779B1, 0x85EBCA77):
        word = (word ^ word >> 15 ^ salt) * factor & 0xFFFFFFFF
    return (word.double() / 2**31 - 1).to(x.dtype)


def off_by_ulps(x: Tensor, salt: int, ulps: float) -> Tensor:
    """x, off by up to so many units in the last place of its root mean square, either way."""
    return x + hashed(x, salt) * (ulps * ULP * x.square().mean().sqrt())


class OffByUlps(torch.autograd.Function):
    """`off_by_ulps`, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, salt: int, ulps: float) -> Tensor:
        ctx.salt, ctx.ulps = salt, ulps
        return off_by_ulps(x, salt, ulps)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return off_by_ulps(gradient, ctx.salt, ctx.ulps), None, None


def put_errors_into_layers(model, salt: int) -> None:
    def hook(module, given, output):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        return OffByUlps.apply(output, module.salt, math.sqrt(given[0].shape[-1]))

    leaves = [m for m in model.transformer.modules() if not list(m.children())]
    for place, module in enumerate(leaves):
        module.salt = salt * 1000 + place
        module.register_forward_hook(hook)


def put_errors_into_noise(patch: pytest.MonkeyPatch, off: str, salt: int) -> None:
    paired_noise = import_module("syncdpo.ops.paired_noise")
    exact = paired_noise.noise_reference

    def moved(shape, seed: Tensor, stream: int) -> Tensor:
        noise = exact(shape, seed, stream)
        most = approximation(radii(noise.double().flatten(1))).reshape(noise.shape)
        away = {"outwards": noise, "inwards": -noise, "either way": hashed(noise, salt)}[off]
        return (noise + away.sign() * most).float()

    for module in (paired_noise, import_module("syncdpo.ops._dpo_reference")):
        patch.setattr(module, "noise_reference", moved)


def put_errors_into_warps(patch: pytest.MonkeyPatch, salt: int) -> None:
    def moved(x: Tensor, knots: Tensor, **options) -> Tensor:
        return resample(x, off_by_ulps(knots, salt, 1.0), **options)

    patch.setattr(distortion, "resample", moved)


# ---------------------------------------------------------------- the process


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # no TF32
    # What has no such algorithm warns: an attempt at one run is better than none at any.
    torch.use_deterministic_algorithms(True, warn_only=True)
    use({"cuda": "auto", "interpreter": "kernel", "references": "reference"}[kind])
    with pytest.MonkeyPatch.context() as patch:
        runs = {"plain": train_once(folder / "plain", micro_model(), patch)}
    for salt, off in enumerate(OFF if kind == "references" else (), start=1):
        model = micro_model()
        with pytest.MonkeyPatch.context() as patch:
            put_errors_into_layers(model, salt)
            put_errors_into_noise(patch, off, salt)
            put_errors_into_warps(patch, salt)
            runs[off] = train_once(folder / off, model, patch)
    torch.save({name: run._asdict() for name, run in runs.items()}, folder / RESULT)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
