"""replace_segments against the slicing that people write, torch.compile and plain copies.

    pytest benchmarks/bench_segment_replace.py

Two cases: raw clips (121 frames of 512 × 768 uint8, 48 kHz stereo) and LTX-2 latents. A quarter of
each clip is replaced. Every method is checked before it is timed. `GB/s` counts the bytes that must
move: each byte once in and once out, in place the replaced quarter only. `times as quick as` sets
it beside "copy", `copy_` of the same tensors, "memcpy", the C library's on as many threads, and
"kernel", this op out of place. On a CPU all use two threads, and that is the median over rounds in
which the two ran one after the other, so that other work on the machine falls on both; on CUDA it
is the ratio of two medians by events over a flushed cache.
"""

import ctypes
import itertools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from syncdpo.ops import Segments, replace_segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = 2
ROUNDS = 15
ROUNDS_OF_SLOW = 3
SECONDS = 5.0
SHARE = 0.25
METHODS = ["copy", "kernel", "in-place", "crossfade", "slicing", "compiled", "reference"]
PLAIN = ["copy", "kernel"]
SLOW = ["slicing", "compiled", "reference"]
if DEVICE == "cpu":
    METHODS.insert(0, "memcpy")
    PLAIN.insert(0, "memcpy")


def raw_clips(batch: int):
    generator = torch.Generator(DEVICE).manual_seed(0)
    video = torch.randint(
        0, 256, (batch, 121, 512, 768, 3), dtype=torch.uint8, device=DEVICE, generator=generator
    )
    audio = torch.randn(batch, 2, 242_000, device=DEVICE, generator=generator)
    return video, audio, {"video_rate": 24.0, "audio_rate": 48_000.0, "audio_dim": 2}


def latents(batch: int):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (batch, 16, 384, 128), (batch, 126, 128)
    video, audio = (
        torch.randn(shape, device=DEVICE, generator=generator).bfloat16() for shape in shapes
    )
    return video, audio, {"video_rate": 3.0, "audio_rate": 25.0}


CASES = {
    "raw": (raw_clips, 8 if DEVICE == "cuda" else 1),
    "latents": (latents, 128 if DEVICE == "cuda" else 8),
}


def segments_of(batch: int) -> Segments:
    sample = torch.arange(batch, device=DEVICE)
    start = 0.5 + sample / (2.0 * batch)
    length = torch.full_like(start, SHARE * SECONDS)
    return Segments(start, length, sample, start + 2 * length)


def frames(seconds: float, rate: float) -> int:
    return int(seconds * rate + 0.5)


def by_slicing(video, audio, rows, options):
    """What people write, given the segments as numbers on the host."""
    results = []
    for x, rate, dim in (
        (video, options["video_rate"], 1),
        (audio, options["audio_rate"], options.get("audio_dim", 1)),
    ):
        y = x.clone()
        target, source = y.transpose(1, dim), x.transpose(1, dim)
        for b, (start, length, donor, donor_start) in enumerate(rows):
            first, end = frames(start, rate), frames(start + length, rate)
            moved = frames(donor_start, rate)
            target[b, first:end] = source[donor, moved : moved + end - first]
        results.append(y)
    return tuple(results)


def memcpy(new, old):
    """The C library's, each tensor in as many parts as there are threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for y, x in zip(new, old, strict=True):
            cuts = [x.nbytes * part // THREADS for part in range(THREADS + 1)]
            addresses = [(y.data_ptr() + c, x.data_ptr() + c) for c in cuts[:-1]]
            sizes = [after - before for before, after in itertools.pairwise(cuts)]
            pool.map(ctypes.memmove, *zip(*addresses, strict=True), sizes)
    return new


def methods(video, audio, options):
    segments = segments_of(len(video))
    rows = list(zip(*(value.tolist() for value in segments), strict=True))
    new, place = [(torch.empty_like(video), torch.empty_like(audio)) for _ in range(2)]
    place[0].copy_(video), place[1].copy_(audio)
    compiled = torch.compile(by_slicing)

    def copy():
        return tuple(y.copy_(x) for y, x in zip(new, (video, audio), strict=True))

    return {
        "memcpy": lambda: memcpy(new, (video, audio)),
        "copy": copy,
        "kernel": lambda: replace_segments(video, audio, segments, out=new, **options),
        "in-place": lambda: replace_segments(*place, segments, out=place, **options),
        "crossfade": lambda: replace_segments(
            video, audio, segments, out=new, crossfade=0.05, **options
        ),
        "slicing": lambda: by_slicing(video, audio, rows, options),
        "compiled": lambda: compiled(video, audio, rows, options),
        "reference": lambda: replace_segments(video, audio, segments, impl="reference", **options),
    }


def finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function) -> float:
    finish()
    begin = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - begin


def launch_microseconds(function, calls: int = 100) -> float:
    """What a call costs the CPU, while the GPU is busy with the calls before."""
    finish()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls * 1e6


def times_as_quick(function, other, rounds: int) -> float:
    return statistics.median(seconds(other) / seconds(function) for _ in range(rounds))


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_replace_segments(benchmark, median_of, case, method):
    make, batch = CASES[case]
    video, audio, options = make(batch)
    functions = methods(video, audio, options)
    if method != "crossfade":
        plain = method in ("copy", "memcpy")
        expected = (video, audio) if plain else functions["reference"]()
        assert all(map(torch.equal, functions[method](), expected))
        del expected

    def timed():
        functions[method]()
        finish()

    rounds = ROUNDS_OF_SLOW if method in SLOW else ROUNDS
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
    share = SHARE if method == "in-place" else 1
    function = functions[method]
    if DEVICE == "cuda":
        median = median_of(function) / 1e3
        quick = {name: median_of(functions[name]) / 1e3 / median for name in PLAIN}
    else:
        median = benchmark.stats.stats.median
        quick = {name: times_as_quick(function, functions[name], rounds) for name in PLAIN}
    quick = {name: round(ratio, 3) for name, ratio in quick.items()}
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "shapes": [list(video.shape), list(audio.shape)],
        "ms": round(median * 1e3, 4),
        "GB/s": round(2 * (video.nbytes + audio.nbytes) * share / median / 1e9, 2),
        "of copy": round(quick["copy"] * share, 3),
        "times as quick as": quick,
    }
    if DEVICE == "cuda":
        benchmark.extra_info["launch µs"] = round(launch_microseconds(function), 2)
    print(f"\n{case} {method}: {benchmark.extra_info}")
