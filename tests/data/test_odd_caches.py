"""Caches of the LTX-2 trainer as people have them: each trains as its clean twin, or is named.

A table says how a good clip is spoilt and what must become of it: ACCEPTED, LEFT_OUT or REFUSED
(with the whole cache), and a word that the message must contain.
"""

import json
import math
import shutil
import sys
import time
import weakref
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny_ltx2 import save_tiny_ltx2

from syncdpo.cli import main
from syncdpo.data.files import canonical_json, digest
from syncdpo.data.latents import LatentDataset
from syncdpo.data.precomputed import PrecomputedDataset, open_latents
from syncdpo.models.ltx2 import LTX2
from syncdpo.models.tiny import Tiny
from syncdpo.train import train
from syncdpo.training.config import TrainConfig

FRAMES, ROWS, COLUMNS, FPS = 16, 1, 2, 24.0  # latents; 121 pictures, as LTX-2's own clips
SECONDS = 121 / FPS
AUDIO = math.floor(SECONDS * 25) + 1  # the trainer makes a latent of the last fraction
TOKENS, WORDS = 1024, 20
KINDS = ("latents", "audio_latents", "conditions")
CLIPS = ("walks/a", "b", "c")
SPOILT = "b"
ACCEPTED, LEFT_OUT, REFUSED = "accepted", "left out", "refused"


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def contents(seed, fps=FPS, frames=FRAMES, rows=ROWS):
    """latents, audio_latents and conditions of a good clip."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    seconds = (8 * (frames - 1) + 1) / fps
    audio = math.floor(seconds * 25) + 1
    seen = {
        "latents": randn(8, frames, rows, COLUMNS),
        "num_frames": frames, "height": rows, "width": COLUMNS, "fps": fps,
    }  # fmt: skip
    heard = {
        "latents": randn(2, audio, 2), "num_time_steps": audio, "frequency_bins": 2,
        "duration": seconds,
    }  # fmt: skip
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    mask[-WORDS:] = True
    text = {
        "video_prompt_embeds": randn(TOKENS, 32) * mask[:, None],
        "audio_prompt_embeds": randn(TOKENS, 16) * mask[:, None],
        "prompt_attention_mask": mask,
    }
    return seen, heard, text


def file_of(root, kind, name):
    return root / ".precomputed" / kind / f"{name}.pt"


def write(root, name, clip, **options):
    for kind, content in zip(KINDS, clip, strict=True):
        path = file_of(root, kind, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path, **options)


def cache(root, names=CLIPS):
    for name in names:
        write(root, name, contents(CLIPS.index(name)))
    return root


# --- how a clip is spoilt: by its contents --------------------------------------------------------

SEEN, HEARD, TEXT = range(3)


def set_to(which, key, value):
    """value: what to put in, or a function of what is there."""

    def spoil(clip):
        clip[which][key] = value(clip[which][key]) if callable(value) else value

    return spoil


def without(which, *keys):
    def spoil(clip):
        for key in keys:
            del clip[which][key]

    return spoil


def both(*spoils):
    def spoil(clip):
        for each in spoils:
            each(clip)

    return spoil


def whole(which, function):
    def spoil(clip):
        clip[which] = function(clip[which])

    return spoil


def at(position, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return change


def numbers(function):
    """The numbers of latents and audio latents as `function` makes them."""

    def spoil(clip):
        for content in clip[:2]:
            for key, value in content.items():
                if key != "latents":
                    content[key] = function(value)

    return spoil


def dtype(which, kind):
    def spoil(clip):
        for key, value in clip[which].items():
            if torch.is_tensor(value) and value.is_floating_point():
                clip[which][key] = value.to(kind)

    return spoil


def sound_of(latents, duration=SECONDS):
    """The first clip's sound with another number of latents, true to itself in every number."""
    tensor = torch.randn(2, latents, 2, generator=torch.Generator().manual_seed(9))

    def spoil(clip):
        clip[HEARD] = {
            "latents": tensor, "num_time_steps": latents, "frequency_bins": 2, "duration": duration
        }  # fmt: skip

    return spoil


def of_25_fps(clip):
    """Sound cut for 121 pictures at 25 fps beside pictures that say 24: 200 ms too short."""
    clip[HEARD] = contents(9, fps=25.0)[HEARD]


def packed(clip):
    clip[SEEN]["latents"] = clip[SEEN]["latents"].flatten(1).T.contiguous()


