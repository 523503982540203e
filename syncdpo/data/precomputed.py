"""Folders of latents that the LTX-2 trainer prepared, read as they are, and any cache by one name.

The trainer writes `.precomputed/{latents,audio_latents,conditions}`, one .pt file per clip and the
same relative name in each. Latents are normalised already; text is cached as the connectors'
input, so the connectors run in `LTX2.velocity`. Old files differ: latents packed to [S,C], one
`prompt_embeds` for both streams, `condition_x.pt` beside `latent_x.pt`, padding trimmed off.

Every file is read and checked once, when the folder is opened, and a clip that is not whole is left
out by name: found in the middle of a training it would end it, and picture and sound of different
lengths would never be found, only learnt.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from syncdpo.data.files import reasons
from syncdpo.data.latents import INDEX, LatentDataset

FOLDER = ".precomputed"
ONE_RATE = 1e-3  # by which rates may differ that are one: the trainer stores each clip's average
LARGEST = 1e4  # of a latent: normalised, they stay near 1, and the square of 1e20 is infinite
SLOW = 3.0  # seconds of checking before it shows how far it is
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def open_latents(folder: str | Path, model, *, progress: bool = False) -> Dataset:
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
        data = PrecomputedDataset(folder, model, progress=progress)
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
    """The clips of a `.precomputed` folder that are whole and share the commonest format.

    folder: the folder, or the one that holds it. model: an `LTX2`; takes on that clip format: a
    size in latents, and the median of frame rates that are within a thousandth of each other.

    Item i: "video" [S,C] and "audio" [L,C], packed; "video_features", "audio_features" [1024,D] and
    "text_mask" bool [1024], padded on the left. `skipped` holds the clips left out, with reasons,
    and `summary` says them. Raises ValueError where no clip can be used, for another model than
    LTX-2, and for a file that holds anything but tensors, numbers and their containers.
    """

    def __init__(self, folder: str | Path, model, *, progress: bool = False):
        root = Path(folder)
        self.root = root / FOLDER if (root / FOLDER).is_dir() else root
        self.skipped: list[tuple[Path, str]] = []
        paths = _files(self.root / "latents")
        if not paths:
            raise ValueError(f"data: expected .pt files in {self.root / 'latents'}, got none")
        self._layout = _Layout.of(model, self.root)
        found: dict[Path, _Format] = {}
        for path in tqdm(paths, "check", unit="clip", delay=SLOW, disable=not progress):
            try:
                found[path] = self._read(path)[1]
            except _Unusable as error:
                self.skipped.append((path, str(error)))
        self.clips = self._choose(found, model)
        self.skipped.sort()
        self.summary = self._summary(paths)
        if not self.clips:
            raise ValueError(f"data: none of {self.summary}")
        self._dtypes = {
            name: reduce(torch.promote_types, (found[path].dtypes[name] for path in self.clips))
            for name in found[self.clips[0]].dtypes
        }

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.clips[index]
        try:
            sample, clip = self._read(path)
        except _Unusable as error:
            raise ValueError(f"{path}: {error}; it has changed since it was checked") from error
        if clip.size != self.size or clip.fault or clip.audio < self.audio_frames:
            raise ValueError(f"{path} has changed since it was checked")
        sample["audio"] = sample["audio"][: self.audio_frames]
        return {name: x.to(self._dtypes[name]).contiguous() for name, x in sample.items()}

    # --- opening ----------------------------------------------------------------------------------

    def _choose(self, found: dict[Path, _Format], model) -> list[Path]:
        """The clips of the commonest format, which the model takes on; the others are skipped."""
        whole = {path: clip for path, clip in found.items() if not clip.fault}
        if not whole:
            self.skipped += [(path, clip.fault) for path, clip in found.items()]
            return []
        alike, rate = _commonest(whole)
        self.size = whole[alike[0]].size
        frames, height, width = self.size
        down, across = model.config["vae_scale_factors"][1:]
        model.set_format(self._layout.pictures(frames), height * down, width * across, rate)
        self.audio_frames = model.timelines[1].frames
        most = "most are" if 2 * len(alike) > len(found) else "those used are"
        most = f"{most} {_size(self.size)} at {rate:g}"
        clips = []
        for path, clip in found.items():
            reason = clip.fault
            if clip.size != self.size or abs(clip.rate - rate) > ONE_RATE * rate:
                reason = f"it is {_size(clip.size)} latents at {clip.rate:g} fps, {most}"
            elif not reason and clip.audio < self.audio_frames:  # by the common rate, not its own
                reason = f"expected {self.audio_frames} audio latents, got {clip.audio}"
            if reason:
                self.skipped.append((path, reason))
            else:
                clips.append(path)
        return clips

    def _summary(self, paths: list[Path]) -> str:
        """How many clips are used, why the others are not, and files that belong to no clip."""
        lines = [f"{len(self.clips)} of {len(paths)} clips in {self.root} used"]
        if not self.clips:
            lines = [f"{len(paths)} clips in {self.root} can be used with {self._layout.model}"]
        latents = self.root / "latents"
        lines += reasons([(path.relative_to(latents), why) for path, why in self.skipped])
        for kind, beside in (("audio_latents", self._audio), ("conditions", self._conditions)):
            known = {beside(path) for path in paths}
            folder = self.root / kind
            alone = [p.relative_to(self.root) for p in _files(folder) if p not in known]
            lines += reasons([(path, "no latents beside") for path in alone])
        return "\n".join(lines)

    # --- one clip ---------------------------------------------------------------------------------

    def _read(self, path: Path) -> tuple[dict[str, Tensor], _Format]:
        """The sample and its format. Raises _Unusable with what is wrong."""
        files = path, self._audio(path), self._conditions(path)
        for beside in files[1:]:
            if not beside.is_file():
                raise _Unusable(f"it lacks {beside.relative_to(self.root).as_posix()}")
        seen, heard, text = (_load(file, self.root) for file in files)
        video, size, rate = _video(seen, self._layout)
        audio = _audio(heard, self._layout)
        pictures = self._layout.pictures(size[0])
        fault = _mistimed(heard, len(audio), pictures, rate, self._layout)
        sample = {"video": video, "audio": audio} | _text(text, self._layout)
        dtypes = {name: tensor.dtype for name, tensor in sample.items()}
        return sample, _Format(size, rate, len(audio), dtypes, fault)

    def _audio(self, latents: Path) -> Path:
        return self.root / "audio_latents" / latents.relative_to(self.root / "latents")

    def _conditions(self, latents: Path) -> Path:
        path = self.root / "conditions" / latents.relative_to(self.root / "latents")
        if path.name.startswith("latent_"):
            return path.with_name("condition_" + path.name.removeprefix("latent_"))
        return path


class _Unusable(ValueError):
    """A clip that cannot be used, for the reason given."""


@dataclass(frozen=True)
class _Format:
    """What is kept of a clip that was checked."""

    size: tuple[int, int, int]  # frames, height, width in latents
    rate: float  # pictures per second
    audio: int  # audio latents
    dtypes: dict[str, torch.dtype]
    fault: str  # how picture and sound differ in length, if they do


@dataclass(frozen=True)
class _Layout:
    """What a model expects of the files."""

    model: str
    channels: int
    stride: int  # pictures of every latent but the first, which has `first`
    first: int
    audio_channels: int
    audio_bins: int
    audio_rate: float  # latents per second
    tokens: int
    widths: dict[str, int]  # of the text features of each stream

    @classmethod
    def of(cls, model, root: Path) -> _Layout:
        if not hasattr(model, "set_format") or "audio_scale_factor" not in model.config:
            raise ValueError(
                f"data: {root} holds latents of LTX-2; expected an LTX-2 pipeline as model, "
                f"got {type(model).__name__}"
            )
        connectors = model.parts.config("connectors")
        audio_channels = model.parts.config("audio_vae")["latent_channels"]
        return cls(
            model=model.parts.name,
            channels=model.config["in_channels"],
            stride=model.config["vae_scale_factors"][0],
            first=model.config["causal_offset"],
            audio_channels=audio_channels,
            audio_bins=model.config["audio_in_channels"] // audio_channels,
            audio_rate=model.timelines[1].rate,
            tokens=model.text_tokens,
            widths={
                stream: connectors[f"{stream}_connector_num_attention_heads"]
                * connectors[f"{stream}_connector_attention_head_dim"]
                for stream in ("video", "audio")
            },
        )

    def pictures(self, latents: int) -> int:
        return (latents - 1) * self.stride + self.first


# --- what a file must hold ------------------------------------------------------------------------


def _video(content: dict, layout: _Layout) -> tuple[Tensor, tuple[int, int, int], float]:
    """Packed latents [S,C], their size and the frame rate."""
    missing = {"latents", "num_frames", "height", "width", "fps"} - content.keys()
    if missing:
        raise _Unusable(f"it lacks the keys {', '.join(sorted(missing))}")
    size = tuple(_number(content, key) for key in ("num_frames", "height", "width"))
    if any(n != int(n) or n < 1 for n in size):
        raise _Unusable(f"its size in latents is {_size(size)}, expected whole numbers above 0")
    size = tuple(int(n) for n in size)
    rate = _number(content, "fps")
    if not rate > 0:
        raise _Unusable(f"its fps is {rate:g}, expected more than 0")
    latents = _floats(content, "latents", "latents", LARGEST)
    spread, packed = [layout.channels, *size], [math.prod(size), layout.channels]
    if list(latents.shape) == spread:
        return latents.flatten(1).T, size, rate
    if list(latents.shape) == packed:
        return latents, size, rate
    raise _Unusable(
        f"its latents are {list(latents.shape)}, expected {spread} or packed {packed}, for it says "
        f"{_size(size)} (num_frames, height, width) and the model's have {layout.channels} channels"
    )


def _audio(content: dict, layout: _Layout) -> Tensor:
    """Packed latents [L,C]."""
    latents = _floats(content, "latents", "audio latents", LARGEST)
    channels, bins = layout.audio_channels, layout.audio_bins
    if latents.ndim != 3 or (latents.shape[0], latents.shape[2]) != (channels, bins):
        raise _Unusable(
            f"its audio latents are {list(latents.shape)}, expected [{channels}, time, {bins}]"
        )
    for key, expected in (("num_time_steps", latents.shape[1]), ("frequency_bins", bins)):
        if key in content and (found := _number(content, key)) != expected:
            raise _Unusable(f"its {key} is {found:g}, its audio latents have {expected}")
    return latents.transpose(0, 1).flatten(1)


def _mistimed(content: dict, count: int, pictures: int, rate: float, layout: _Layout) -> str:
    """How the sound, of `count` latents, differs in length from the pictures; or "".

    As many latents as the pictures last, rounded, or one more: the trainer's codec makes a whole
    one of the last fraction. A `duration` within one latent.
    """
    seconds = pictures / rate
    lasts = f"its pictures {seconds:.2f} s at {rate:g} fps"
    wanted = round(seconds * layout.audio_rate)
    if not 0 < wanted <= count <= wanted + 1:
        return (
            f"expected {wanted or 1} audio latents, got {count}: its sound lasts "
            f"{count / layout.audio_rate:.2f} s, {lasts}"
        )
    duration = _number(content, "duration") if "duration" in content else seconds
    if abs(duration - seconds) * layout.audio_rate > 1 + 1e-6:
        return f"its duration is {duration:.2f} s, {lasts}"
    return ""


def _text(content: dict, layout: _Layout) -> dict[str, Tensor]:
    """Both streams' text features and their mask, padded on the left."""
    keys = {"video": "video_prompt_embeds", "audio": "audio_prompt_embeds"}
    if keys["video"] not in content:
        keys["video"] = "prompt_embeds"
    alone = keys["audio"] in content
    if not alone:  # one text for both, where their widths allow it
        keys["audio"] = keys["video"]
    mask = _mask(content, layout)
    padding = layout.tokens - len(mask)
    sample = {}
    for stream, key in keys.items():
        features = _floats(content, key, f"conditions' {key}")
        width = layout.widths[stream]
        if list(features.shape) != [len(mask), width]:
            missing = "" if alone else "; there is no audio_prompt_embeds"
            raise _Unusable(
                f"its {stream}_features: expected [tokens, channels] of "
                f"[{len(mask)}, {width}] in {key}, got {list(features.shape)}{missing}"
            )
        sample[f"{stream}_features"] = F.pad(features, (0, 0, padding, 0))
    return sample | {"text_mask": F.pad(mask, (padding, 0))}


