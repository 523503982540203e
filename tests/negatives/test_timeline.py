import pytest
import torch

from syncdpo.negatives import Timeline

LTX2_VIDEO = Timeline(frames=16, rate=24 / 8, dim=2, first=1, stride=8)
STREAMS = [
    Timeline(frames=126, rate=25.0),
    Timeline(frames=48, rate=24.0, tokens=4),
    LTX2_VIDEO,
    Timeline(frames=7, rate=2.0, first=3, stride=4),
]


def test_regular_frames_are_centred_in_their_share_of_the_clip():
    timeline = Timeline(frames=50, rate=25.0)
    frame = torch.arange(50.0, dtype=torch.float64)
    torch.testing.assert_close(timeline.seconds(frame), (frame + 0.5) / 25)
    assert timeline.duration == 2.0


def test_ltx2_latents_are_centred_on_the_pictures_they_stand_for():
    pictures = [torch.arange(1.0)] + [torch.arange(8.0) + 1 + 8 * k for k in range(15)]
    centres = torch.stack([(group + 0.5).mean() / 24 for group in pictures])
    torch.testing.assert_close(LTX2_VIDEO.seconds(torch.arange(16.0)), centres)
    assert LTX2_VIDEO.duration == pytest.approx(121 / 24)


@pytest.mark.parametrize("timeline", STREAMS)
def test_position_inverts_seconds(timeline):
    position = torch.linspace(-2, timeline.frames + 2, 997, dtype=torch.float64)
    back = timeline.position(timeline.seconds(position))
    torch.testing.assert_close(back, position, rtol=1e-14, atol=1e-13)
    assert (timeline.seconds(position).diff() > 0).all()


@pytest.mark.parametrize("timeline", STREAMS)
def test_borders_part_neighbouring_frames(timeline):
    border = torch.arange(timeline.frames + 1.0, dtype=torch.float64)
    begins = timeline.begins(border)
    centres = timeline.seconds(border[:-1])
    assert (begins[:-1] < centres).all()
    assert (centres < begins[1:]).all()
    assert begins[0] == 0
    assert begins[-1].item() == pytest.approx(timeline.duration)
    for offset in (-0.4, 0.0, 0.4):
        shortest = min(1.0, timeline.first / timeline.stride) / timeline.rate
        assert torch.equal(timeline.border(begins + offset * shortest), border)


@pytest.mark.parametrize("timeline", STREAMS)
def test_a_part_holds_the_frames_that_have_ended(timeline):
    ends = timeline.begins(torch.arange(1.0, timeline.frames + 1, dtype=torch.float64)).tolist()
    for count, end in enumerate(ends, start=1):
        assert timeline.until(end).frames == timeline.until(end + 1e-3).frames == count
        assert timeline.until(end - 1e-3).frames == max(count - 1, 1)
        assert timeline.next_border(end) == timeline.next_border(end - 1e-3) == count
    assert timeline.until(2 * ends[-1]) == timeline
    assert timeline.next_border(0.0) == 0


def test_even_frames_leave_out_a_first_one_of_another_length():
    assert STREAMS[0].even == STREAMS[0].duration
    assert LTX2_VIDEO.even == 15 / LTX2_VIDEO.rate
    assert LTX2_VIDEO.even_from == pytest.approx(1 / 24)
    assert LTX2_VIDEO.until(0.1).even == LTX2_VIDEO.until(0.1).duration == pytest.approx(1 / 24)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"tokens": -1}, "tokens: expected at least 1, got -1"),
        ({"first": 0}, "first: expected at least 1, got 0"),
        ({"stride": 0}, "stride: expected at least 1, got 0"),
        ({"rate": 0.0}, r"rate: expected a finite number above 0, got 0\.0"),
        ({"rate": float("nan")}, "rate: expected a finite number above 0, got nan"),
    ],
)
def test_a_stream_without_extent_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Timeline(**{"frames": 4, "rate": 1.0, **wrong})