def trimmed(clip):
    for key, value in clip[TEXT].items():
        clip[TEXT][key] = value[-WORDS:].clone()


def padded_right(clip):
    for key, value in clip[TEXT].items():
        clip[TEXT][key] = torch.roll(value, WORDS, 0)


def long_text(clip):
    for key, value in clip[TEXT].items():
        clip[TEXT][key] = torch.cat([torch.zeros_like(value), value])


def view_of_more(tensor):
    more = torch.cat([tensor, tensor])
    return more[: len(tensor)]


CONTENTS = {
    # the trainer's own generations, and other hands' harmless differences
    "as it is": (lambda clip: None, ACCEPTED, ""),
    "packed latents": (packed, ACCEPTED, ""),
    "text trimmed": (trimmed, ACCEPTED, ""),
    "text padded on the right": (padded_right, ACCEPTED, ""),
    "mask of integers": (set_to(TEXT, "prompt_attention_mask", lambda m: m.long()), ACCEPTED, ""),
    "mask of floats": (set_to(TEXT, "prompt_attention_mask", lambda m: m.float()), ACCEPTED, ""),
    "numbers as tensors": (numbers(torch.tensor), ACCEPTED, ""),
    "numbers as tensors of one": (numbers(lambda n: torch.tensor([n])), ACCEPTED, ""),
    "numpy float64": (numbers(np.float64), ACCEPTED, ""),
    "numpy int64 fps": (set_to(SEEN, "fps", np.int64(24)), ACCEPTED, ""),
    "numpy float32 fps": (set_to(SEEN, "fps", np.float32(24)), ACCEPTED, ""),
    "whole fps": (set_to(SEEN, "fps", 24), ACCEPTED, ""),
    "float64 latents": (dtype(SEEN, torch.float64), ACCEPTED, ""),
    "float64 audio": (dtype(HEARD, torch.float64), ACCEPTED, ""),
    "float64 text": (dtype(TEXT, torch.float64), ACCEPTED, ""),
    "requires grad": (set_to(SEEN, "latents", lambda x: x.requires_grad_()), ACCEPTED, ""),
    "a Parameter": (set_to(SEEN, "latents", torch.nn.Parameter), ACCEPTED, ""),
    "not contiguous": (set_to(SEEN, "latents", lambda x: x.mT.contiguous().mT), ACCEPTED, ""),
    "a view of more": (set_to(HEARD, "latents", view_of_more), ACCEPTED, ""),
    "more keys": (set_to(SEEN, "caption", "a ball"), ACCEPTED, ""),
    "OrderedDict": (whole(SEEN, OrderedDict), ACCEPTED, ""),
    "no duration": (without(HEARD, "duration"), ACCEPTED, ""),
    "rate within a thousandth": (set_to(SEEN, "fps", 24.01), ACCEPTED, ""),
    "duration within a latent": (set_to(HEARD, "duration", SECONDS - 0.03), ACCEPTED, ""),
    # lengths
    "sound twice as long": (sound_of(2 * AUDIO), LEFT_OUT, "audio latents"),
    "sound twice as long, said so": (sound_of(2 * AUDIO, 2 * SECONDS), LEFT_OUT, "sound lasts"),
    "sound too short": (sound_of(AUDIO - 2), LEFT_OUT, "expected 126 audio latents, got 125"),
    "sound two latents longer": (sound_of(AUDIO + 1), LEFT_OUT, "got 128"),
    "no sound": (sound_of(0), LEFT_OUT, "audio latents"),
    "duration 1.4 times": (set_to(HEARD, "duration", 1.4 * SECONDS), LEFT_OUT, "duration"),
    "duration NaN": (set_to(HEARD, "duration", math.nan), LEFT_OUT, "duration"),
    "duration None": (set_to(HEARD, "duration", None), LEFT_OUT, "duration is None"),
    "sound made for 25 fps": (of_25_fps, LEFT_OUT, "sound lasts 4.88 s, its pictures 5.04 s"),
    "num_time_steps says otherwise": (set_to(HEARD, "num_time_steps", 126), LEFT_OUT, "time_steps"),
    "frequency_bins says otherwise": (set_to(HEARD, "frequency_bins", 16), LEFT_OUT, "bins"),
    # frame rates
    "fps None": (set_to(SEEN, "fps", None), LEFT_OUT, "fps is None"),
    "fps 0": (set_to(SEEN, "fps", 0), LEFT_OUT, "fps is 0"),
    "fps negative": (set_to(SEEN, "fps", -24.0), LEFT_OUT, "fps is -24"),
    "fps NaN": (set_to(SEEN, "fps", math.nan), LEFT_OUT, "fps is nan"),
    "fps infinite": (set_to(SEEN, "fps", torch.tensor(math.inf)), LEFT_OUT, "fps is inf"),
    "fps a fraction in text": (set_to(SEEN, "fps", "24000/1001"), LEFT_OUT, "24000/1001"),
    "fps of many": (set_to(SEEN, "fps", torch.full((3,), 24.0)), LEFT_OUT, "fps is a tensor"),
    "fps True": (set_to(SEEN, "fps", True), LEFT_OUT, "fps is True"),
    "fps ten to the 400": (set_to(SEEN, "fps", 10**400), LEFT_OUT, "fps is huge"),
    "fps 1000": (set_to(SEEN, "fps", 1000), LEFT_OUT, "1000 fps"),
    "fps 1e9": (set_to(SEEN, "fps", 9e8), LEFT_OUT, "9e+08 fps"),
    # the pictures' latents
    "num_frames in pictures": (set_to(SEEN, "num_frames", 121), LEFT_OUT, "121x1x2"),
    "height in pixels": (set_to(SEEN, "height", 32), LEFT_OUT, "16x32x2"),
    "height and width exchanged": (
        both(set_to(SEEN, "height", COLUMNS), set_to(SEEN, "width", ROWS)), LEFT_OUT, "16x2x1"),
    "num_frames 0": (set_to(SEEN, "num_frames", 0), LEFT_OUT, "above 0"),
    "num_frames a fraction": (set_to(SEEN, "num_frames", 15.5), LEFT_OUT, "15.5"),
    "a batch axis": (set_to(SEEN, "latents", lambda x: x[None]), LEFT_OUT, "[1, 8, 16, 1, 2]"),
    "of another VAE": (
        set_to(SEEN, "latents", lambda x: torch.cat([x, x])), LEFT_OUT, "8 channels"),
    "channels last": (set_to(SEEN, "latents", lambda x: x.movedim(0, -1)), LEFT_OUT, "expected"),
    "int8 latents": (set_to(SEEN, "latents", lambda x: x.to(torch.int8)), LEFT_OUT, "int8"),
    "float8 latents": (
        set_to(SEEN, "latents", lambda x: x.to(torch.float8_e4m3fn)), LEFT_OUT, "float8"),
    "complex latents": (set_to(SEEN, "latents", lambda x: x + 0j), LEFT_OUT, "complex64"),
    "sparse latents": (set_to(SEEN, "latents", lambda x: x.to_sparse()), LEFT_OUT, "sparse"),
    "latents without values": (set_to(SEEN, "latents", lambda x: x.to("meta")), LEFT_OUT, "meta"),
    "NaN": (set_to(SEEN, "latents", at((0, 3, 0, 1), math.nan)), LEFT_OUT, "NaN"),
    "infinite": (set_to(SEEN, "latents", at((0, 3, 0, 1), -math.inf)), LEFT_OUT, "infinite"),
    "float64 beyond float32": (
        set_to(SEEN, "latents", lambda x: at((0, 0, 0, 0), 1e300)(x.double())), LEFT_OUT,
        "infinite"),
    "squares overflow": (set_to(SEEN, "latents", at((0, 0, 0, 0), 1e30)), LEFT_OUT, "1.0e+30"),
    "latents a list": (set_to(SEEN, "latents", lambda x: x.tolist()), LEFT_OUT, "type list"),
    "latents None": (set_to(SEEN, "latents", None), LEFT_OUT, "is None"),
    "latents a numpy array": (set_to(SEEN, "latents", lambda x: x.numpy()), LEFT_OUT, "numpy"),
    "no fps and width": (without(SEEN, "fps", "width"), LEFT_OUT, "fps, width"),
    "no latents": (without(SEEN, "latents"), LEFT_OUT, "keys latents"),
    "a bare tensor": (whole(SEEN, lambda seen: seen["latents"]), LEFT_OUT, "no dict"),
    "a list": (whole(SEEN, lambda seen: [seen]), LEFT_OUT, "no dict"),
    # the sound's latents
    "audio without latents": (without(HEARD, "latents"), LEFT_OUT, "key latents: no audio latents"),
    "audio a bare tensor": (whole(HEARD, lambda heard: heard["latents"]), LEFT_OUT, "no dict"),
    "audio packed": (
        set_to(HEARD, "latents", lambda x: x.transpose(0, 1).flatten(1)), LEFT_OUT, "[127, 4]"),
    "audio with a batch axis": (
        set_to(HEARD, "latents", lambda x: x[None]), LEFT_OUT, "[1, 2, 127, 2]"),
    "audio's time last": (set_to(HEARD, "latents", lambda x: x.mT), LEFT_OUT, "[2, time, 2]"),
    "audio of another VAE": (
        set_to(HEARD, "latents", lambda x: torch.cat([x, x])), LEFT_OUT, "[4, 127, 2]"),
    "audio NaN": (set_to(HEARD, "latents", at((0, 0, 0), math.nan)), LEFT_OUT, "audio latents ho"),
    "audio int16": (set_to(HEARD, "latents", lambda x: x.short()), LEFT_OUT, "int16"),
    # the text
    "text of another width": (
        set_to(TEXT, "video_prompt_embeds", torch.zeros(TOKENS, 48)), LEFT_OUT, "[1024, 32]"),
    "text of another length": (
        set_to(TEXT, "video_prompt_embeds", torch.zeros(100, 32)), LEFT_OUT, "[100, 32]"),
    "text of 2,048 tokens": (long_text, LEFT_OUT, "1024 at most"),
    "one text for two widths": (without(TEXT, "audio_prompt_embeds"), LEFT_OUT, "audio_prompt"),
    "no text": (
        without(TEXT, "video_prompt_embeds", "audio_prompt_embeds"), LEFT_OUT, "prompt_embeds"),
    "text None": (set_to(TEXT, "video_prompt_embeds", None), LEFT_OUT, "is None"),
    "text NaN": (
        set_to(TEXT, "audio_prompt_embeds", at((-1, 0), math.nan)), LEFT_OUT, "embeds hold NaN"),
    "text of integers": (dtype(TEXT, torch.int32), LEFT_OUT, "int32"),
    "text with a batch axis": (
        set_to(TEXT, "video_prompt_embeds", lambda x: x[None]), LEFT_OUT, "[1, 1024, 32]"),
    "no mask": (without(TEXT, "prompt_attention_mask"), LEFT_OUT, "lacks the key"),
    "mask None": (set_to(TEXT, "prompt_attention_mask", None), LEFT_OUT, "attention_mask is None"),
    "mask of another length": (
        set_to(TEXT, "prompt_attention_mask", torch.ones(512, dtype=torch.bool)), LEFT_OUT,
        "[512, 32]"),
    "mask with a batch axis": (
        set_to(TEXT, "prompt_attention_mask", lambda x: x[None]), LEFT_OUT, "[1, 1024]"),
    "mask for attention's logits": (
        set_to(TEXT, "prompt_attention_mask", lambda x: (x.float() - 1) * 1e4), LEFT_OUT,
        "0 and 1"),
    "mask empty": (set_to(TEXT, "prompt_attention_mask", torch.zeros_like), LEFT_OUT, "no token"),
    # what nobody should run
    "a pickled object": (set_to(SEEN, "trap", Trap()), REFUSED, "pickled objects"),
    "a pickled function": (set_to(HEARD, "duration", lambda _: print), REFUSED, "pickled objects"),
}  # fmt: skip

