"""paired_noise against eager PyTorch and torch.compile, winner and loser apart or shared.

    pytest benchmarks/bench_paired_noise.py

The other ways draw ε with torch.randn, which is stored. The op's result is checked before timing.
"""

import pytest
import torch

from syncdpo.ops import noise, paired_noise

AUDIO = (126, 128)
CASES = {"long-B4": (4, (32768, 128)), "clip-B1": (1, (6144, 128))}
if not torch.cuda.is_available():
    CASES = {"small-B1": (1, (384, 128))}


def eager(win, lose, sigma, seed):
    noised = []
    for x, y in zip(win, lose, strict=True):
        level = sigma[:, None, None].to(x.dtype)
        scaled = level * torch.randn_like(x)
        halves = [(1 - level) * x + scaled, (1 - level) * (x if y is None else y) + scaled]
        noised.append(torch.cat(halves))
    return noised


WAYS = {"eager": eager, "compile": eager, "syncdpo": paired_noise}


def check(win, lose, sigma, seed):
    """Two roundings of bfloat16 from noise and interpolation."""
    for stream, (x, y, noised) in enumerate(
        zip(win, lose, paired_noise(win, lose, sigma, seed), strict=True)
    ):
        level = sigma[:, None, None]
        scaled = level * noise(x.shape, seed, stream=stream)
        halves = [(1 - level) * z.float() + scaled for z in (x, x if y is None else y)]
        torch.testing.assert_close(noised.float(), torch.cat(halves), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("case", CASES)
def test_paired_noise(measure, device, case, shared, way):
    torch._dynamo.reset()
    batch, video = CASES[case]
    shapes = [(batch, *shape) for shape in (video, AUDIO)]
    win, lose = (
        [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
        for _ in range(2)
    )
    lose = [None] * len(win) if shared else lose
    sigma, seed = torch.rand(batch, device=device), torch.arange(batch, device=device)
    check(win, lose, sigma, seed)
    run = torch.compile(eager) if way == "compile" else WAYS[way]
    # Winner and loser are read, or one for both; two halves are written.
    bytes_of_one = sum(x.numel() * x.element_size() for x in win)
    must_move = (3 if shared else 4) * bytes_of_one
    ours = way == "syncdpo"
    measure(lambda: run(win, lose, sigma, seed), must_move, compiled=way == "compile", graph=ours)
