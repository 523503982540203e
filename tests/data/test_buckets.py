"""Several clip formats in one cache: into which bucket a clip goes, and that it is the same there
as in a cache of that format alone. Beside it what else a table may say of a clip: another sound."""

import shutil
import wave
from types import SimpleNamespace

import av
import pytest
import torch
from recordings import click_and_flash
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.buckets import Bucket, buckets_of, choose, mixed_identity, parse_bucket
from syncdpo.data.captions import read_captions
from syncdpo.data.clips import Clip, ClipError, ClipFormat, read_clip, write_clip
from syncdpo.data.decoding import shown_size
from syncdpo.data.latents import LatentDataset, prepare
from syncdpo.data.sound_file import decode_sound

FPS, RATE = 24.0, 16_000
LONG, SHORT, TALL = (Bucket(*size, FPS) for size in ((41, 32, 64), (17, 32, 64), (41, 64, 32)))
BUCKETS = [LONG, SHORT, TALL]


class Model:
    """Means of picture and sound as latents, in any format."""

    def __init__(self, name="means"):
        self.name = name
        self.set_format(*LONG)

    def set_format(self, frames, height, width, fps):
        if frames % 8 != 1:
            raise ValueError(f"frames: expected a multiple of 8 plus 1, got {frames}")
        self.clip_format = ClipFormat(frames / fps, fps, height, width, RATE, 1)
        self.timelines = (SimpleNamespace(frames=(frames - 1) // 8 + 1), None)
        self.frames = frames

    def identity(self):
        return {"video_vae": self.name} | vars(self.clip_format)

    def encode(self, clip, caption):
        assert len(clip.video) == self.frames  # in the format that the clip was read in
        return {
            "video": clip.video.float().mean((1, 2)),
            "audio": clip.audio.mean(0, keepdim=True),
            "prompt": torch.tensor([ord(c) for c in caption]),
        }


def text_of(sample):
    return "".join(map(chr, sample["prompt"].tolist()))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips for the first bucket, and one each for the others and for none."""
    folder = tmp_path_factory.mktemp("clips")
    sizes = {
        "a": (2.0, (32, 64)), "b": (41 / FPS, (64, 128)), "c": (3.0, (48, 64)),
        "short": (1.0, (32, 64)), "tall": (2.0, (64, 48)), "tiny": (0.5, (32, 64)),
    }  # fmt: skip
    for index, (name, (seconds, size)) in enumerate(sizes.items()):
        write_clip(
            folder / f"{name}.mp4",
            click_and_flash((2 + index) / FPS, seconds=seconds, size=size),
        )
        (folder / f"{name}.txt").write_text(f"clip {name}")
    return folder


INTO = {"a": LONG, "b": LONG, "c": LONG, "short": SHORT, "tall": TALL}


def prepared(model, clips, out, **options):
    options = {"captions": read_captions(clips), "buckets": BUCKETS} | options
    return prepare(model, clips, out, progress=False, **options)


# --- which bucket ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "size", "expected"),
    [
        (10.0, (512, 768), Bucket(121, 512, 768, 24)),
        (10.0, (1080, 1920), Bucket(121, 512, 768, 24)),
        (10.0, (1920, 1080), Bucket(121, 768, 512, 24)),
        (121 / 24, (1024, 1536), Bucket(121, 512, 768, 24)),
        (120.6 / 24, (512, 768), Bucket(121, 512, 768, 24)),  # half a picture, as in `read_clip`
        (120.4 / 24, (512, 768), Bucket(49, 1024, 1536, 24)),  # of one shape the larger
        (3.0, (768, 512), Bucket(49, 512, 512, 24)),
        (2.0, (512, 768), None),
    ],
)
def test_a_clip_goes_into_the_longest_bucket_then_the_nearest_in_shape(seconds, size, expected):
    buckets = [
        parse_bucket(text, 24)
        for text in ("49x512x768", "121x512x768", "49x512x512", "121x768x512", "49x1024x1536")
    ]
    assert choose(buckets, seconds, size) == expected
    assert choose(buckets[::-1], seconds, size) == expected


def test_a_square_clip_between_two_shapes_goes_the_same_way_whatever_their_order():
    wide, tall = parse_bucket("49x512x768", 24), parse_bucket("49x768x512", 24)
    assert choose([wide, tall], 9, (64, 64)) == choose([tall, wide], 9, (64, 64))


@pytest.mark.parametrize("text", ["121x512", "121x512x768x24", "axbxc", "-1x32x32", ""])
def test_what_is_no_bucket_is_refused(text):
    with pytest.raises(ValueError, match="bucket: expected pictures x height x width"):
        parse_bucket(text, 24)


def test_the_shown_size_is_upright_and_of_square_pixels(clips, tmp_path):
    assert shown_size(clips / "tall.mp4") == (64, 48)
    assert shown_size(clips / "b.mp4") == tuple(read_clip(clips / "b.mp4").video.shape[1:3])
    (tmp_path / "text.mp4").write_text("not a film")
    with pytest.raises(ClipError):
        shown_size(tmp_path / "text.mp4")


# --- the cache ------------------------------------------------------------------------------------


def test_clips_go_into_their_buckets_and_what_fits_none_is_named(clips, tmp_path):
    summary = prepared(Model(), clips, tmp_path)
    assert summary.made == 5
    assert [(path.name, reason) for path, reason in summary.skipped] == [
        ("tiny.mp4", "0.50 s long, shorter than every bucket (0.708333 s)")
    ]
    assert summary.buckets == {LONG: 3, SHORT: 1, TALL: 1}
    for line in ("  3 in 41x32x64", "  1 in 17x32x64", "  1 in 41x64x32"):
        assert line in str(summary).splitlines()
    data = LatentDataset(tmp_path, mixed_identity(Model(), BUCKETS))
    assert data.buckets == [INTO[clip["caption"].split()[1]] for clip in data.clips]
    again = prepared(Model(), clips, tmp_path)
    assert (again.made, again.kept, again.buckets) == (0, 5, summary.buckets)


def test_a_clip_is_the_same_whatever_other_buckets_there_are(clips, tmp_path):
    prepared(Model(), clips, tmp_path / "mixed")
    prepared(Model(), clips, tmp_path / "other way", buckets=BUCKETS[::-1])
    mixed, other = (LatentDataset(tmp_path / name) for name in ("mixed", "other way"))
    assert mixed.identity == other.identity
    for bucket in BUCKETS:
        alone = tmp_path / str(bucket)
        prepared(Model(), clips, alone, buckets=[bucket])
        data = LatentDataset(alone)
        assert set(data.buckets) == {None}
        found = {clip["source"]: sample for clip, sample in zip(data.clips, data, strict=True)}
        for clip, mine, own, same in zip(mixed.clips, mixed.buckets, mixed, other, strict=True):
            if mine != bucket:
                continue
            for name, tensor in own.items():
                assert torch.equal(tensor, found[clip["source"]][name])
                assert torch.equal(tensor, same[name])


def test_one_bucket_is_the_clip_format_itself(clips, tmp_path):
    model = Model()
    model.set_format(*SHORT)
    prepared(model, clips, tmp_path / "by format", buckets=())
    prepared(Model(), clips, tmp_path / "by bucket", buckets=[SHORT])
    for path in (tmp_path / "by format").rglob("*.*"):
        other = tmp_path / "by bucket" / path.relative_to(tmp_path / "by format")
        assert path.read_bytes() == other.read_bytes()


def test_other_buckets_are_another_cache(clips, tmp_path):
    prepared(Model(), clips, tmp_path)
    with pytest.raises(ValueError, match=r"buckets is .* in the cache"):
        prepared(Model(), clips, tmp_path, buckets=[LONG, SHORT])
    with pytest.raises(ValueError, match=r"buckets is .* in the cache, none here"):
        prepared(Model(), clips, tmp_path, buckets=())
    with pytest.raises(ValueError, match="video_vae is means in the cache, others here"):
        prepared(Model("others"), clips, tmp_path)


def test_buckets_that_a_model_does_not_have_are_refused(clips, tmp_path):
    with pytest.raises(ValueError, match=r"bucket 42x32x32 .*: frames: expected a multiple of 8"):
        prepared(Model(), clips, tmp_path, buckets=[Bucket(42, 32, 32, FPS)])
    with pytest.raises(ValueError, match="expected different ones, got 41x32x64 twice"):
        prepared(Model(), clips, tmp_path, buckets=[LONG, LONG])
    with pytest.raises(ValueError, match="bucket 1x32x32: expected more than one latent frame"):
        prepared(Model(), clips, tmp_path, buckets=[Bucket(1, 32, 32, FPS)])
    assert not any(tmp_path.iterdir())


def test_the_command_line_refuses_what_does_not_go_together(clips, tmp_path):
    def said(*options):
        words = ["prepare", clips, "--output", tmp_path / "cache", *options]
        return str(CliRunner().invoke(app, [str(word) for word in words]).exception)

    assert "tiny" in said("--bucket", "41x32x64").lower()
    assert "in the place of frames" in said("--bucket", "41x32x64", "--frames", 41)
    assert "pictures x height x width" in said("--bucket", "41x32")
    assert "trigger: expected a word" in said("--trigger", " ")


def test_a_part_of_a_dataset_keeps_its_buckets(clips, tmp_path):
    prepared(Model(), clips, tmp_path)
    data = LatentDataset(tmp_path)
    part = torch.utils.data.Subset(data, [4, 0])
    assert buckets_of(part) == [data.buckets[4], data.buckets[0]]
    assert buckets_of([{}, {}]) == [None, None]


# --- the trigger ----------------------------------------------------------------------------------


def test_a_trigger_stands_before_every_caption(clips, tmp_path):
    captions = {"a": "rain", "b": ""}
    prepared(Model(), clips, tmp_path, captions=captions, trigger="SYNC", buckets=[SHORT])
    data = LatentDataset(tmp_path, Model().identity() | vars(ClipFormat(17 / FPS, FPS, 32, 64, RATE,
                                                                        1)))  # fmt: skip
    texts = {clip["source"]: text_of(s) for clip, s in zip(data.clips, data, strict=True)}
    assert texts["a.mp4"] == "SYNC rain"
    assert texts["b.mp4"] == texts["c.mp4"] == "SYNC"


@pytest.mark.parametrize(("first", "second"), [(None, "SYNC"), ("SYNC", None), ("SYNC", "TIME")])
def test_a_cache_of_another_trigger_is_refused(first, second, clips, tmp_path):
    prepared(Model(), clips, tmp_path, trigger=first)
    with pytest.raises(ValueError, match=r"another model or other settings: trigger is"):
        prepared(Model(), clips, tmp_path, trigger=second)


# --- another file's sound -------------------------------------------------------------------------


def write_wave(path, when, seconds=2.0, rate=RATE):
    sound = click_and_flash(when, seconds=seconds, rate=rate).audio[0]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 32767).to(torch.int16).numpy().tobytes())


def loudest(audio, rate):
    """The middle of a click of 2 ms, in seconds."""
    return audio[0].abs().argmax().item() / rate - 0.001


@pytest.mark.parametrize("rate", [RATE, 44_100, 8_000])
def test_both_begin_at_once(rate, clips, tmp_path):
    write_wave(tmp_path / "a.wav", 1.25, rate=rate)
    clip = read_clip(clips / "a.mp4", sample_rate=RATE, sound=tmp_path / "a.wav")
    assert clip.audio.shape == (1, 2 * RATE)
    assert loudest(clip.audio, RATE) == pytest.approx(1.25, abs=0.0005)
    own = read_clip(clips / "a.mp4")
    assert torch.equal(clip.video, own.video)
    assert loudest(own.audio, RATE) == pytest.approx(2 / FPS, abs=0.005)
    assert clip.notes == ()


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.mp3", "libmp3lame", 44_100),
        ("a.m4a", "aac", 48_000),
        ("a.flac", "flac", 44_100),
        ("a.opus", "libopus", 48_000),
        ("a.webm", "libopus", 48_000),
    ],
)
def test_whatever_holds_the_sound_its_first_sample_is_at_0(name, codec, rate, tmp_path):
    sound = click_and_flash(1.25, rate=rate).audio.numpy()
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        resampler = av.AudioResampler(
            stream.format.name, "mono", rate, frame_size=stream.codec_context.frame_size or 1024
        )
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    audio, found = decode_sound(tmp_path / name, 1.5)
    assert (found, audio.shape) == (rate, (1, round(1.5 * rate)))
    assert loudest(audio, rate) == pytest.approx(1.25, abs=0.001)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi"])
def test_a_film_without_sound_takes_that_of_another(suffix, clips, tmp_path):
    silent = tmp_path / f"silent.{suffix}"
    pictures = read_clip(clips / "a.mp4").video
    with av.open(str(silent), "w") as out:
        film = out.add_stream("mpeg4", rate=24, width=64, height=32, pix_fmt="yuv420p")
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            out.mux(film.encode(frame))
        out.mux(film.encode(None))
    with pytest.raises(ClipError, match="no sound"):
        read_clip(silent)
    clip = read_clip(silent, seconds=1.5, sound=clips / "c.mp4")
    assert len(clip.video) == 36
    assert clip.video.float().mean((1, 2, 3)).argmax() == 2  # the flash
    assert loudest(clip.audio, RATE) == pytest.approx(4 / FPS, abs=0.005)
    silent.write_bytes(silent.read_bytes()[: silent.stat().st_size // 2])
    with pytest.raises(ClipError):
        read_clip(silent, sound=clips / "c.mp4")


def test_what_is_wrong_with_the_sound_is_said(clips, tmp_path):
    def reason(name):
        with pytest.raises(ClipError) as refused:
            read_clip(clips / "a.mp4", sound=tmp_path / name)
        assert refused.value.path == clips / "a.mp4"
        return refused.value.reason

    assert reason("gone.wav") == f"its sound {tmp_path / 'gone.wav'}: no such file"
    (tmp_path / "empty.wav").touch()
    assert reason("empty.wav") == "its sound empty.wav: empty file"
    (tmp_path / "text.wav").write_text("not a sound")
    assert reason("text.wav").startswith("its sound text.wav: damaged")
    shutil.copy(clips / "a.mp4", tmp_path / "cut.mp4")
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert reason("cut.mp4").startswith("its sound cut.mp4: ")
    write_wave(tmp_path / "half.wav", 0.5)
    whole = (tmp_path / "half.wav").read_bytes()
    (tmp_path / "half.wav").write_bytes(whole[: len(whole) // 2])
    assert reason("half.wav").startswith("its sound half.wav: truncated")
    (tmp_path / "piped.wav").write_bytes(whole[:4] + b"\xff" * 4 + whole[8:])
    read_clip(clips / "a.mp4", sound=tmp_path / "piped.wav")
    write_wave(tmp_path / "brief.wav", 0.5, seconds=1.0)
    clip = read_clip(clips / "a.mp4", sound=tmp_path / "brief.wav")
    assert clip.notes == ("its sound brief.wav ends at 1.00 s of 2.00 s, silence follows",)
    assert clip.audio[0, RATE:].abs().max() == 0


def table(folder, rows):
    lines = ["video,caption,audio", *(",".join(row) for row in rows)]
    (folder / "clips.csv").write_text("\n".join(lines))
    return read_captions(folder, folder / "clips.csv")


def test_the_table_names_the_sound(clips, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    (folder / "sounds").mkdir()
    write_wave(folder / "sounds" / "x.wav", 1.0)
    rows = [("a.mp4", "A", "sounds/x.wav"), ("c.mp4", "C", ""), ("tall.mp4", "T", "gone.wav")]
    captions = table(folder, rows)
    assert captions == {"a.mp4": "A", "c.mp4": "C", "tall.mp4": "T"}

    def make():
        return prepared(
            Model(), folder, tmp_path / "cache", captions=captions, sounds=captions.sounds
        )

    summary = make()
    skipped = {path.name: reason for path, reason in summary.skipped}
    assert skipped["tall.mp4"] == f"its sound {folder / 'gone.wav'}: no such file"
    data = LatentDataset(tmp_path / "cache")
    heard = {clip["source"]: s["audio"] for clip, s in zip(data.clips, data, strict=True)}
    assert loudest(heard["a.mp4"], RATE) == pytest.approx(1.0, abs=0.0005)
    assert loudest(heard["c.mp4"], RATE) == pytest.approx(4 / FPS, abs=0.005)
    assert (make().made, make().kept) == (0, len(data))
    write_wave(folder / "sounds" / "x.wav", 0.5)
    summary = make()
    assert (summary.made, summary.kept) == (1, len(data) - 1)
    (folder / "sounds" / "x.wav").unlink()
    assert "a.mp4" in {path.name for path, _ in make().skipped}


def test_from_the_command_line(clips, tmp_path):
    """The embedded model: one format, so one clip of it; trigger and sound are on record."""
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(clips / "a.mp4", folder)
    write_wave(folder / "x.wav", 1.0)
    table(folder, [("a.mp4", "rain", "x.wav")])

    def invoke(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    cache = tmp_path / "cache"
    words = ("prepare", folder, "--captions", folder / "clips.csv", "--output", cache)
    assert invoke(*words, "--trigger", "SYNC").exit_code == 0
    data = LatentDataset(cache)
    assert data.identity["trigger"] == "SYNC"
    assert (data.clips[0]["caption"], data.clips[0]["sound"][0]) == ("rain", "x.wav")
    assert "trigger is SYNC in the cache, none here" in str(invoke(*words).exception)
    run = ("train", "--data", cache, "--output", tmp_path / "run", "--steps", 1, "--batch-size", 1)
    assert invoke(*run).exit_code == 0


def test_a_clip_without_an_own_sound_is_judged_by_the_one_it_got(tmp_path):
    """Its lag against the pictures is found, in whichever file it is."""
    clip = click_and_flash(0.25, seconds=2.0)
    for when in (0.75, 1.25, 1.75):
        clip.video[round(when * FPS)] = 220
    write_clip(tmp_path / "a.mp4", Clip(clip.video, FPS, clip.audio, RATE))
    late = torch.zeros(1, 2 * RATE)
    for when in (0.25, 0.75, 1.25):
        late += click_and_flash(when + 0.4, seconds=2.0).audio
    samples = (late[0] * 32767).to(torch.int16)
    write_wave(tmp_path / "late.wav", 0.1)
    with wave.open(str(tmp_path / "late.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(samples.numpy().tobytes())
    summary = prepare(
        Model(), tmp_path, tmp_path / "cache", sounds={"a.mp4": tmp_path / "late.wav"},
        buckets=BUCKETS, progress=False,
    )  # fmt: skip
    assert any("its sound lags" in flag for _, flag in summary.flagged)
    assert summary.made == 1