# --- how a clip is spoilt: by its files -----------------------------------------------------------


def change(kind, function):
    def spoil(root, name):
        path = file_of(root, kind, name)
        path.write_bytes(function(path.read_bytes()))

    return spoil


def saved(**options):
    """The same contents, by another way of torch.save."""

    def spoil(root, name):
        write(root, name, contents(CLIPS.index(name)), **options)

    return spoil


def pointer(content):
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize %d\n" % (
        0, len(content))  # fmt: skip


def removed(kind):
    return lambda root, name: file_of(root, kind, name).unlink()


def linked(root, name):
    for kind in KINDS:
        path = file_of(root, kind, name)
        path.rename(root / f"{kind}-elsewhere.pt")
        path.symlink_to(root / f"{kind}-elsewhere.pt")


def broken_link(root, name):
    path = file_of(root, "latents", name)
    path.unlink()
    path.symlink_to(root / "nowhere.pt")


def linked_folder(root, name):
    """Moved away and linked to, with a link back up beside it."""
    for kind in KINDS:
        folder = root / f"{kind}-elsewhere"
        folder.mkdir(exist_ok=True)
        path = file_of(root, kind, name)
        path.rename(folder / path.name)
        path.parent.joinpath("zz").symlink_to(folder)
        folder.joinpath("up").symlink_to(path.parent)


