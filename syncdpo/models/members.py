"""What a model must have, by name and type, before anything of it is called or loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

from syncdpo.data.clips import ClipFormat
from syncdpo.negatives.timeline import Timeline

METHODS = (
    "of_audio", "identity", "encode", "draw_sigma", "velocity", "generate", "check_generation",
    "save_weights", "load_weights",
)  # fmt: skip
ATTRIBUTES = (
    "transformer", "clip_format", "timelines", "velocity_sign", "lora_targets", "adds_sound",
)  # fmt: skip
STREAMS = ("video", "audio")


def check_members(model) -> None:
    """Raises ValueError, naming what it is, where `model` lacks a part of `syncdpo.models.Model`.

    Nothing is called, and `transformer` not asked for, as it may be loaded when it first is.
    """
    kind = type(model).__name__
    missing = [name for name in (*ATTRIBUTES, *METHODS) if not _has(model, name)]
    if missing:
        raise ValueError(
            f"model: expected {kind} to follow the protocol of syncdpo.models.Model, it has no "
            f"{_listed(missing)}; docs/models.md shows what each returns"
        )
    if uncallable := [name for name in METHODS if not callable(getattr(model, name))]:
        raise ValueError(
            f"{uncallable[0]}: expected a method of {kind}, got "
            f"{type(getattr(model, uncallable[0])).__name__}"
        )
    _check(model, "clip_format", isinstance(model.clip_format, ClipFormat), "a ClipFormat")
    lines = model.timelines
    two = isinstance(lines, Sequence) and len(lines) == 2
    two = two and all(isinstance(line, Timeline) for line in lines)
    _check(model, "timelines", two, "two Timelines, of the picture and of the sound")
    _check(model, "velocity_sign", model.velocity_sign in (1, -1), "+1 for ε − x, or −1 for x − ε")
    targets = model.lora_targets
    several = isinstance(targets, Sequence) and not isinstance(targets, str)
    several = several and all(isinstance(target, str) and target for target in targets)
    _check(model, "lora_targets", several, "a tuple of the ends of modules' names")
    _check(model, "adds_sound", isinstance(model.adds_sound, bool), "True or False")
    if model.adds_sound and not callable(getattr(model, "decode", None)):
        raise ValueError(
            f"adds_sound: expected False, or a method decode(video, audio) of {kind} beside it, "
            "which shows given pictures with their own sound"
        )
    check_in_step(model)


def check_in_step(model) -> None:
    """Raises ValueError where a stream's latents are not as long as the clip, to one frame."""
    seconds = model.clip_format.seconds
    for stream, line in zip(STREAMS, model.timelines, strict=True):
        if abs(line.duration - seconds) > 1 / line.rate:
            raise ValueError(
                f"timelines: expected {seconds:g} s of {stream}, as clip_format has it, got "
                f"{line.frames} frames at {line.rate:g} a second, {line.duration:.3f} s"
            )


def _has(model, name: str) -> bool:
    """Without running a property."""
    try:
        inspect.getattr_static(model, name)
    except AttributeError:
        return hasattr(type(model), "__getattr__") and hasattr(model, name)
    return True


def _check(model, name: str, fits: bool, expected: str) -> None:
    if not fits:
        got = repr(getattr(model, name))
        raise ValueError(f"{name}: expected {expected} of {type(model).__name__}, got {got:.60}")


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
