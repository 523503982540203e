"""Clips that the model makes while it is trained, always from the same noise, and their figures.

Nothing of it reaches the training: noise comes from seeds, torch's own random state is put back,
and so is every module's mode. Where GPUs are several, the first process samples, the others wait.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn

from syncdpo.data.buckets import Bucket, take_format
from syncdpo.data.captions import caption_lines
from syncdpo.data.clips import Clip, read_clip, write_clip
from syncdpo.data.files import write_atomic
from syncdpo.data.precomputed import open_latents
from syncdpo.evaluation import Metric, load_metric, mean_score
from syncdpo.metrics import av_align, clip_metrics, summarise
from syncdpo.models import Model
from syncdpo.sampling import generate, noise_seeds
from syncdpo.training.checkpoint import Log
from syncdpo.training.config import TrainConfig

FOLDER = "samples"  # within a run's
ABOUT = "about.json"  # what the clips of every step have in common, by their number
REAL = "real"  # the given pictures with their own sound, beside the steps' folders
FIGURES = ("f1", "onset_error_ms", "events_per_clip", "seen_per_clip", "clips")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
MOMENTS = 8  # bytes of AdamW's for each weight that is trained
WAITING = timedelta(hours=6)  # of other processes for the one that samples; 10 minutes are usual


class Samples:
    """What `sample_every` and its kin ask for.

    Raises ValueError at once, so that no run ends at its two hundredth step, where the model could
    not sample: for want of a component, of captions or pictures, of a metric, of whole weights.
    """

    def __init__(self, config: TrainConfig, model: Model, accelerator: Accelerator):
        self.config, self.model, self.accelerator = config, model, accelerator
        self.every, self._said = config.sample_every, False
        self.bucket: Bucket | None = None  # of several clip formats, that of the samples
        if not self.every:
            _check_unused(config)
            return
        if accelerator.distributed_type in SHARDED:
            raise ValueError(
                "sample_every: expected 0 where weights are in shards (FSDP, DeepSpeed), which no "
                f"pipeline can run, got {self.every}; `syncdpo sample --weights` makes clips of "
                "what such a run leaves"
            )
        if config.offload != "none":
            raise ValueError(
                f"sample_every: expected 0 with offload: {config.offload}, for the pipeline wants "
                f"the whole model on the device, got {self.every}; `syncdpo sample --weights` "
                "makes clips of what such a run leaves"
            )
        self.captions = _captions(config, model, accelerator.is_main_process)
        self.metrics = _metrics(config, accelerator.is_main_process)
        self.folder = Path(config.output) / FOLDER
        self.options = {"steps": config.sample_steps or None}
        self.count = config.sample_count
        if config.sample_pictures:
            self._open_pictures()
        self.seeds = noise_seeds(self.count, config.seed, "sample")

    def take(self, step: int, log: Log, *, last: bool = False) -> None:
        """After so many steps, where it is their turn, or all are done: clips to files and `log`.

        Not where an earlier part of this run has sampled them. Every process must call it.
        """
        if not self.every or (step % self.every and not last):
            return
        if self.accelerator.is_main_process:
            if step not in log.known("samples"):
                found, paths = self._measured(step)
                log.found(step, "samples", found)
                log.clips(step, paths)
            elif step == log.began:  # trackers forget what was shown at the step they go on from
                log.clips(step, sorted(step_folder(Path(self.config.output), step).glob("*.mp4")))
        self.accelerator.wait_for_everyone()

    def _measured(self, step: int) -> tuple[dict, list[Path]]:
        take_format(self.model, self.bucket)
        self._say_what_they_are()
        device = self.accelerator.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        folder = step_folder(Path(self.config.output), step)
        with undisturbed(self.model.transformer), in_one_sentence(step):
            paths = list(
                generate(
                    self.model,
                    folder,
                    self.seeds,
                    captions=self.captions,
                    progress=False,
                    **self.options,
                )
            )
            if hasattr(self.model, "put_aside"):
                self.model.put_aside()
        if device.type == "cuda" and not step:
            _check_room(self.model.transformer, device)
        return figures(map(_read, paths), self.metrics), paths

    def _open_pictures(self) -> None:
        """The pictures of a cache that want a sound."""
        if not self.model.adds_sound:
            raise ValueError(
                f"sample_pictures: expected none, {self.config.model} makes picture and sound at "
                f"once, got {self.config.sample_pictures!r}; sample_captions says what of"
            )
        data = open_latents(self.config.sample_pictures, self.model)
        self.count = min(self.count, len(data))
        self.given = [data[i] for i in range(self.count)]
        video = torch.stack([latents["video"] for latents in self.given])
        self.options["video"] = video.to(self.accelerator.device)

    def _say_what_they_are(self) -> None:
        """Captions, and the given clips with their own sound, once."""
        if self._said:
            return
        self._said = True
        self.folder.mkdir(parents=True, exist_ok=True)
        clips = [{"caption": text} for text in self.captions for _ in range(self.count)]
        about: dict = {"clips": clips, "pictures": Path(self.config.sample_pictures).name}
        if self.config.sample_pictures:
            (self.folder / REAL).mkdir(exist_ok=True)
            for number, latents in enumerate(self.given):
                [clip] = self.model.decode(latents["video"][None], latents["audio"][None])
                write_clip(self.folder / REAL / f"{number:03d}.mp4", clip)
            real = sorted((self.folder / REAL).glob("*.mp4"))
            about[REAL] = figures(map(_read, real), self.metrics)
        write_atomic(self.folder / ABOUT, json.dumps(about, indent=2).encode())


def step_folder(run: Path, step: int) -> Path:
    """Where the clips are that were made after `step` steps."""
    return run / FOLDER / f"step-{step:06d}"


def waiting(config: TrainConfig) -> list[InitProcessGroupKwargs]:
    """For accelerate: how long processes wait for each other, where one samples meanwhile."""
    return [InitProcessGroupKwargs(timeout=WAITING)] if config.sample_every else []


def figures(clips: Iterator[Clip], metrics: dict[str, Metric]) -> dict[str, float | int | None]:
    """Onset error, F1 and sounds per clip over all of them, and the means of `metrics`."""
    seen, scores = [], {name: [] for name in metrics}
    for clip in clips:
        seen.append(clip_metrics(clip))
        for name, metric in metrics.items():
            scores[name].append(metric(clip))
    summary = summarise(seen)
    means = {name: mean_score(values) for name, values in scores.items()}
    return {name: summary[name] for name in FIGURES} | means


@contextlib.contextmanager
def undisturbed(transformer: nn.Module) -> Iterator[None]:
    """Torch's random numbers, each module's mode and each weight's `requires_grad` as before."""
    modes = {module: module.training for module in transformer.modules()}
    trained = {p: p.requires_grad for p in transformer.parameters()}
    device = next(transformer.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        transformer.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for parameter, wanted in trained.items():
                parameter.requires_grad_(wanted)


def _check_room(transformer: nn.Module, device: torch.device) -> None:
    """Raises ValueError where AdamW's moments, which the first step makes, take this room away."""
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    needed = torch.cuda.max_memory_allocated(device) + MOMENTS * trained
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if needed > room:
        raise ValueError(
            f"sample_every: expected {needed / 1e9:.1f} GB on the GPU for samples beside what is "
            f"trained, got {room / 1e9:.1f}; 0 trains without samples"
        )


@contextlib.contextmanager
def in_one_sentence(step: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(
            f"sample_every: no room on the GPU for samples beside the training, at step {step} "
            f"({reason}); 0 trains without samples"
        ) from error


def _read(path: Path) -> Clip:
    return read_clip(path, require_sound=False)


def _check_unused(config: TrainConfig) -> None:
    wanted = ("sample_captions", "sample_pictures", "sample_steps", "metric")
    if given := [name for name in wanted if getattr(config, name)]:
        raise ValueError(f"{', '.join(given)}: expected none without sample_every")


def _captions(config: TrainConfig, model: Model, says: bool) -> list[str]:
    """A file's lines, or the text itself. Raises ValueError where the model could not take them."""
    text = config.sample_captions
    captions = [text]
    if text and (path := Path(text)).suffix == ".txt":
        captions, guess = caption_lines(path)
        if guess and says:
            print(f"sample_captions: {path}: {guess}", file=sys.stderr)
    try:
        model.check_generation(captions)
    except ValueError as error:
        raise ValueError(f"sample_every: {error} (sample_captions: {text!r})") from error
    return captions


def _metrics(config: TrainConfig, says: bool) -> dict[str, Metric]:
    """AV-Align, where it can be had, and those of the user."""
    found = dict(load_metric(name.strip()) for name in config.metric.split(",") if name.strip())
    if taken := found.keys() & {*FIGURES, "av_align"}:
        raise ValueError(f"metric: expected other names than the figures', got {', '.join(taken)}")
    try:
        importlib.import_module("librosa")
        importlib.import_module("cv2")
    except ImportError as error:
        missing = f"samples: without AV-Align, which needs {error.name}"
        if says:
            print(f"{missing}: pip install 'syncdpo[eval]'", file=sys.stderr)
        return found
    return {"av_align": av_align} | found