def named_as_before(root, name):
    """latent_z.pt in two folders, condition_z.pt in the third; last in order, as its twin."""
    for kind, new in zip(KINDS, ("latent_b", "latent_b", "condition_b"), strict=True):
        file_of(root, kind, name).rename(file_of(root, kind, new))


def by_numpy_1(root, name):
    """numpy 1 writes its function's name without the underscore, in a pickle that is plain text."""
    clip = list(contents(CLIPS.index(name)))
    numbers(np.float64)(clip)
    write(root, name, clip, _use_new_zipfile_serialization=False)
    new, old = b"cnumpy._core.multiarray\nscalar", b"cnumpy.core.multiarray\nscalar"
    for kind in KINDS[:2]:
        content = file_of(root, kind, name).read_bytes()
        assert new in content or old in content
        file_of(root, kind, name).write_bytes(content.replace(new, old))


FILES = {
    "the format before zip": (saved(_use_new_zipfile_serialization=False), ACCEPTED, ""),
    "numpy 1's scalars": (by_numpy_1, ACCEPTED, ""),
    "linked files": (linked, ACCEPTED, ""),
    "another pickle protocol": (saved(pickle_protocol=4), LEFT_OUT, "protocol"),
    "cut latents": (change("latents", lambda b: b[:-200]), LEFT_OUT, "damaged"),
    "cut text": (change("conditions", lambda b: b[: len(b) // 2]), LEFT_OUT, "damaged"),
    "half zeros": (
        change("audio_latents", lambda b: b[: len(b) // 2] + bytes(len(b) // 2)), LEFT_OUT,
        "damaged"),
    "empty": (change("latents", lambda b: b""), LEFT_OUT, "empty"),
    "a git-lfs pointer": (change("latents", pointer), LEFT_OUT, "git-lfs pointer"),
    "text as git-lfs pointer": (change("conditions", pointer), LEFT_OUT, "git-lfs pointer"),
    "a web page": (change("latents", lambda b: b"<!DOCTYPE html>" * 9), LEFT_OUT, "torch.save"),
    "no audio_latents": (removed("audio_latents"), LEFT_OUT, "lacks audio_latents/b.pt"),
    "no conditions": (removed("conditions"), LEFT_OUT, "lacks conditions/b.pt"),
    "a broken link": (broken_link, LEFT_OUT, "cannot be opened"),
}  # fmt: skip

EVERY = CONTENTS | FILES


def spoilt(root, variant, names=(SPOILT,)):
    """A cache with the `names` spoilt."""
    cache(root)
    for name in names:
        spoil = EVERY[variant][0]
        if variant in FILES:
            spoil(root, name)
            continue
        clip = list(contents(CLIPS.index(name)))
        spoil(clip)
        write(root, name, clip)
    return root


def outcome(expected):
    return [variant for variant, (_, found, _) in EVERY.items() if found == expected]


# --- what becomes of it ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory):
    return save_tiny_ltx2(tmp_path_factory.mktemp("ltx2"), "2.3", layers=1)


@pytest.fixture(scope="module")
def losses_of(ltx2, tmp_path_factory):
    """The losses of six steps on a cache."""

    def losses(folder):
        output = tmp_path_factory.mktemp("run")
        config = TrainConfig(
            data=str(folder), model=str(ltx2), output=str(output), steps=6, batch_size=2,
            lora_rank=2, warmup=1,
        )  # fmt: skip
        result = train(config, progress=False)
        assert result["skipped"] == 0
        rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows]

    return losses


@pytest.fixture(scope="module")
def twin(losses_of, tmp_path_factory):
    """The clean cache, and its losses."""
    folder = cache(tmp_path_factory.mktemp("twin"))
    return folder, losses_of(folder)


@pytest.mark.parametrize("variant", outcome(ACCEPTED))
def test_what_is_accepted_trains_as_its_twin(variant, twin, losses_of, tmp_path, capsys):
    folder = spoilt(tmp_path, variant)
    assert losses_of(folder) == twin[1]
    assert f"3 of 3 clips in {folder / '.precomputed'} used\n" in capsys.readouterr().err


@pytest.mark.parametrize("variant", outcome(LEFT_OUT))
def test_what_is_left_out_is_named(variant, ltx2, twin, tmp_path):
    folder, word = spoilt(tmp_path / "one", variant), EVERY[variant][2]
    data = open_latents(folder, LTX2(ltx2))
    assert [path.relative_to(data.root / "latents").as_posix() for path in data.clips] == [
        "c.pt", "walks/a.pt",
    ]  # fmt: skip
    ((path, reason),) = data.skipped
    assert path == file_of(folder, "latents", SPOILT)
    assert word in reason
    assert data.summary.splitlines() == [
        f"2 of 3 clips in {data.root} used",
        f"  b.pt: {reason}",
    ]
    clean = open_latents(twin[0], LTX2(ltx2))
    for found, expected in zip(data, (clean[1], clean[2]), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", [v for v in outcome(LEFT_OUT) if v not in (
    "no audio_latents", "no conditions")])  # fmt: skip
def test_a_cache_without_a_good_clip_is_refused(variant, ltx2, tmp_path):
    """Where every clip has the fault, a setting is wrong: each clip is named, nothing trains."""
    folder = spoilt(tmp_path, variant, CLIPS)
    with pytest.raises(ValueError, match="none of 3 clips") as stopped:
        open_latents(folder, LTX2(ltx2))
    message = str(stopped.value)
    # Alike, they share a line with the reason, and each has one with its name; else both in one.
    assert EVERY[variant][2] in message
    lines = message.splitlines()[1:]
    named = {line.strip().split(": ")[0] for line in lines}
    assert {f"{name}.pt" for name in CLIPS} <= named
    assert len(lines) == (4 if lines[0].startswith("  3 files: ") else 3)


@pytest.mark.parametrize("variant", outcome(REFUSED))
def test_what_might_run_refuses_the_cache(variant, ltx2, tmp_path):
    folder = spoilt(tmp_path, variant)
    with pytest.raises(ValueError, match=rf"b\.pt is refused: .*{EVERY[variant][2]}"):
        open_latents(folder, LTX2(ltx2))


def test_the_old_names(ltx2, losses_of, twin, tmp_path):
    named_as_before(cache(tmp_path), SPOILT)
    data, clean = (PrecomputedDataset(folder, LTX2(ltx2)) for folder in (tmp_path, twin[0]))
    assert (len(data), data.skipped) == (3, [])
    for name, tensor in data[1].items():  # c, latent_b, walks/a
        assert torch.equal(tensor, clean[0][name])


def test_linked_folders_are_read(ltx2, tmp_path):
    linked_folder(cache(tmp_path), SPOILT)
    data = PrecomputedDataset(tmp_path, LTX2(ltx2))
    assert [path.name for path in data.clips] == ["c.pt", "a.pt", "b.pt"]


def test_average_rates_are_one_rate(ltx2, tmp_path):
    """Cut clips of 29.970 to 29.986 on average, and one at 25 that is of another format."""
    rates = [29.970 + 0.002 * step for step in range(9)]
    for index, rate in enumerate(rates):
        write(tmp_path, f"{index}", contents(index, fps=rate))
    write(tmp_path, "slow", contents(9, fps=25.0))
    model = LTX2(ltx2)
    data = PrecomputedDataset(tmp_path, model)
    assert (len(data), model.clip_format.fps) == (10, 29.978)
    assert [bucket.fps for bucket in data.buckets] == [29.978] * 9 + [25.0]
    assert data.summary.splitlines() == [
        f"10 of 10 clips in {data.root} used",
        "  9 of 16x1x2 latents at 29.978 fps",
        "  1 of 16x1x2 latents at 25 fps",
    ]


@pytest.mark.parametrize(("frames", "left"), [(3, 2), (4, 1), (7, 1)])
def test_sound_for_25_fps_beside_24(frames, left, ltx2, tmp_path):
    """40 ms are reached at 25 pictures; what is nearer than that is one length."""
    clip = contents(0, frames=frames)
    write(tmp_path, "good", clip)
    write(tmp_path, "quick", (clip[SEEN], contents(0, fps=25.0, frames=frames)[HEARD], clip[TEXT]))
    assert len(open_latents(tmp_path, LTX2(ltx2))) == left


def test_many_that_fail_alike_share_a_line(ltx2, tmp_path):
    cache(tmp_path)
    for index in range(60):
        write(tmp_path, f"long{index:02}", contents(0)[:1] + contents(0, fps=12 + index / 100)[1:])
        write(tmp_path, f"deaf{index:02}", contents(0))
        file_of(tmp_path, "audio_latents", f"deaf{index:02}").unlink()
    data = PrecomputedDataset(tmp_path, LTX2(ltx2))
    lines = data.summary.splitlines()
    assert lines[0].startswith("3 of 123 clips")
    assert lines[1:4] == ["  60 files: it lacks audio_latents/…", "    deaf00.pt", "    deaf01.pt"]
    assert lines[53].startswith("  60 files: expected … audio latents, got …")
    assert lines[52] == lines[-1] == "    and 10 more"
    assert len(lines) == 1 + 2 * 52
    assert len(data.skipped) == 120


def test_files_without_latents_are_mentioned(ltx2, tmp_path):
    cache(tmp_path)
    file_of(tmp_path, "latents", SPOILT).unlink()
    data = PrecomputedDataset(tmp_path, LTX2(ltx2))
    assert data.summary.splitlines() == [
        f"2 of 2 clips in {data.root} used",
        "  audio_latents/b.pt: no latents beside",
        "  conditions/b.pt: no latents beside",
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_latents_of_several_precisions_make_one_batch(workers, ltx2, tmp_path):
    """As the trainer stores them, pictures in bfloat16 and sound in float32, and one of neither."""
    for name in CLIPS:
        clip = list(contents(CLIPS.index(name)))
        dtype(SEEN, torch.float16 if name == SPOILT else torch.bfloat16)(clip)
        dtype(TEXT, torch.bfloat16)(clip)
        clip[HEARD]["latents"].requires_grad_()  # which no other process could hand over
        write(tmp_path, name, clip)
    data = open_latents(tmp_path, LTX2(ltx2))
    assert {sample["video"].dtype for sample in data} == {torch.float32}
    assert {sample["video_features"].dtype for sample in data} == {torch.bfloat16}
    config = TrainConfig(
        data=str(tmp_path), model=str(ltx2), output=str(tmp_path / "run"), steps=3, batch_size=3,
        lora_rank=2, workers=workers,
    )  # fmt: skip
    assert train(config, progress=False)["skipped"] == 0


def test_a_file_that_changes_after_the_check_is_named(ltx2, tmp_path):
    data = open_latents(cache(tmp_path), LTX2(ltx2))
    change("conditions", lambda content: content[:-200])(tmp_path, SPOILT)
    with pytest.raises(ValueError, match=r"b\.pt: conditions/b\.pt is damaged; it has changed"):
        data[0]
    write(tmp_path, SPOILT, contents(1, rows=2))
    with pytest.raises(ValueError, match=r"b\.pt has changed since it was checked"):
        data[0]


def test_a_folder_of_pictures_alone_is_refused(ltx2, tmp_path):
    """As the trainer leaves it without `with_audio`."""
    shutil.rmtree(cache(tmp_path) / ".precomputed" / "audio_latents")
    with pytest.raises(ValueError, match=r"none of 3 clips(.|\n)*b\.pt: it lacks audio_latents"):
        open_latents(tmp_path, LTX2(ltx2))


def test_the_embedded_model_does_not_take_them(tmp_path):
    with pytest.raises(ValueError, match="expected an LTX-2 pipeline as model, got Tiny"):
        open_latents(cache(tmp_path), Tiny())


def test_from_the_command_line(ltx2, tmp_path, monkeypatch, capsys):
    """Exit code 0 with the clips that are whole, each other one named; 2 where none is."""

    def run(folder):
        arguments = ["train", "--model", ltx2, "--data", folder, "--output", tmp_path / "run"]
        arguments += ["--steps", 2, "--batch-size", 1, "--lora-rank", 2]
        monkeypatch.setattr(sys, "argv", ["syncdpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr().err

    code, said = run(spoilt(tmp_path / "one", "sound twice as long"))
    assert code == 0
    assert "2 of 3 clips in" in said
    assert "b.pt: expected 126 audio latents, got 254" in said
    code, said = run(spoilt(tmp_path / "all", "sound twice as long", CLIPS))
    assert code == 2
    assert "none of 3 clips in" in said
    assert "Traceback" not in said


def test_opening_is_lean(ltx2, tmp_path, monkeypatch):
    """No more than the files of one clip are in memory; what a clip of LTX-2's size costs."""
    cache(tmp_path)
    alive, most = set(), []
    load = torch.load

    def watched(*arguments, **options):
        content = load(*arguments, **options)
        for value in content.values():
            if torch.is_tensor(value):
                key = object()
                alive.add(key)
                weakref.finalize(value.untyped_storage(), alive.discard, key)
        most.append(len(alive))
        return content

    monkeypatch.setattr(torch, "load", watched)
    PrecomputedDataset(tmp_path, LTX2(ltx2))
    assert max(most) <= 5  # two of latents, three of text
    assert len(most) == len(CLIPS) * len(KINDS)  # each file once


def test_opening_is_lean_at_full_size(tmp_path):
    clip = full_size_clip()
    for index in range(8):
        write(tmp_path, f"{index}", clip)
    size = sum(file_of(tmp_path, kind, "0").stat().st_size for kind in KINDS)
    since = time.perf_counter()
    assert len(PrecomputedDataset(tmp_path, FullSize())) == 8
    each = (time.perf_counter() - since) / 8
    print(f"{size / 1e6:.1f} MB a clip, checked in {1e3 * each:.1f} ms")
    assert each < 0.5  # generous: it tells a second copy or reading from seconds of arithmetic


def full_size_clip():
    mask = torch.arange(TOKENS) >= TOKENS - 100
    seen = {"latents": torch.randn(128, 16, 16, 24).bfloat16(), "fps": 24.0}
    heard = {"latents": torch.randn(8, 127, 16), "num_time_steps": 127, "frequency_bins": 16}
    text = {
        "video_prompt_embeds": torch.randn(TOKENS, 4096).bfloat16(),
        "audio_prompt_embeds": torch.randn(TOKENS, 2048).bfloat16(),
        "prompt_attention_mask": mask,
    }
    return (
        seen | {"num_frames": 16, "height": 16, "width": 24},
        heard | {"duration": SECONDS},
        text,
    )


class FullSize:
    """As much of LTX-2 at its own size as opening a cache asks for."""

    text_tokens = TOKENS
    timelines = (None, SimpleNamespace(rate=25.0, frames=126))

    def __init__(self):
        self.config = {
            "in_channels": 128, "audio_in_channels": 128, "vae_scale_factors": (8, 32, 32),
            "causal_offset": 1, "audio_scale_factor": 4,
        }  # fmt: skip
        parts = {
            "latent_channels": 8,
            "video_connector_num_attention_heads": 32, "video_connector_attention_head_dim": 128,
            "audio_connector_num_attention_heads": 32, "audio_connector_attention_head_dim": 64,
        }  # fmt: skip
        self.parts = SimpleNamespace(name="full size", config=lambda component: parts)

    def set_format(self, frames, height, width, fps):
        assert (frames, height, width, fps) == (121, 512, 768, 24)


# --- caches of ours -------------------------------------------------------------------------------


@pytest.fixture
def our_cache(tmp_path):
    """Three files as `prepare` leaves them."""
    identity = {"model": "ours"}
    clips = [{"file": f"{name}.safetensors", "source": name} for name in "abc"]
    index = {"format": 1, "identity": identity, "clips": clips}
    (tmp_path / "latents").mkdir()
    (tmp_path / "index.json").write_text(json.dumps(index))
    for name in "abc":
        write_ours(tmp_path, name, identity)
    assert len(LatentDataset(tmp_path, identity)) == 3
    return tmp_path


def write_ours(root, name, identity):
    record = canonical_json({"format": 1, "identity": digest(identity)})
    content = save({"video": torch.zeros(4, 2)}, metadata={"syncdpo": record})
    (root / "latents" / f"{name}.safetensors").write_bytes(content)


@pytest.mark.parametrize("fault", ["missing", "cut", "of another model", "a pointer"])
def test_a_broken_file_of_our_cache_is_named_at_once(fault, our_cache):
    path = our_cache / "latents" / "b.safetensors"
    match fault:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "of another model":
            write_ours(our_cache, "b", {"model": "theirs"})
        case "a pointer":
            path.write_bytes(pointer(path.read_bytes()))
    with pytest.raises(ValueError, match=r"1 of 3 files are .* \(b\.safetensors\)"):
        LatentDataset(our_cache)


def test_a_cache_that_lost_its_index_is_told_from_the_trainers(our_cache):
    (our_cache / "index.json").unlink()
    with pytest.raises(ValueError, match=r"expected \.pt files in"):
        open_latents(our_cache, Tiny())
