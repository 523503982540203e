"""replace_segments: by hand, its gradients, compiled code, bad input."""

import math
import sys

import pytest
import torch
from torch import Tensor

from syncdpo.ops import Segments, replace_segments
from syncdpo.ops.segment_replace import _native, _reference

INFINITY = math.inf


def rows(start, length, donor, donor_start) -> Segments:
    times = [torch.tensor(x, dtype=torch.float64) for x in (start, length, donor_start)]
    return Segments(times[0], times[1], torch.tensor(donor), times[2])


def replace_one(x, segments, rate=1.0, dim=1, **options) -> Tensor:
    return replace_segments(
        x, None, segments, video_rate=rate, audio_rate=None, video_dim=dim, **options
    )[0]


@pytest.fixture(params=["reference", "kernel"])
def either(request):
    return request.param


# ---------------------------------------------------------------- by hand


def test_a_stretch_is_taken_from_another_moment_and_another_sample(either):
    x = torch.arange(20).reshape(2, 10).to(torch.uint8)
    y = replace_one(x, rows([2.0, 6.0], [3.0, 2.0], [0, 0], [7.0, 1.0]), impl=either)
    assert y.tolist() == [[0, 1, 7, 8, 9, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 1, 2, 18, 19]]


@pytest.mark.parametrize(
    ("donor", "expected"), [(0.0, [0, 1, 0, 1, 2, 3]), (4.0, [0, 1, 4, 5, 4, 5])]
)
def test_in_place_reads_before_it_overwrites(either, donor, expected):
    x = torch.arange(6).expand(3, 6).clone().to(torch.int16)
    length = 4.0 if donor == 0.0 else 2.0
    segments = rows([2.0] * 3, [length] * 3, [0, 1, 2], [donor] * 3)
    y = replace_one(x, segments, out=(x, None), impl=either)
    assert y is x
    assert x.tolist() == [expected] * 3


def test_samples_swapped_in_place(either):
    x = torch.arange(8.0).reshape(2, 4)
    replace_one(x, rows([0.0, 0.0], [4.0, 4.0], [1, 0], [0.0, 0.0]), out=(x, None), impl=either)
    assert x.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_of_overlapping_segments_the_later_row_wins(either):
    x = torch.arange(8.0)[None]
    y = replace_one(x, rows([[0.0, 1.0]], [[3.0, 3.0]], [[0, 0]], [[5.0, 0.0]]), impl=either)
    assert y.tolist() == [[5, 0, 1, 2, 4, 5, 6, 7]]


def test_crossfade_is_a_raised_cosine_at_both_seams(either):
    x = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)])
    y = replace_one(x, rows([1.0, 0.0], [6.0, 0.0], [1, 1], [0.0, 0.0]), crossfade=2.0, impl=either)
    near, far = ((1 - math.cos(math.pi * k / 2)) / 2 for k in (0.5, 1.5))
    torch.testing.assert_close(y[0], torch.tensor([0, near, far, 1, 1, far, near, 0]))
    assert y[1].eq(1).all()


def test_integers_round_to_nearest_even(either):
    x = torch.tensor([[0, 0, 0], [1, 3, 5], [10, 250, 255]], dtype=torch.uint8)
    segments = rows([0.0] * 3, [3.0, 0.0, 0.0], [1, 1, 2], [0.0] * 3)
    y = replace_one(x, segments, crossfade=100.0, impl=either)
    weight = 0.5 - 0.5 * torch.cos(math.pi * (torch.tensor([0.5, 1.5, 0.5])) / 100)
    assert y[0].tolist() == (weight * x[1]).round().tolist()
    middle = replace_one(x, segments, crossfade=1.0, impl=either)  # weight ½ at the seams
    assert middle[0].tolist() == [0, 3, 2]


@pytest.mark.parametrize("fade", [0.0, 0.3])
def test_what_is_the_same_stays_the_same(either, fade):
    x = torch.full((2, 50), 0.1, dtype=torch.float32)
    y = replace_one(
        x, rows([0.3, 1.0], [2.0, 2.0], [1, 0], [1.7, 0.0]), rate=10.0, crossfade=fade, impl=either
    )
    assert torch.equal(x, y)


