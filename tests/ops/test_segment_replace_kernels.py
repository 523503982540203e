"""The kernels of replace_segments against its reference, bit for bit."""

import random
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from syncdpo.ops import Segments, replace_segments
from syncdpo.ops.segment_replace import DTYPES, _native

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PLACES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def rows(start, length, donor, donor_start, device="cpu") -> Segments:
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (start, length, donor, donor_start)]
    tensors[2] = tensors[2].long()
    return Segments(*(x.to(device) for x in tensors))


def replace_one(x, segments, rate=1.0, dim=1, **options) -> Tensor:
    options = {"video_rate": rate, "audio_rate": None, "video_dim": dim, **options}
    return replace_segments(x, None, segments, **options)[0]


# ---------------------------------------------------------------- random cases


class Layout(NamedTuple):
    """A view of a storage: axes in any order in memory, with gaps, at an offset."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    span: int

    def view(self, storage: Tensor) -> Tensor:
        return storage.as_strided(self.shape, self.stride, self.offset)


class Case(NamedTuple):
    x: Tensor
    storage: Tensor
    layout: Layout
    out: Layout
    segments: Segments
    rate: float
    dim: int
    crossfade: float
    clip: bool


def random_layout(draw: random.Random, shape: tuple[int, ...], dense: bool) -> Layout:
    order = list(range(1, len(shape)))
    if draw.random() < 0.5:
        draw.shuffle(order)
    order.insert(0 if dense or draw.random() < 0.7 else draw.randrange(len(shape)), 0)
    stride, size = [0] * len(shape), 1
    for dim in reversed(order):
        size *= 1 if dense else draw.choice([1, 1, 1, 2])
        stride[dim] = size
        size *= shape[dim]
    offset = draw.randrange(17)
    return Layout(shape, tuple(stride), offset, offset + size)


def random_values(draw: random.Random, dtype: torch.dtype, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(2**40))
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, (count,), generator=generator, dtype=dtype)


def random_segments(draw: random.Random, batch: int, seconds: float, clip: bool) -> Segments:
    count = draw.choice([1, 1, 2, 3])
    dtype = draw.choice([torch.float32, torch.float64])
    longest = seconds * (1.4 if clip else 0.999)

    def times(highest):
        return [[draw.uniform(0, limit) for limit in sample] for sample in highest]

    length = times([[longest * draw.choice([0.2, 1.0])] * count for _ in range(batch)])
    room = [[seconds if clip else seconds * 0.999 - n for n in sample] for sample in length]
    start, donor_start = times(room), times(room)
    donor = [
        [b if draw.random() < 0.5 else draw.randrange(batch) for _ in range(count)]
        for b in range(batch)
    ]
    tensors = (torch.tensor(x, dtype=dtype) for x in (start, length, donor_start))
    start, length, donor_start = (x.clamp(min=0) for x in tensors)
    return Segments(start, length, torch.tensor(donor), donor_start)


def random_case(seed: int, clip: bool | None = None) -> Case:
    draw = random.Random(seed)
    dtype = draw.choice(list(DTYPES))
    rate = draw.choice([1.0, 3.0, 24.0, 29.97])
    frames = draw.randint(1, draw.choice([4, 40]))
    axes = draw.randint(2, 5)
    dim = draw.randrange(1, axes)
    largest = draw.choice([3, 16]) if axes > 3 else draw.choice([3, 40])
    shape = [draw.randint(1, 3), *(draw.randint(1, largest) for _ in range(axes - 1))]
    shape[dim] = frames
    dense = draw.random() < 0.5
    layout = random_layout(draw, tuple(shape), dense)
    out = layout if dense else random_layout(draw, tuple(shape), draw.random() < 0.5)
    storage = random_values(draw, dtype, layout.span)
    clip = draw.random() < 0.3 if clip is None else clip
    crossfade = draw.choice([0.0, 0.0, 0.1, 1.0, 5.0]) * draw.random()
    segments = random_segments(draw, shape[0], frames / rate, clip)
    x = layout.view(storage)
    return Case(x, storage, layout, out, segments, rate, dim, crossfade, clip)


def run_case(case: Case, x: Tensor, **options) -> Tensor:
    given = {"rate": case.rate, "dim": case.dim, "crossfade": case.crossfade, "clip": case.clip}
    return replace_one(x, case.segments, **given, **options)


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """How many representable numbers lie between the two that are furthest apart."""
    if not a.is_floating_point():
        return int((a.long() - b.long()).abs().amax())
    bits = torch.int32 if a.dtype is torch.float32 else torch.int16
    lowest = torch.iinfo(bits).min
    ordered = (x.cpu().view(bits).long() for x in (a, b))
    ordered = [torch.where(x < 0, lowest - x, x) for x in ordered]
    return int((ordered[0] - ordered[1]).abs().amax())


@pytest.mark.parametrize("place", PLACES)
def test_kernel_has_the_bits_of_the_reference(place):
    for seed in range(1000):
        case = random_case(seed)
        expected = run_case(case, case.x, impl="reference")
        # A cosine of CUDA's own may round a weight the other way.
        allowed = int(place == "cuda" and case.crossfade > 0 and expected.is_floating_point())
        case = case._replace(segments=Segments(*(value.to(place) for value in case.segments)))
        storage = case.storage.to(place)
        x = case.layout.view(storage)
        elsewhere = case.out.view(torch.zeros(case.out.span, dtype=x.dtype, device=place))
        gaps = storage.clone()
        in_place = case.layout.view(gaps)
        for out in (None, elsewhere, in_place):
            source = in_place if out is in_place else x
            y = run_case(case, source, out=None if out is None else (out, None), impl="kernel")
            assert ulps_apart(y.contiguous(), expected.to(place)) <= allowed, seed
        in_place.copy_(x)
        assert torch.equal(gaps, case.storage.to(place)), f"{seed}: written outside the view"
        assert torch.equal(storage, case.storage.to(place)), f"{seed}: the input was changed"


def write_case(case: Case) -> bytes:
    """As tests/native/segment_replace_host.cpp reads it."""
    item = case.x.element_size()
    segments = case.segments
    axes = [*case.x.shape, *case.layout.stride, *case.out.stride]
    offsets = [case.layout.offset * item, case.out.offset * item]
    sizes = [case.layout.span * item, case.out.span * item]
    is_double = segments.start.dtype == torch.float64
    return b"".join(
        (
            struct.pack("3q d", *segments.start.shape, is_double, case.crossfade),
            *(value.numpy().tobytes() for value in segments),
            struct.pack("3q", DTYPES[case.x.dtype], case.dim, case.x.ndim),
            struct.pack(f"{len(axes)}q d 4q", *axes, case.rate, *offsets, *sizes),
            case.storage.view(torch.uint8).numpy().tobytes(),
        )
    )


def expected_bytes(case: Case) -> bytes:
    """Out of place and in place: by the CPU kernel, then by the body of the CUDA kernel."""
    y = run_case(case, case.x, impl="reference")
    out = torch.full((case.out.span * y.element_size(),), 0x55, dtype=torch.uint8)
    case.out.view(out.view(y.dtype)).copy_(y)
    in_place = case.storage.clone()
    case.layout.view(in_place).copy_(y)
    place = in_place.view(torch.uint8).numpy().tobytes()
    return (out.numpy().tobytes() + place) * 2


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler, "a C++ compiler is needed"
    binary = tmp_path_factory.mktemp("native") / "segment_replace_host"
    sources = (ROOT / "csrc/segment_replace.cpp", TESTS / "native/segment_replace_host.cpp")
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        "-pthread",
    ]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, *sources, "-o", binary], check=True)
    return binary


def test_both_kernels_on_the_host_under_sanitizers(sanitized, tmp_path):
    cases = [random_case(seed) for seed in range(10_000, 15_000)]
    written, results = tmp_path / "cases", tmp_path / "results"
    written.write_bytes(struct.pack("q", len(cases)) + b"".join(map(write_case, cases)))
    subprocess.run([sanitized, written, results], check=True)
    got, position = results.read_bytes(), 0
    for seed, case in enumerate(cases, 10_000):
        expected = expected_bytes(case)
        assert got[position : position + len(expected)] == expected, seed
        position += len(expected)
    assert position == len(got)


@pytest.mark.parametrize("place", PLACES)
def test_parts_of_a_long_stream_fit_together(place):
    """Long enough for several threads, whose parts begin and end within frames."""
    x = torch.randint(0, 256, (2, 47, 61, 1003), dtype=torch.uint8, device=place)
    times = [[3.0, 9.0], [0.0, 40.0]], [[20.0, 30.0], [47.0, 7.0]]
    segments = rows(*times, [[1, 0], [0, 1]], [[7.0, 11.0], [0.0, 2.0]], device=place)
    expected = replace_one(x, segments, crossfade=2.0, impl="reference")
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(replace_one(x, segments, crossfade=2.0), expected)
            y = x.clone()
            replace_one(y, segments, crossfade=2.0, out=(y, None))
            assert torch.equal(y, expected)
        finally:
            torch.set_num_threads(before)


def test_an_expanded_batch_may_be_read():
    x = torch.randn(1, 9, 4).expand(3, 9, 4)
    segments = rows([0.0, 1.0, 2.0], [4.0] * 3, [0, 1, 2], [5.0, 4.0, 3.0])
    y = replace_one(x, segments)
    assert torch.equal(y, replace_one(x.clone(), segments, impl="reference"))


def test_the_cpu_kernel_lets_other_threads_run():
    x = torch.zeros(1, 64, 1 << 20, dtype=torch.uint8)
    y = torch.empty_like(x)
    layout = (tuple(x.shape), x.stride(), y.stride())
    stream = (x.data_ptr(), y.data_ptr(), 0, DTYPES[x.dtype], *layout, 1, 1.0)
    turns, stop = 0, threading.Event()

    def count():
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # the interpreter lock changes hands only where it is given up
    other.start()
    try:
        before = turns
        for _ in range(5):
            _native().replace_segments_cpu([stream], (0, 0, 0, 0, 0, False), 0.0, 1)
        during = turns - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()
    assert during > 0


# ---------------------------------------------------------------- CUDA


@NEEDS_GPU
def test_captured_in_a_cuda_graph_on_a_stream_of_its_own():
    x = torch.randn(2, 50, 33, device="cuda")
    times = ([[0.2, 0.5], [0.0, 1.0]], [[1.0, 1.0], [2.0, 0.4]])
    segments = rows(*times, [[0, 1], [0, 1]], [[0.9, 0.0], [0.0, 0.2]], device="cuda")
    in_place = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = replace_one(x, segments, rate=10.0, crossfade=0.3)
        replace_one(in_place, segments, rate=10.0, crossfade=0.3, out=(in_place, None))
    x.copy_(torch.randn_like(x))
    in_place.copy_(x)
    graph.replay()
    expected = replace_one(x, segments, rate=10.0, crossfade=0.3, impl="reference")
    assert ulps_apart(y, expected) <= 1
    assert ulps_apart(in_place, expected) <= 1


@NEEDS_GPU
def test_samples_swapped_in_place_by_fewer_blocks_than_tiles():
    x = torch.randint(0, 256, (2, 64, (1 << 20) + 3), dtype=torch.uint8, device="cuda")
    swapped = x.flip(0)
    segments = rows([0.0, 0.0], [64.0, 64.0], [1, 0], [0.0, 0.0], device="cuda")
    replace_one(x, segments, out=(x, None))
    assert torch.equal(x, swapped)


@NEEDS_GPU
def test_segments_on_the_host_are_checked_there():
    x = torch.zeros(2, 9, device="cuda")
    times = [0.0, 0.0], [1.0, 1.0]
    with pytest.raises(ValueError, match=r"segments.donor\[1, 0\]"):
        replace_one(x, rows(*times, [0, 2], [0.0, 0.0]))
    replace_one(x, rows(*times, [0, 1], [0.0, 0.0]))


@NEEDS_GPU
def test_segments_on_the_device_are_checked_there():
    """In a process of its own, whose CUDA context does not survive."""
    program = """
import torch
from syncdpo.ops import Segments, replace_segments
zero = torch.zeros(2, device="cuda")
segments = Segments(zero, zero + 1, torch.tensor([0, 7], device="cuda"), zero)
replace_segments(torch.zeros(2, 9, device="cuda"), None, segments, video_rate=1, audio_rate=None)
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    assert "segments.donor[1, 0]: expected 0 <= donor < 2, got 7" in result.stdout + result.stderr


@NEEDS_GPU
def test_a_stream_beyond_four_gibibytes():
    x = torch.zeros(2, 3, (1 << 30) + 5, dtype=torch.uint8, device="cuda")
    x[0, 2], x[1, 2] = 1, 2
    segments = rows([0.0, 2.0], [1.0, 1.0], [1, 0], [2.0, 2.0], device="cuda")
    y = replace_one(x, segments)
    assert y[0, 0].eq(2).all()
    assert y[1, 2].eq(1).all()
    assert y[:, 1].eq(0).all()
