"""Folders of latents that the LTX-2 trainer prepared, read as they are, and any cache by one name.

The trainer writes `.precomputed/{latents,audio_latents,conditions}`, one .pt file per clip and the
same relative name in each. Latents are normalised already; text is cached as the connectors'
input, so the connectors run in `LTX2.velocity`. Old files differ: latents packed to [S,C], one
`prompt_embeds` for both streams, `condition_x.pt` beside `latent_x.pt`, padding trimmed off.
"""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from syncdpo.data.latents import INDEX, LatentDataset

FOLDER = ".precomputed"


def open_latents(folder: str | Path, model) -> Dataset:
    """The latents in `folder` as a dataset for `model`: a cache of ours, or the LTX-2 trainer's.

    A model with `set_format` takes on the clip format of the data. Raises ValueError where there
    are no latents, or latents that do not fit the model.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        if hasattr(model, "set_format"):
            clip = LatentDataset(folder).identity
            frames = round(clip.get("seconds", 0) * clip.get("fps", 0))
            if frames and {"height", "width"} <= clip.keys():
                model.set_format(frames, clip["height"], clip["width"], clip["fps"])
        data: Dataset = LatentDataset(folder, model.identity())
    elif is_precomputed(folder):
        data = PrecomputedDataset(folder, model)
    else:
        raise ValueError(
            f"data: expected a cache made by `syncdpo prepare` or a {FOLDER} folder of the LTX-2 "
            f"trainer, got {folder}"
        )
    if hasattr(model, "check_latents"):
        model.check_latents(data[0])
    return data


def is_precomputed(folder: str | Path) -> bool:
    """Whether `folder` is, or holds, what the LTX-2 trainer prepared."""
    return any((root / "latents").is_dir() for root in (Path(folder) / FOLDER, Path(folder)))


class PrecomputedDataset(Dataset):
    """The clips of a `.precomputed` folder that share the commonest size and frame rate.

    folder: the folder, or the one that holds it. model: an `LTX2`; takes on that clip format.

    Item i: "video" [S,C] and "audio" [L,C], packed; "video_features", "audio_features" [1024,D] and
    "text_mask" bool [1024], padded on the left. `skipped` holds the clips left out, with reasons.
    Raises ValueError where no clip is whole, and for a file that holds anything but tensors,
    numbers and their containers.
    """

    def __init__(self, folder: str | Path, model):
        root = Path(folder)
        self.root = root / FOLDER if (root / FOLDER).is_dir() else root
        self.skipped: list[tuple[Path, str]] = []
        formats = {}
        for latents in sorted((self.root / "latents").rglob("*.pt")):
            try:
                formats[latents] = self._format(latents)
            except _Unusable as error:
                self.skipped.append((latents, str(error)))
        if not formats:
            raise ValueError(
                f"data: none of {len(self.skipped)} clips in {self.root} has latents, audio "
                "latents and conditions"
            )
        chosen = Counter(formats.values()).most_common(1)[0][0]
        self.clips = [path for path, found in formats.items() if found == chosen]
        self.skipped += [
            (path, "it is {}x{}x{} latents at {:g} fps, most are {}x{}x{} at {:g}".format(
                *found, *chosen))
            for path, found in formats.items() if found != chosen
        ]  # fmt: skip
        frames, height, width, fps = chosen
        stride, down, across = model.config["vae_scale_factors"]
        first = model.config["causal_offset"]
        model.set_format((frames - 1) * stride + first, height * down, width * across, fps)
        self.audio_frames = model.timelines[1].frames
        self.text_tokens = model.text_tokens

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.clips[index]
        video = _load(path)["latents"]
        audio = _load(self._beside(path, "audio_latents"))["latents"]
        if len(audio[0]) < self.audio_frames:
            raise ValueError(
                f"{path}: expected {self.audio_frames} audio latents, got {len(audio[0])}"
            )
        packed = video if video.ndim == 2 else video.flatten(1).T
        return {
            "video": packed.contiguous(),
            "audio": audio.transpose(0, 1).flatten(1)[: self.audio_frames].contiguous(),
        } | _text(_load(self._conditions(path)), self.text_tokens)

    def _format(self, latents: Path) -> tuple[int, int, int, float]:
        """(frames, height, width) in latents and pictures per second, of a clip that is whole."""
        for path in (self._beside(latents, "audio_latents"), self._conditions(latents)):
            if not path.is_file():
                raise _Unusable(f"it lacks {path.relative_to(self.root)}")
        content = _load(latents)
        _load(self._beside(latents, "audio_latents"))
        missing = {"latents", "num_frames", "height", "width", "fps"} - content.keys()
        if missing:
            raise _Unusable(f"it lacks the keys {', '.join(sorted(missing))}")
        sizes = (int(content[key]) for key in ("num_frames", "height", "width"))
        return *sizes, round(float(content["fps"]), 3)

    def _beside(self, latents: Path, kind: str) -> Path:
        return self.root / kind / latents.relative_to(self.root / "latents")

    def _conditions(self, latents: Path) -> Path:
        path = self._beside(latents, "conditions")
        if path.name.startswith("latent_"):
            return path.with_name("condition_" + path.name.removeprefix("latent_"))
        return path


class _Unusable(ValueError):
    """A clip that cannot be used, for the reason given."""


def _text(conditions: dict, tokens: int) -> dict[str, Tensor]:
    """Both streams' text features and their mask, padded on the left to `tokens`."""
    video = conditions.get("video_prompt_embeds", conditions.get("prompt_embeds"))
    audio = conditions.get("audio_prompt_embeds")
    mask = conditions["prompt_attention_mask"].bool()
    padding = tokens - len(mask)
    return {
        "video_features": F.pad(video, (0, 0, padding, 0)),
        "audio_features": F.pad(video if audio is None else audio, (0, 0, padding, 0)),
        "text_mask": F.pad(mask, (padding, 0)),
    }


def _load(path: Path) -> dict:
    """The content of a .pt file: tensors, numbers and their containers, nothing else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds pickled objects other than tensors and numbers"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise _Unusable(f"{path.name} is damaged") from error
    if not isinstance(content, dict):
        raise _Unusable(f"{path.name} holds no dict of tensors")
    return content
