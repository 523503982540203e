"""What a generator must be able to do to be trained, and how one is found by its name."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from syncdpo.data.clips import Clip, ClipFormat
from syncdpo.models.own import is_own, load_own
from syncdpo.negatives.timeline import Timeline
from syncdpo.versions import checked_versions

Streams = tuple[Tensor, Tensor]  # (video, audio), each [B, …]
Conditions = dict[str, Tensor]  # whatever `encode` gave beside the latents, each [B, …]
CLIP_OPTIONS = ("frames", "height", "width", "fps")
LTX2_OPTIONS = ("text_encoder", "video_vae", "audio_vae", "shift_bound")
CHECKPOINT_OPTIONS = ("text_encoder_precision", "allow_distilled")


class Model(Protocol):
    """A joint video-audio flow-matching generator: x_σ = (1−σ)·x + σ·ε, v = sign·(ε − x).

    A model of several clip formats also has `set_format(frames, height, width, fps)`, the fields of
    `syncdpo.data.buckets.Bucket`: it changes `clip_format` and `timelines`, and with them what
    `encode`, `draw_sigma` and `velocity` take and give. Training calls it before every batch of a
    cache that holds more than one. Such a model may also have `check_latents(sample)`, which
    raises ValueError where a cached sample does not fit its weights and its format, and
    `put_aside()`, called after samples were made, which lets go of what training does not need.
    docs/models.md shows all of it on a model of sixty lines.
    """

    transformer: nn.Module
    clip_format: ClipFormat
    timelines: tuple[Timeline, Timeline]
    velocity_sign: int
    lora_targets: Sequence[str]
    # Whether `generate` takes `video`, latents of pictures that want a sound; such a model also has
    # `decode(video, audio)`, latents [B, …] to a list of clips.
    adds_sound: bool

    def of_audio(self, name: str) -> bool:
        """Whether a parameter or module of `transformer`, by its name, serves the audio alone."""

    def identity(self) -> dict:
        """What latents depend on; recorded in caches and compared before they are used."""

    def encode(self, clip: Clip, caption: str) -> dict[str, Tensor]:
        """One clip, no batch axis: "video", "audio" and the conditions."""

    def draw_sigma(self, batch: int, generator: torch.Generator) -> Streams:
        """Noise levels for training, [B] per stream, float32 on the CPU."""

    def velocity(
        self,
        transformer: Callable,
        noisy: Streams,
        sigma: Streams,
        conditions: Conditions,
    ) -> Streams:
        """What `transformer` (wrapped or not) predicts for noisy latents."""

    def generate(
        self, captions: Sequence[str], seeds: Tensor, *, steps: int | None = None, **guidance
    ) -> Iterator[Clip]:
        """One clip per caption; clip i is a function of its caption and seeds[i], int64.

        steps: the model's own number by default. guidance: options of the model's pipeline.
        Raises ValueError for captions or guidance given to a model that has no use for them.
        """

    def check_generation(self, captions: Sequence[str]) -> None:
        """Raises ValueError, before anything is loaded, where `generate` could not do these."""

    def save_weights(self, folder: Path, state: dict[str, Tensor], **options) -> None:
        """Write full or LoRA weights as safetensors, in a format that other tools load.

        options: `about`, what the file's metadata says of the run.
        """

    def load_weights(self, path: Path, **options) -> str:
        """Put weights written by `save_weights`, or a LoRA of another tool, into `transformer`.

        options: `allow_partial` and `dtype`, as in `syncdpo.models.weights.load_weights`. Returns a
        sentence about what was left out, or nothing.
        """


def load_model(name: str, **options) -> Model:
    """ "tiny", or a checkpoint: a diffusers pipeline of LTX-2 or Kandinsky 6, by folder or hub id,
    or a `.safetensors` file of LTX-2, whose own class says which it is; or a user's own model,
    "my_model:Own" or "folder/my_model.py:Own" (docs/models.md).

    Raises ValueError where an option is given to a model that has no use for it, or a clip format
    cannot be had, and `WrongVersions` where the libraries beneath cannot be imported.
    """
    if name == "tiny":
        if fixed := [option for option in CLIP_OPTIONS if option in options]:
            raise ValueError(
                f"{', '.join(fixed)}: tiny has one clip format, 2 s of 64×64 at 24 fps"
            )
        options = _without(LTX2_OPTIONS, options, "for LTX-2 alone, tiny has none")
        named = "for LTX-2 and Kandinsky 6 alone, tiny has none"
        options = _without(CHECKPOINT_OPTIONS, options, named)
        with checked_versions():
            from syncdpo.models.tiny import Tiny

        return Tiny(**options)
    if is_own(name):
        return load_own(name, options)
    with checked_versions():
        from syncdpo.models.families import family_of

        family = family_of(name)
    if family.family != "ltx2":
        options = _without(LTX2_OPTIONS, options, f"for LTX-2 alone, {family.title} has none")
    return family(name, **options)


def _without(others: Sequence[str], options: dict, why: str) -> dict:
    """`options` without those, if they are empty; raises ValueError where one is given."""
    if unused := [option for option in others if options.get(option)]:
        raise ValueError(f"{', '.join(unused)}: {why}")
    return {name: value for name, value in options.items() if name not in others}