def _mask(content: dict, layout: _Layout) -> Tensor:
    """Which tokens are text, [N], N at most the model's."""
    mask = _tensor(content, "prompt_attention_mask", "conditions' prompt_attention_mask")
    if mask.ndim != 1 or not 1 <= len(mask) <= layout.tokens:
        raise _Unusable(
            f"its conditions' prompt_attention_mask is {list(mask.shape)}, "
            f"expected [tokens], {layout.tokens} at most"
        )
    if mask.is_complex() or not ((mask == 0) | (mask == 1)).all():
        raise _Unusable("its conditions' prompt_attention_mask holds other numbers than 0 and 1")
    if not mask.any():
        raise _Unusable("its conditions' prompt_attention_mask marks no token as text")
    return mask.bool()


def _number(content: dict, key: str) -> float:
    value = content[key]
    if _is_tensor(value) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = repr(value) if isinstance(value, (bool, str)) else _kind(value)
        raise _Unusable(f"its {key} is {shown[:40]}, expected a number")
    if not abs(value) < 1e9:  # nor NaN
        shown = f"{value}" if isinstance(value, float) else "huge"
        raise _Unusable(f"its {key} is {shown}, expected a number below 1e9")
    return value


def _floats(content: dict, key: str, name: str, largest: float = math.inf) -> Tensor:
    """A tensor of finite floating numbers, in float32 where float64 is stored."""
    tensor = _tensor(content, key, name)
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise _Unusable(f"its {name} are {kind}, expected floating numbers of 16, 32 or 64 bits")
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    # Not isfinite: of a large tensor that makes another one.
    lowest, highest = (end.item() for end in torch.aminmax(tensor)) if tensor.numel() else (0, 0)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise _Unusable(f"its {name} hold NaN or infinite numbers")
    if max(-lowest, highest) > largest:
        raise _Unusable(
            f"its {name} reach {max(-lowest, highest):.1e}, expected normalised ones, near 1"
        )
    return tensor