def test_frames_and_sound_of_one_second_agree(either):
    video, audio = torch.zeros(2, 48), torch.zeros(2, 2, 96000)
    video[1], audio[1] = 1, 1
    start, length = [0.51, 0.0], [0.7, 0.0]
    segments = rows(start, length, [1, 1], [0.2, 0.0])
    video, audio = replace_segments(
        video, audio, segments, video_rate=24.0, audio_rate=48000.0, audio_dim=-1, impl=either
    )
    assert video[0].nonzero().flatten().tolist() == list(range(12, 29))
    frames = audio[0, 1].nonzero().flatten()
    assert (frames.min(), frames.max() + 1, len(frames)) == (24480, 58080, 33600)


def test_no_frames_in_one_stream_leave_it_alone(either):
    video, audio = torch.randn(1, 3, 2), torch.randn(1, 300)
    segments = rows([0.1], [0.05], [0], [0.9])
    new_video, new_audio = replace_segments(
        video, audio, segments, video_rate=3.0, audio_rate=300.0, impl=either
    )
    assert torch.equal(video, new_video)
    assert torch.equal(new_audio[0, 30:45], audio[0, 270:285])


def test_a_donor_that_rounding_pushes_past_the_end_begins_a_frame_earlier(either):
    x = torch.arange(3.0)[None]
    y = replace_one(x, rows([0.1], [0.5], [0], [0.5]), rate=3.0, impl=either)
    assert y.tolist() == [[1, 2, 2]]


