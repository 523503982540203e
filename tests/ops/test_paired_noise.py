import math

import pytest
import torch
from oracles import approximation, radii

from syncdpo.ops import noise, paired_noise
from syncdpo.ops.paired_noise import philox4x32

ALL_ONES = 0xFFFFFFFF

# Random123's published vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

EXTREME_SEEDS = [0, -1, 2**63 - 1, -(2**63), 1 << 32, 0xFFFFFFFF]


def scalars(words):
    return [torch.tensor(word) for word in words]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert [int(w) for w in philox4x32(scalars(counter), scalars(key))] == list(expected)


def test_noise_is_box_muller_of_philox(impl, device):
    """Every step by hand with Python's integers and floats, for seeds at the ends of int64."""
    seed = torch.tensor(EXTREME_SEEDS, device=device)
    actual = noise((len(seed), 8), seed, stream=ALL_ONES, impl=impl).cpu().double()
    expected = torch.empty_like(actual)
    for b, s in enumerate(EXTREME_SEEDS):
        for counter in range(2):
            key = scalars((s & ALL_ONES, s >> 32 & ALL_ONES))
            words = [int(w) for w in philox4x32(scalars((counter, 0, 0, ALL_ONES)), key)]
            for pair in range(2):
                uniform = (words[2 * pair] + 0.5) / 2**32
                angle = 2 * math.pi * words[2 * pair + 1] / 2**32
                radius = math.sqrt(-2 * math.log(uniform))
                first = 4 * counter + 2 * pair
                expected[b, first : first + 2] = radius * torch.tensor(
                    [math.cos(angle), math.sin(angle)], dtype=torch.float64
                )
    # float32 takes the uniform's word to 24 bits: near 1 that moves the logarithm by 2⁻²⁴.
    assert ((actual - expected).abs() <= approximation(radii(expected)) + 2.0**-22).all()


def test_noise_is_standard_normal(impl, device):
    count = 1 << 16 if impl == "reference" or device == "cuda" else 1 << 14
    e = noise((1, count), torch.tensor([7], device=device), impl=impl).double().flatten()
    moments = torch.stack([e.pow(k).mean() for k in (1, 2, 3, 4)]).cpu()
    spread = torch.tensor([1.0, 2.0, 15.0, 96.0]).sqrt() / count**0.5
    assert ((moments - torch.tensor([0.0, 1.0, 0.0, 3.0])).abs() < 5 * spread).all()
    lag = (e[1:] * e[:-1]).mean().abs()
    assert lag < 5 / count**0.5


def test_streams_and_seeds_differ(impl, device):
    seed = torch.tensor([1, 2], device=device)
    e = noise((2, 40), seed, impl=impl)
    other = noise((2, 40), seed, stream=1, impl=impl)
    assert not torch.isclose(e, other).any()
    assert not torch.isclose(e[0], e[1]).any()


def test_any_split_of_the_batch_gives_the_same_bits(impl, device):
    seed = torch.tensor(EXTREME_SEEDS, device=device)
    whole = noise((len(seed), 3, 7), seed, impl=impl)
    parts = [noise((1, 3, 7), s[None], impl=impl) for s in seed]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.flatten(1)[:, :9], noise((len(seed), 9), seed, impl=impl))


def test_modalities_take_consecutive_streams_and_their_own_sigma(impl, device):
    seed = torch.tensor([5, 6], device=device)
    video, audio = torch.randn(2, 3, 4, device=device), torch.randn(2, 7, device=device)
    sigma = [torch.tensor([0.2, 0.9], device=device), torch.tensor([0.5, 0.0], device=device)]
    both = paired_noise([video, audio], [None, -audio], sigma, seed, stream=4, impl=impl)
    assert isinstance(both, tuple)
    assert torch.equal(both[0], paired_noise(video, None, sigma[0], seed, stream=4, impl=impl))
    assert torch.equal(both[1], paired_noise(audio, -audio, sigma[1], seed, stream=5, impl=impl))
    assert torch.equal(both[1][[1, 3]], torch.stack([audio[1], -audio[1]]))