def _tensor(content: dict, key: str, name: str) -> Tensor:
    """An ordinary tensor of `content`."""
    if key not in content:
        raise _Unusable(f"it lacks the key {key}: no {name}")
    value = content[key]
    if not _is_tensor(value):
        raise _Unusable(f"its {name} is {_kind(value)}, expected a tensor of values")
    return value.detach()


def _is_tensor(value) -> bool:
    """Not sparse or quantised, nor on the meta device, which keeps no values."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _kind(value) -> str:
    if isinstance(value, Tensor):
        layout = str(value.layout).removeprefix("torch.")
        return f"a tensor {list(value.shape)} ({value.device.type}, {layout}, {value.dtype})"
    return "None" if value is None else f"of type {type(value).__name__}"


# --- many clips -----------------------------------------------------------------------------------


def _commonest(found: dict[Path, _Format]) -> tuple[list[Path], float]:
    """The most clips of one size whose rates are one, in order, and their median rate."""
    sizes = defaultdict(list)
    for path, clip in found.items():
        sizes[clip.size].append((clip.rate, path))
    best: list[tuple[float, Path]] = []
    for clips in sizes.values():
        clips.sort()
        start = 0
        for end, (rate, _) in enumerate(clips):
            while rate > clips[start][0] * (1 + ONE_RATE):
                start += 1
            if end + 1 - start > len(best):
                best = clips[start : end + 1]
    rate = best[(len(best) - 1) // 2][0]
    return sorted(path for _, path in best), round(rate, 3)


def _size(size: tuple) -> str:
    return "x".join(f"{n:g}" for n in size)


def _files(folder: Path) -> list[Path]:
    """All .pt files below, also those in linked folders; none where there is no such folder."""
    found, seen = [], set()
    if not folder.exists():
        return found

    def stop(error: OSError):
        raise error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(place)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place) / name for name in names if name.endswith(".pt")]
    return sorted(found)


# --- .pt files ------------------------------------------------------------------------------------


class _NumpyType:
    """In the place of `numpy.dtype` in a pickle, so that none of numpy's own code is called."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _numpy_scalar(kind: _NumpyType, content: bytes) -> int | float | bool:
    """In the place of numpy's own function: a number as Python has it."""
    if not re.fullmatch(r"b1|[iuf]\d+", kind.name):
        raise pickle.UnpicklingError(f"numpy scalar of type {kind.name}")
    dtype = np.dtype(kind.order.replace("|", "=") + kind.name)
    value = np.frombuffer(content, dtype, count=1)[0]
    return float(value) if dtype.kind == "f" else value.item()