@pytest.mark.parametrize(
    ("start", "donor", "expected"),
    [
        (4.0, 0.0, [0, 1, 2, 3, 0, 1]),
        (0.0, 4.0, [4, 5, 2, 3, 4, 5]),
        (9.0, 0.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_clip_cuts_what_reaches_past_the_end(either, start, donor, expected):
    x = torch.arange(6.0)[None]
    y = replace_one(x, rows([start], [3.0], [0], [donor]), clip=True, impl=either)
    assert y.tolist() == [expected]


def test_streams_that_are_passed_through(either):
    video, audio = torch.randn(2, 4), torch.randn(2, 8)
    segments = rows([0.0] * 2, [1.0] * 2, [0, 1], [1.0] * 2)
    new_video, new_audio = replace_segments(
        video, audio, segments, video_rate=None, audio_rate=4.0, impl=either
    )
    assert new_video is video
    assert not torch.equal(audio, new_audio)
    nothing = replace_segments(None, audio, segments, video_rate=2.0, audio_rate=None, impl=either)
    assert nothing[0] is None
    assert nothing[1] is audio


@pytest.mark.parametrize(("shape", "count"), [((0, 4), 1), ((2, 4, 0), 1), ((2, 4), 0)])
def test_nothing_to_do(either, shape, count):
    zeros = torch.zeros(shape[0], count)
    x = torch.randn(shape)
    y = replace_one(x, Segments(zeros, zeros, zeros.long(), zeros), impl=either)
    assert torch.equal(x, y)


def test_special_values_keep_their_bits(either):
    special = torch.tensor([INFINITY, -INFINITY, math.nan, -0.0, 1e-45, 3e38, 6e-8, 65504.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.stack([special, torch.arange(8.0)]).to(dtype)
        y = replace_one(x, rows([0.0, 0.0], [4.0, 8.0], [1, 0], [4.0, 0.0]), impl=either)
        expected = torch.stack([torch.cat([x[1, 4:], x[0, 4:]]), x[0]])
        integers = torch.int32 if dtype is torch.float32 else torch.int16
        assert torch.equal(y.view(integers), expected.view(integers))


# ---------------------------------------------------------------- gradients and compiled code


def floats(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.to(dtype).requires_grad_(grad)


PAIR = rows(
    [[0.2, 0.5], [0.0, 1.0]], [[1.0, 1.0], [2.0, 0.4]], [[0, 1], [0, 1]], [[0.9, 0.0], [0.0, 0.2]]
)
PAIR_OPTIONS = {"video_rate": 3.0, "audio_rate": 10.0, "audio_dim": 2, "crossfade": 0.3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_the_reference(either, dtype):
    x = floats(2, 20, 3, dtype=dtype)
    y = replace_one(x, PAIR, rate=10.0, crossfade=0.3, impl=either)
    weight = torch.randn(y.shape).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, weight)
    double = x.detach().float().requires_grad_()
    expected = _reference(double, PAIR, 10.0, 1, 0.3)
    (expected,) = torch.autograd.grad(expected, double, weight.float())
    torch.testing.assert_close(gradient, expected.to(dtype))


@pytest.mark.parametrize("video_grad", [False, True])
@pytest.mark.parametrize("audio_grad", [False, True])
def test_every_subset_may_need_gradients(either, video_grad, audio_grad):
    video, audio = floats(2, 6, 4, grad=video_grad), floats(2, 3, 20, grad=audio_grad)
    results = replace_segments(video, audio, PAIR, **PAIR_OPTIONS, impl=either)
    assert [y.requires_grad for y in results] == [video_grad or audio_grad] * 2
    if video_grad or audio_grad:
        sum(y.square().sum() for y in results).backward()
    assert [x.grad is not None for x in (video, audio)] == [video_grad, audio_grad]


def test_integers_beside_floats_that_need_gradients():
    frames, audio = torch.arange(24, dtype=torch.uint8).reshape(2, 6, 2), floats(2, 3, 20)
    results = replace_segments(frames, audio, PAIR, **PAIR_OPTIONS)
    results[1].sum().backward()
    assert not results[0].requires_grad
    assert audio.grad is not None


def test_opcheck():
    streams = [floats(2, 6, 4), floats(2, 3, 20)]
    arguments = (streams, *PAIR, [3.0, 10.0], [1, 2], 0.3, False)
    for impl in ("auto", "reference"):
        torch.library.opcheck(torch.ops.syncdpo.replace_segments.default, (*arguments, impl))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(either, dynamic):
    torch._dynamo.reset()

    def step(video, audio, segments):
        video, audio = replace_segments(video * 2, audio, segments, **PAIR_OPTIONS, impl=either)
        return video + 1, audio

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for channels in (4, 5):
        video, audio = floats(2, 6, channels), floats(2, 3, 20)
        results = compiled(video, audio, PAIR)
        expected = step(video, audio, PAIR)
        assert all(map(torch.equal, results, expected))
        gradients = torch.autograd.grad(sum(y.square().sum() for y in results), (video, audio))
        expected = torch.autograd.grad(sum(y.square().sum() for y in expected), (video, audio))
        assert all(map(torch.equal, gradients, expected))


def test_compiles_in_place():
    torch._dynamo.reset()
    video, audio = floats(2, 6, 4, grad=False), floats(2, 3, 20, grad=False)
    expected = replace_segments(video, audio, PAIR, **PAIR_OPTIONS)

    def step(video, audio):
        return replace_segments(video, audio, PAIR, **PAIR_OPTIONS, out=(video, audio))

    torch.compile(step, fullgraph=True, backend="aot_eager")(video, audio)
    assert torch.equal(video, expected[0])
    assert torch.equal(audio, expected[1])


# ---------------------------------------------------------------- bad input


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message[:40])


FLOAT64 = {"dtype": torch.float64}
ONE = torch.zeros(2, **FLOAT64)
GOOD = {"start": ONE, "length": ONE + 1, "donor": torch.tensor([0, 1]), "donor_start": ONE}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad(r"video: expected a tensor, got list", TypeError, video=[1]),
        bad(
            r"video: expected dtype uint8 or .* got int64",
            TypeError,
            video=torch.zeros(2, 9).long(),
        ),
        bad(r"video: expected \[B, ..., T, ...\], got shape \[2\]", video=torch.zeros(2)),
        bad(r"audio: expected \[2, ..., T, ...\], got shape \[3, 9\]", audio=torch.zeros(3, 9)),
        bad(r"audio: expected device cpu, got meta", audio=torch.zeros(2, 9, device="meta")),
        bad(r"video_dim: expected an axis of video other than 0, got 2", video_dim=2),
        bad(r"video_dim: expected an axis of video other than 0, got -2", video_dim=-2),
        bad(r"video_rate: .*above 0, got 0", video_rate=0),
        bad(r"audio_rate: .*above 0, got nan", audio_rate=math.nan),
        bad(r"crossfade: .*at least 0, got -1", crossfade=-1.0),
        bad(r"crossfade: .*got inf", crossfade=INFINITY),
        bad(r"impl: expected 'auto' or 'kernel' or 'reference', got 'fast'", impl="fast"),
        bad(r"segments.start: expected dtype float32 or float64", TypeError, start=ONE.long()),
        bad(r"segments.start: expected shape \[2\] or \[2, S\], got \[3\]", start=torch.zeros(3)),
        bad(r"segments.length: expected dtype float64, got float32", TypeError, length=ONE.float()),
        bad(r"segments.donor: expected dtype int64", TypeError, donor=torch.tensor([0, 1]).int()),
        bad(r"segments.donor_start: expected shape \[2\], got \[2, 1\]", donor_start=ONE[:, None]),
        bad(r"segments.start\[1, 0\]: .*got -0.5", start=torch.tensor([0, -0.5], **FLOAT64)),
        bad(r"segments.length\[0, 0\]: .*got nan", length=torch.tensor([math.nan, 1], **FLOAT64)),
        bad(
            r"segments.donor_start\[1, 0\]: .*inf",
            donor_start=torch.tensor([0, INFINITY], **FLOAT64),
        ),
        bad(r"segments.donor\[1, 0\]: expected 0 <= donor < 2, got 2", donor=torch.tensor([0, 2])),
        bad(r"segments.donor\[0, 0\]: .*got -1", donor=torch.tensor([-1, 0])),
        bad(
            r"segments.start\[1, 0\] \+ length\[1, 0\]: expected within 9 frames at 1.0",
            start=torch.tensor([0, 8.5], **FLOAT64),
        ),
        bad(
            r"segments.donor_start\[0, 0\] \+ length", donor_start=torch.tensor([8.5, 0], **FLOAT64)
        ),
        bad(r"out \(video\): expected shape \[2, 9\]", out=(torch.zeros(2, 8), None)),
        bad(
            r"out \(video\): expected dtype float32",
            TypeError,
            out=(torch.zeros(2, 9).half(), None),
        ),
        bad(
            r"out \(video\): expected memory for every", out=(torch.zeros(1, 9).expand(2, 9), None)
        ),
    ],
)
def test_bad_input_is_named(either, changes, error, message):
    segments = Segments(**{name: changes.get(name, value) for name, value in GOOD.items()})
    given = {"video": torch.zeros(2, 9), "audio": torch.zeros(2, 9), "segments": segments}
    given |= {"video_rate": 1.0, "audio_rate": 1.0, "impl": either}
    given |= {name: value for name, value in changes.items() if name not in GOOD}
    with pytest.raises(error, match=message):
        replace_segments(**given)


def test_out_must_not_meet_the_input_halfway():
    memory = torch.zeros(40)
    x = memory[:18].view(2, 9)
    segments = Segments(**GOOD)
    with pytest.raises(ValueError, match=r"out \(video\): expected video itself or memory apart"):
        replace_one(x, segments, out=(memory[9:27].view(2, 9), None))
    replace_one(x, segments, out=(memory[18:36].view(2, 9), None))


def test_out_and_gradients_exclude_each_other():
    x = floats(2, 9)
    with pytest.raises(ValueError, match=r"out \(video\): expected tensors that need no gradient"):
        replace_one(x, Segments(**GOOD), out=(torch.zeros(2, 9), None))
    with torch.no_grad():
        replace_one(x, Segments(**GOOD), out=(x, None))


def test_without_the_extension_the_error_says_what_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "syncdpo._C", None)
    monkeypatch.delattr("syncdpo._C", raising=False)
    _native.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"syncdpo\._C.*pip install"):
            replace_one(torch.zeros(2, 9), Segments(**GOOD))
        assert replace_one(torch.zeros(2, 9), Segments(**GOOD), impl="reference").eq(0).all()
    finally:
        _native.cache_clear()
