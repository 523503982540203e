"""replace_segments against the slicing that people write, torch.compile and a plain copy.

    pytest benchmarks/bench_segment_replace.py

Two cases: raw clips (121 frames of 512 × 768 uint8, 48 kHz stereo) and LTX-2 latents. A quarter of
each clip is replaced. Every method is checked before it is timed. GB/s counts the bytes that must
move: each byte once in and once out, in place the replaced quarter only; `of copy` is the share of
the speed at which `copy_` moves the same tensors.
"""

import statistics
import time

import pytest
import torch

from syncdpo.ops import Segments, replace_segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 9
SECONDS = 5.0
SHARE = 0.25


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


CASES = {"raw": (raw_clips, 16 if DEVICE == "cuda" else 2), "latents": (latents, 8)}


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


def methods(video, audio, options):
    segments = segments_of(len(video))
    rows = list(zip(*(value.tolist() for value in segments), strict=True))
    new, place = [(torch.empty_like(video), torch.empty_like(audio)) for _ in range(2)]
    place[0].copy_(video), place[1].copy_(audio)
    compiled = torch.compile(by_slicing)

    def copy():
        return tuple(y.copy_(x) for y, x in zip(new, (video, audio), strict=True))

    return {
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


def median_seconds(function) -> float:
    times = []
    for _ in range(ROUNDS):
        finish()
        begin = time.perf_counter()
        function()
        finish()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@pytest.mark.parametrize(
    "method", ["copy", "kernel", "in-place", "crossfade", "slicing", "compiled", "reference"]
)
@pytest.mark.parametrize("case", CASES)
def test_replace_segments(benchmark, case, method):
    make, batch = CASES[case]
    video, audio, options = make(batch)
    functions = methods(video, audio, options)
    expected = functions["reference"]()
    if method not in ("copy", "crossfade"):
        assert all(map(torch.equal, functions[method](), expected))
    del expected

    def timed():
        functions[method]()
        finish()

    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=2)
    stream_bytes = video.nbytes + audio.nbytes
    moved = 2 * stream_bytes * (SHARE if method == "in-place" else 1)
    rate = moved / benchmark.stats.stats.median
    copy_rate = 2 * stream_bytes / median_seconds(functions["copy"])
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "shapes": [list(video.shape), list(audio.shape)],
        "GB/s": round(rate / 1e9, 2),
        "of copy": round(rate / copy_rate, 3),
    }
    print(f"\n{case} {method}: {benchmark.extra_info}")