def call(impl="reference", shape=(2, 3, 5)):
    return {
        "win": torch.randn(shape),
        "lose": torch.randn(shape),
        "sigma": torch.rand(shape[0]),
        "seed": torch.arange(shape[0]),
        "impl": impl,
    }


BAD_INPUTS = {
    "lose_shape": ({"lose": torch.zeros(2, 3)}, ValueError, r"lose\[0\].*\[2, 3, 5\].*\[2, 3\]"),
    "lose_dtype": (
        {"lose": torch.zeros(2, 3, 5).half()},
        TypeError,
        r"lose\[0\].*float32.*float16",
    ),
    "win_dtype": ({"win": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"win\[0\].*int64"),
    "win_float64": ({"win": torch.zeros(2, 3).double()}, TypeError, r"win\[0\].*float64"),
    "win_kind": ({"win": [3.0], "lose": None}, TypeError, r"win\[0\].*float"),
    "no_batch": ({"win": torch.tensor(1.0)}, ValueError, r"win\[0\].*scalar"),
    "no_modality": ({"win": [], "lose": None}, ValueError, r"win.*empty"),
    "batches": (
        {"win": [torch.zeros(2, 3), torch.zeros(3, 3)], "lose": None},
        ValueError,
        r"win\[1\].*2.*\[3, 3\]",
    ),
    "sigma_shape": ({"sigma": torch.rand(3)}, ValueError, r"sigma\[0\].*\[2\].*\[3\]"),
    "sigma_dtype": ({"sigma": torch.rand(2).double()}, TypeError, r"sigma\[0\].*float64"),
    "sigma_count": ({"sigma": [torch.rand(2)] * 2}, ValueError, r"sigma.*\(1\).*2"),
    "lose_count": ({"lose": [None, None]}, ValueError, r"lose.*\(1\).*2"),
    "seed_dtype": ({"seed": torch.arange(2).int()}, TypeError, r"seed.*int64.*int32"),
    "seed_length": ({"seed": torch.arange(3)}, ValueError, r"seed.*\[2\].*\[3\]"),
    "stream_kind": ({"stream": 1.0}, TypeError, r"stream.*int.*float"),
    "stream_range": ({"stream": 1 << 32}, ValueError, r"stream.*4294967295.*4294967296"),
    "impl": ({"impl": "triton"}, ValueError, r"impl.*'auto'.*'triton'"),
    "device": ({"seed": torch.arange(2, device="meta")}, ValueError, r"seed.*cpu.*meta"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_say_what_was_expected(case):
    change, error, message = BAD_INPUTS[case]
    arguments = call() | change
    positional = [arguments.pop(name) for name in ("win", "lose", "sigma", "seed")]
    with pytest.raises(error, match=message):
        paired_noise(*positional, **arguments)


def test_noise_refuses_bad_inputs():
    with pytest.raises(ValueError, match=r"shape.*batch"):
        noise((), torch.arange(1))
    with pytest.raises(ValueError, match=r"2\*\*34"):
        noise((1, 2**34 + 1), torch.arange(1))
    with pytest.raises(TypeError, match=r"seed.*list"):
        noise((1, 2), [3])


def test_opcheck(impl, device):
    seed = torch.arange(2, device=device)
    win, lose = torch.randn(2, 2, 3, 5, device=device)
    sigma = torch.rand(2, device=device)
    torch.library.opcheck(torch.ops.syncdpo.noise, ((2, 3, 5), seed, 0, impl))
    modalities = ([win, lose], [lose, None], [sigma, sigma])
    torch.library.opcheck(torch.ops.syncdpo.paired_noise, (*modalities, seed, 0, impl))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(device, dynamic):
    torch._dynamo.reset()

    def step(win, lose, sigma, seed):
        return paired_noise([win, lose], [lose, None], sigma, seed)[0] + noise(
            (2 * win.shape[0], *win.shape[1:]), torch.cat([seed, seed])
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        win, lose = torch.randn(2, batch, 3, 5, device=device)
        sigma, seed = torch.rand(batch, device=device), torch.arange(batch, device=device)
        expected = step(win, lose, sigma, seed)
        torch.testing.assert_close(compiled(win, lose, sigma, seed), expected)
