"""TensorBoard, W&B and others, through accelerate: figures by step, and clips to look at."""

from __future__ import annotations

import io
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from syncdpo.data.clips import read_clip
from syncdpo.training.config import TrainConfig, dump_config
from syncdpo.training.publish import shareable

PROJECT = "syncdpo"
WANDB_RUN = "wandb-run.txt"  # its id, so that a resumed run goes on in the same curves
INSTALL = {"wandb": "pip install 'syncdpo[track]'"}


def tracker_names(config: TrainConfig) -> list[str]:
    """Those that `log_with` asks for. Raises ValueError for one that is not there."""
    names = [name.strip() for name in config.log_with.split(",") if name.strip()]
    names = [name for name in names if name != "none"]
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"log_with: expected {', '.join(available)} or none, got {name!r}; "
                f"{INSTALL.get(name, f'is {name} installed?')}"
            )
    return names


def start_trackers(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Opens them, to go on at `step`, and tells each the settings. By the main process alone.

    Raises ValueError where one does not start.
    """
    if sentence := without_clips(config):
        print(sentence, file=sys.stderr)
    settings = shareable(config)
    options = {"tensorboard": {"purge_step": step}, "wandb": _wandb_options(config, step)}
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=options)
    except Exception as error:  # every client has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"log_with: {config.log_with} does not start ({reason})") from error
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":  # its own way makes another run of the settings
            tracker.tracker.add_text("settings", f"```\n{dump_config(settings)}```", step)
        else:
            tracker.store_init_configuration(asdict(settings))


def _wandb_options(config: TrainConfig, step: int) -> dict:
    if "wandb" not in tracker_names(config):
        return {}
    output = Path(config.output)
    path = output / WANDB_RUN
    if not step or not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    name = output.resolve().name
    return {"dir": str(output), "name": name, "id": path.read_text().strip(), "resume": "allow"}


def log_clips(accelerator: Accelerator, step: int, paths: Sequence[Path]) -> None:
    """Clips to the trackers that can show them; they are in files all the same."""
    for tracker in accelerator.trackers:
        if show := SHOW.get(tracker.name):
            show(tracker, step, paths)


def without_clips(config: TrainConfig) -> str:
    """A sentence about the trackers that get the samples' figures alone, or nothing."""
    blind = [name for name in tracker_names(config) if name not in SHOW]
    if not blind or not config.sample_every:
        return ""
    return (
        f"log_with: {', '.join(blind)} gets the samples' figures, not the clips, which are in "
        f"{config.output}/samples; {' and '.join(SHOW)} show them"
    )


def _to_tensorboard(tracker: GeneralTracker, step: int, paths: Sequence[Path]) -> None:
    """Pictures as an animated GIF, which is all that it plays, and the sound beside them."""
    for path in paths:
        clip = read_clip(path, require_sound=False)
        height, width = clip.video.shape[1:3]
        gif = Summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=_gif(clip.video.numpy(), clip.fps),
        )
        value = Summary.Value(tag=f"samples/{path.stem}", image=gif)
        tracker.writer._get_file_writer().add_summary(Summary(value=[value]), step)
        tracker.writer.add_audio(
            f"samples/{path.stem}", clip.audio.mean(0, keepdim=True), step, clip.sample_rate
        )
    tracker.writer.flush()


def _gif(video: np.ndarray, fps: float) -> bytes:
    """Pictures [T,H,W,3] as a GIF that starts again at its end; it counts in 1/100 s."""
    ends = np.round(np.arange(1, len(video) + 1) * 100 / fps).astype(int)
    durations = 10 * np.diff(ends, prepend=0)
    frames = [Image.fromarray(picture) for picture in video]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations.tolist(),
        loop=0,
    )
    return buffer.getvalue()


def _to_wandb(tracker: GeneralTracker, step: int, paths: Sequence[Path]) -> None:
    import wandb

    clips = {f"samples/{path.stem}": wandb.Video(str(path), format="mp4") for path in paths}
    tracker.tracker.log(clips, step=step)


SHOW: dict[str, Callable] = {"tensorboard": _to_tensorboard, "wandb": _to_wandb}
