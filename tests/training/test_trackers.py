"""Trackers: what is in log.jsonl is in TensorBoard and W&B too, and samples can be looked at."""

import io
import json
import struct
import time

import pytest
from micro import micro_model, random_latents
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from syncdpo.train import train
from syncdpo.training.checkpoint import read_figures, read_log
from syncdpo.training.config import TrainConfig
from syncdpo.training.trackers import PROJECT, without_clips

SETTINGS = {"steps": 4, "batch_size": 4, "sample_every": 2, "sample_count": 1, "sample_steps": 2}


def run(folder, **settings):
    config = TrainConfig(output=str(folder), **SETTINGS | settings)
    train(config, micro_model(), random_latents(), progress=False)


def board(folder):
    everything = {"images": 0, "audio": 0, "scalars": 0}
    return EventAccumulator(str(folder / PROJECT), size_guidance=everything).Reload()


def test_tensorboard_has_every_figure_and_the_clips(tmp_path):
    run(tmp_path)
    events = board(tmp_path)
    for name in ("loss", "margin", "grad_norm"):
        found = {e.step: e.value for e in events.Scalars(f"train/{name}")}
        assert found == pytest.approx({r["step"]: r[name] for r in read_log(tmp_path)}, rel=1e-6)
    sounds = {e.step: e.value for e in events.Scalars("samples/events_per_clip")}
    rows = read_figures(tmp_path, "samples")
    assert sounds == {step: row["events_per_clip"] for step, row in rows}
    pictures = events.Images("samples/000")
    assert [entry.step for entry in pictures] == [0, 2, 4]
    film = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert (film.format, film.size, film.n_frames) == ("GIF", (64, 64), 48)
    assert [entry.step for entry in events.Audio("samples/000")] == [0, 2, 4]
    assert "learning_rate: 0.0003" in str(events.Tensors("settings/text_summary"))


def test_a_resumed_run_goes_on_in_the_same_curve(tmp_path):
    run(tmp_path, checkpoint_every=2)
    max(tmp_path.glob("checkpoint-*")).unlink()
    run(tmp_path, checkpoint_every=2, resume=True)
    events = board(tmp_path)
    assert [entry.step for entry in events.Scalars("train/loss")] == [0, 1, 2, 3]
    assert [entry.step for entry in events.Scalars("samples/events_per_clip")] == [0, 2, 4]
    assert [entry.step for entry in events.Images("samples/000")] == [0, 2, 4]


def test_none_is_none(tmp_path):
    run(tmp_path, log_with="none")
    assert not (tmp_path / PROJECT).exists()
    assert len(read_log(tmp_path)) == 4


def test_a_tracker_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"log_with: expected tensorboard.* or none, got 'abacus'"):
        run(tmp_path, log_with="tensorboard, abacus")


def test_the_way_to_wandb_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("syncdpo.training.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"got 'wandb'; pip install 'syncdpo\[track\]'"):
        run(tmp_path, log_with="wandb")


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise RuntimeError("no\nway")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refused)
    with pytest.raises(ValueError, match=r"log_with: tensorboard does not start \(no way\)"):
        run(tmp_path)


def test_trackers_that_show_no_clips_are_named(monkeypatch):
    monkeypatch.setattr(
        "syncdpo.training.trackers.get_available_trackers", lambda: ["tensorboard", "mlflow"]
    )
    both = TrainConfig(log_with="tensorboard,mlflow", sample_every=1)
    assert without_clips(both).startswith("log_with: mlflow gets the samples' figures, not the")
    assert not without_clips(TrainConfig(log_with="mlflow"))
    assert not without_clips(TrainConfig(sample_every=1))


def test_wandb_offline_has_every_figure_and_the_clips(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs syncdpo[track]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, log_with="wandb,tensorboard", checkpoint_every=2)
    assert (tmp_path / PROJECT).is_dir()  # both
    history, config = offline_run(next((tmp_path / "wandb").glob("offline-run-*/*.wandb")))
    losses = {int(row["_step"]): row["train/loss"] for row in history if "train/loss" in row}
    assert losses == {row["step"]: row["loss"] for row in read_log(tmp_path)}
    sampled = [row for row in history if row.get("samples/000/_type") == "video-file"]
    sounds = {int(row["_step"]): row["samples/events_per_clip"] for row in sampled}
    rows = read_figures(tmp_path, "samples")
    assert sounds == {step: row["events_per_clip"] for step, row in rows}
    assert config["learning_rate"] == 3e-4
    media = tmp_path.glob("wandb/offline-run-*/files/media/videos/samples/*.mp4")
    made = {path.read_bytes() for path in tmp_path.glob("samples/step-*/*.mp4")}
    assert {path.read_bytes() for path in media} == made
    first = (tmp_path / "wandb-run.txt").read_text()
    max(tmp_path.glob("checkpoint-*")).unlink()
    run(tmp_path, log_with="wandb", checkpoint_every=2, resume=True)
    assert (tmp_path / "wandb-run.txt").read_text() == first  # the same run goes on
    assert len({path.stem.rpartition("-")[2] for path in tmp_path.glob("wandb/offline*")}) == 1


def offline_run(path):
    """(history, config) of a W&B run that was never sent."""
    from wandb.proto import wandb_internal_pb2

    history, config, ended, since = [], {}, False, time.monotonic()
    while not ended:  # a process of its own writes the file
        assert time.monotonic() - since < 60
        found = [wandb_internal_pb2.Record.FromString(c) for c in records(path.read_bytes())]
        ended = bool(found) and found[-1].WhichOneof("record_type") == "exit"
    for record in found:
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        if items:
            history.append({name: json.loads(value) for name, value in items.items()})
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return history, config


def records(content: bytes):
    """Records of a log in LevelDB's format, after a header of 7 bytes: blocks of 32 KiB, pieces of
    checksum (4 bytes), length (2), kind (1): whole, first, middle or last."""
    place, pieces = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""