# numpy 1 and 2 write different names.
NUMPY_SCALARS = [
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_NumpyType, "numpy.dtype"),
]


def _load(path: Path, root: Path) -> dict:
    """The content of a .pt file: tensors, numbers (numpy's too) and containers, nothing else."""
    name = path.relative_to(root).as_posix().removeprefix("latents/")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that then fail, and are named
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise anything
        raise _unreadable(path, name, error) from error
    if not isinstance(content, dict):
        raise _Unusable(f"{name} holds no dict of tensors, it is {_kind(content)}")
    return content


def _unreadable(path: Path, name: str, error: Exception) -> ValueError:
    """What keeps a file from being read: _Unusable, or for a foreign object plain ValueError."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as reason:
        return _Unusable(f"{name} cannot be opened ({reason.strerror})")
    if not head:
        return _Unusable(f"{name} is empty")
    if head.startswith(b"version https://git-lfs"):
        return _Unusable(f"{name} is a git-lfs pointer, not the file itself; run `git lfs pull`")
    if not head.startswith((b"PK", b"\x80")):
        return _Unusable(f"{name} is not a file that torch.save wrote")
    if not isinstance(error, pickle.UnpicklingError):
        return _Unusable(f"{name} is damaged")
    if "Unsupported operand" in str(error):
        return _Unusable(f"{name} is damaged, or pickled by another protocol than torch.save's own")
    if re.search(r"\bnumpy\b", str(error)):
        return _Unusable(f"{name} holds numpy arrays or objects, expected tensors and numbers")
    return ValueError(f"{path} is refused: it holds pickled objects other than tensors and numbers")
